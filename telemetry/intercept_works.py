"""The Works of operations that have been issued and not waited for yet, and what ends them.

Owns when an operation ends:

    Work.wait returns             then; also synchronize and block_current_stream
    Work.wait raises              then, as failed. If it only timed out, the operation goes on.
    Work.is_completed says so     then, told when it is waited for or collected
    its future is done            then, where somebody has asked for the future
    nobody keeps the Work         then, marked UNWAITED

The latest Work is kept alive until the next operation begins, a step ends or coverage is sampled: a
strong reference is a third of the price of a weak one, and nearly every Work is waited for at once.
All others are held weakly.
"""

import time
import weakref
from collections.abc import Callable
from typing import Any

from .intercept_groups import Recorder
from .intercept_template import write_out_wait
from .ring import ERROR, OK, UNWAITED, RingMemory

# What was opened last: work, ticket, begin_ns, the options of the call.
Latest = tuple[Any, int, int, Any]

# Who waits sooner than this after an operation began has hidden nothing behind it.
AT_ONCE_NS = 20_000


class _Open:
    """An operation, or a batch of them that ends as one."""

    __slots__ = ("begin_ns", "completed_ns", "failure", "followed", "mark", "members", "options",
                 "over", "reference", "ticket", "waited_ns")  # fmt: skip

    def __init__(self, ticket: int, begin_ns: int, options: Any, mark: Any = None) -> None:
        self.reference: weakref.ref[Any] | None = None
        self.ticket = ticket
        self.begin_ns = begin_ns
        self.options = options
        self.mark = mark
        self.completed_ns = 0
        self.waited_ns = 0  # when somebody began to wait for its future
        self.followed = self.over = False  # followed: its future will say when it is over
        self.failure = 0  # the aux of a wait that timed out
        self.members: list[tuple[int, int]] = []  # ticket, begin_ns


class OpenWorks:
    """All of one recorder. Safe for several threads under the GIL."""

    def __init__(self, recorder: Recorder, timer: Any = None) -> None:
        self.latest: list[Latest | None] = [None]  # one element, shared with the wrappers
        self._recorder = recorder
        self._timer = timer
        self._end_at = getattr(recorder, "end_at", None)
        self._others: dict[int, _Open] = {}  # by id of the Work
        self._futures: dict[int, _Open] = {}  # by id of the Work's future

    def opened(self, work: Any, ticket: int, begin_ns: int, options: Any, mark: Any) -> Any:
        """An operation has returned its Work, as this does; `mark`: the timer's."""
        if mark is not None:
            self._watch(work, _Open(ticket, begin_ns, options, mark))
            return work
        previous, entry = self.latest[0], (work, ticket, begin_ns, options)
        self.latest[0] = entry
        if previous is not None:
            self.demote(previous)
        return work

    def opened_batch(self, work: Any, members: list[tuple[int, int]]) -> None:
        """Operations that end with one Work: ticket and begin_ns of each."""
        ticket, begin_ns = members[0]
        one = _Open(ticket, begin_ns, None)
        one.members = members[1:]
        self._watch(work, one)

    def demote(self, entry: Latest) -> None:
        """From now on hold it weakly."""
        self._watch(entry[0], _Open(*entry[1:]))

    def flush(self) -> None:
        """Let go of the latest one too."""
        latest = self.latest[0]
        self.latest[0] = None
        if latest is not None:
            self.demote(latest)

    def _watch(self, work: Any, one: _Open) -> None:
        key = id(work)

        def collected(reference: weakref.ref[Any]) -> None:
            if self._others.get(key) is one:
                del self._others[key]
                if not one.followed:
                    self._dropped(one)

        one.reference = weakref.ref(work, collected)
        self._others[key] = one

    def _find(self, work: Any) -> _Open | None:
        latest = self.latest[0]
        if latest is not None and latest[0] is work:
            self.flush()
        return self._others.get(id(work))

    def _take(self, work: Any) -> _Open | None:
        one = self._find(work)
        if one is None:
            return None
        self._others.pop(id(work), None)
        return None if one.over else one

    # ---- how they end

    def _finish(self, one: _Open, end_ns: int, waited_ns: int) -> None:
        """`waited_ns`: when somebody began to wait for it."""
        one.over = True
        end_at = self._end_at
        for ticket, begin_ns in ((one.ticket, one.begin_ns), *one.members):
            hidden = waited_ns - begin_ns
            if hidden < AT_ONCE_NS or not getattr(one.options, "asyncOp", True):
                hidden = 0
            if end_at is not None:
                end_at(ticket, end_ns, OK | hidden << 8)
            else:
                self._recorder.end(ticket, OK | hidden << 8)

    def _fail(self, one: _Open, aux: int) -> None:
        one.over = True
        for ticket, _ in ((one.ticket, one.begin_ns), *one.members):
            self._recorder.end(ticket, aux)
        if one.mark is not None:
            self._timer.dropped(one.mark)

    def _dropped(self, one: _Open) -> None:
        if one.completed_ns and not one.failure:
            self._finish(one, one.completed_ns, one.completed_ns)
            if one.mark is not None:
                self._timer.dropped(one.mark)
        else:
            self._fail(one, one.failure or UNWAITED)

    def raised(self, work: Any, one: _Open, error: BaseException) -> None:
        """A wait has raised: the operation has failed, or goes on if that only timed out."""
        aux = ERROR | self._recorder.intern(type(error).__name__) << 8
        if one.over:
            return
        if _is_completed(work):
            self._fail(one, aux)
        else:
            one.failure = aux
            self._others[id(work)] = one

    # ---- the wrappers of Work and Future

    def wait(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Of a method that returns when the operation is over: `wait` and its kin."""
        take, timer, now = self._take, self._timer, time.perf_counter_ns

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            one = take(work)
            if one is None:
                return original(work, *args, **kwargs)
            one.waited_ns = now()
            try:
                result = original(work, *args, **kwargs)
            except BaseException as error:
                self.raised(work, one, error)
                raise
            if one.completed_ns:
                self._finish(one, one.completed_ns, one.completed_ns)
            elif not one.over:  # its future may have said so already
                self._finish(one, now(), one.waited_ns)
            if one.mark is not None:
                timer.waited(one.mark, work)
            return result

        return wait

    def wait_in(self, memory: RingMemory, original: Callable[..., Any]) -> Callable[..., Any]:
        """The same, for the latest Work written out on the ring's memory."""

        def raised(work: Any, entry: Latest, error: BaseException) -> None:
            self.raised(work, self._again(entry), error)

        names = memory._asdict() | {
            "latest": self.latest, "now": time.perf_counter_ns, "slow": self.wait(original),
            "raised": raised, "at_once_ns": AT_ONCE_NS,
        }  # fmt: skip
        return write_out_wait(original, names)

    def _again(self, entry: Latest) -> _Open:
        self.demote(entry)
        return self._others.pop(id(entry[0]))

    def is_completed(self, original: Callable[..., bool]) -> Callable[..., bool]:
        now = time.perf_counter_ns

        def is_completed(work: Any) -> bool:
            result = original(work)
            if result:
                one = self._find(work)
                if one is not None and not one.completed_ns:
                    one.completed_ns = now()
            return result

        return is_completed

    def get_future(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_future(work: Any) -> Any:
            future = original(work)
            one = self._find(work)
            if one is not None and self._futures.get(id(future)) is not one:
                self._follow(future, id(work), one)
            return future

        return get_future

    def _follow(self, future: Any, key: int, one: _Open) -> None:
        number = id(future)
        self._futures[number] = one
        one.followed = True

        def done(future: Any) -> None:
            self._future_done(one, future)
            if self._others.get(key) is one:
                del self._others[key]
            if self._futures.get(number) is one:
                del self._futures[number]

        future.add_done_callback(done)

    def _future_done(self, one: _Open, future: Any) -> None:
        failure: Exception | None = None
        try:
            future.value()
        except Exception as error:
            failure = error
        if one.over:
            return  # whoever has waited for the Work, or for another of its futures, came first
        if failure is not None:
            self._fail(one, ERROR | self._recorder.intern(type(failure).__name__) << 8)
            return
        now_ns = time.perf_counter_ns()
        self._finish(one, now_ns, one.waited_ns or now_ns)
        if one.mark is not None:
            self._timer.dropped(one.mark)

    def wait_for_future(self, original: Callable[..., Any]) -> Callable[..., Any]:
        now, futures = time.perf_counter_ns, self._futures

        def wait(future: Any) -> Any:
            one = futures.get(id(future))
            if one is None:
                return original(future)
            one.waited_ns = one.waited_ns or now()
            result = original(future)
            self._future_done(one, future)
            return result

        return wait


def _is_completed(work: Any) -> bool:
    """Whether a Work whose wait has raised is over; one that cannot say so is."""
    try:
        return bool(work.is_completed())
    except Exception:
        return True
