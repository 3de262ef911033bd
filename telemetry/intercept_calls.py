"""The wrappers that stand in for torch's methods: what a call is, and what it writes down.

Owns the order of things around a call and its two forms: `_general` for everything, and
`_written_out`, where nothing is called that need not be, for what is called all the time (two or
three positional arguments, one tensor of a dtype seen before, a recorder that is a ring). Which
methods there are is `intercept`'s business, when a Work ends that of `intercept_works`.
"""

import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any, NamedTuple

from .intercept_groups import Groups, Operation, Recorder, sequence_of
from .intercept_template import write_out
from .intercept_works import OpenWorks
from .ring import OK, RingMemory

_INPUTS = ("input_tensors", "input_tensor", "input", "inputTensor", "inputs", "input_list")
_OUTPUTS = (
    "tensors", "tensor", "output_tensors", "output_tensor", "output", "outputTensor", "outputs",
)  # fmt: skip
NONE = -1


class Method(NamedTuple):
    """One method of ProcessGroup and Backend."""

    operation: str  # torch.distributed's name for it
    payload: int  # the argument that holds it, NONE if there is none
    per_rank: bool  # whether the payload counts once per rank


class Calls:
    """Records calls to one recorder.

    `timer` (device_time.DeviceTimer) times what is on a GPU, `capture_log` (cuda_graphs.CaptureLog)
    gets what is issued into a CUDA graph: that does not run now, so it is no record.
    """

    def __init__(self, recorder: Recorder, timer: Any = None, capture_log: Any = None) -> None:
        from torch.distributed import ProcessGroup

        self.recorder: Any = recorder
        self.memory: RingMemory | None = getattr(recorder, "memory", None)
        tickets = None if self.memory is None else self.memory.tickets
        self.groups = Groups(recorder, tickets)
        self.works = OpenWorks(recorder, timer)
        self.live = [True]
        self._process_group = ProcessGroup
        self._timer = timer
        self._capture_log = capture_log
        self._known: list[dict[int, Any]] = []  # what the wrappers know of groups, by their id
        self._watches: dict[int, weakref.ref[Any]] = {}  # take an id out when its group is gone
        # Of what records a call. By id: those written out alike for somebody else are equal.
        self._codes: dict[int, CodeType] = {}
        self._is_recorder(Calls.recorded.__code__)
        self._batches: dict[int, list[tuple[int, int]]] = {}  # being coalesced, by thread

    def close(self) -> None:
        """Record nothing any more; wrappers that cannot be removed pass calls on."""
        self.live[0] = False
        self.works.flush()
        for known in self._known:
            known.clear()

    # ---- collectives

    def method(self, original: Callable[..., Any], method: Method, direct: bool) -> Any:
        """A stand-in for `original`; `direct`: it is a Backend's."""
        known: dict[int, Any] = {}
        self._known.append(known)
        general = self._general(original, method, direct, known)
        if self.memory is None or method.payload == NONE:
            return general
        return self._written_out(original, method, general, known, self.memory)

    def _general(
        self, original: Callable[..., Any], method: Method, direct: bool, known: dict[int, Any]
    ) -> Callable[..., Any]:
        live, timer, log, recorder = self.live, self._timer, self._capture_log, self.recorder
        intern, now = recorder.intern, time.perf_counter_ns
        name, payload, per_rank = method
        keywords = (_OUTPUTS, _INPUTS)[max(payload, 0)]
        operations: dict[int, Operation] = {}
        self._known.append(operations)

        def general(handle: Any, *args: Any, **kwargs: Any) -> Any:
            if not live[0]:
                return original(handle, *args, **kwargs)
            operation = operations.get(id(handle))
            if operation is None:
                # Only where a group or a backend is written in Python does one wrapped method
                # call another one; the outer one has recorded the operation then.
                plain = not direct and type(handle) is self._process_group
                if not plain and self.recorded_above():
                    return original(handle, *args, **kwargs)
                operation = self.groups.operation(handle, name)
                if plain:
                    operations[id(handle)] = operation
                    self._watch(handle)
            value: Any = ()
            nbytes, meta = 0, operation.meta
            if payload >= 0:
                if len(args) > payload:
                    value = args[payload]
                else:
                    value = next((kwargs[word] for word in keywords if word in kwargs), ())
                nbytes, meta = operation.measure(value, intern)
                if per_rank:
                    nbytes *= operation.group.size
            if log is not None and log.capturing():
                issue = partial(original, handle, *args, **kwargs)
                return self.capture(operation, handle, value, nbytes, issue)
            mark = None if timer is None else timer.issued(handle, value)
            before = sequence_of(handle) if operation.numbers is None else None
            sequence = operation.next_number()
            begin_ns = now()
            ticket = recorder.begin(meta, sequence, nbytes)
            try:
                work = original(handle, *args, **kwargs)
            except BaseException as error:
                self.refused(operation, ticket, error)
                if mark is not None:
                    timer.dropped(mark)
                raise
            if operation.numbers != 1:
                self.moved(operation, handle, before)
            if mark is not None:
                timer.finished(mark, work, self._step(), begin_ns, meta, sequence, nbytes)
            batch = self._batches.get(threading.get_ident()) if self._batches else None
            if batch is not None:
                batch.append((ticket, begin_ns))
            elif work is None:
                recorder.end(ticket)
            else:
                options = args[-1] if args else None
                self.works.opened(work, ticket, begin_ns, options, mark)
            if operation.numbers == 1 and batch is None and id(handle) in operations:
                group = operation.group
                known[id(handle)] = operation.next_numbers, operation.metas, group.size
            return work

        self._is_recorder(general.__code__)
        return general

    def _written_out(
        self, original: Callable[..., Any], method: Method, general: Callable[..., Any],
        known: dict[int, Any], memory: RingMemory,
    ) -> Callable[..., Any]:  # fmt: skip
        def refused(handle: Any, ticket: int, error: BaseException) -> None:
            self.refused(self.groups.operation(handle, method.operation), ticket, error)

        names = memory._asdict() | {
            "known": known, "general": general, "refused": refused, "now": time.perf_counter_ns,
            "latest": self.works.latest, "demote": self.works.demote, "opened": self.works.opened,
            "timer": self._timer, "log": self._capture_log,
        }  # fmt: skip
        call = write_out(original, method.payload, method.per_rank, names)
        if call is None:
            return general
        self._is_recorder(call.__code__)
        return call

    def refused(self, operation: Operation, ticket: int, error: BaseException) -> None:
        """A call has raised. Whether the group has counted it, its sequence number tells."""
        self.recorder.fail(ticket, error)
        group = operation.group
        issued = group.issued()
        if issued is not None and issued < group.recorded + group.unrecorded:
            group.extra -= 1
        elif operation.numbers not in (None, 1):
            group.extra += (operation.numbers or 1) - 1

    def several_somewhere(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same for a function that does not say of which group, and mostly issues nothing.

        What it did is recorded afterwards.
        """
        now = time.perf_counter_ns

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.live[0]:
                return original(*args, **kwargs)
            before = self.groups.sequences()
            begin_ns = now()
            result = original(*args, **kwargs)
            end_ns = now()
            for handle, sequence in self.groups.sequences():
                moved = sequence - dict(before).get(handle, sequence)
                if moved > 0:
                    operation = self.groups.operation(handle, name)
                    operation.group.extra += moved - 1
                    number = operation.next_number()
                    if self.memory is not None:
                        self.recorder.record(begin_ns, end_ns, operation.meta, number, 0, OK)
                    else:
                        self.recorder.end(self.recorder.begin(operation.meta, number, 0))
            return result

        return call

    def moved(self, operation: Operation, handle: Any, before: int | None) -> None:
        """A call has been issued; `before`: the group's sequence number then, if it was asked."""
        if before is not None:
            operation.moved((sequence_of(handle) or before) - before)
        elif operation.numbers is not None:
            operation.group.extra += operation.numbers - 1

    def capturing(self) -> bool:
        """Whether what this thread issues goes into a CUDA graph."""
        return self._capture_log is not None and self._capture_log.capturing()

    def capture(
        self, operation: Operation, handle: Any, value: Any, nbytes: int, issue: Callable[[], Any]
    ) -> Any:
        """It goes into a CUDA graph: told to the log, and counted as seen."""
        while isinstance(value, (list, tuple)) and value:
            value = value[0]
        dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
        before = sequence_of(handle)
        result = issue()
        group = operation.group
        self._capture_log.captured(operation.name, group.name, group.size, dtype, nbytes)
        if before is not None:
            group.extra += (sequence_of(handle) or before) - before
        return result

    def recorded_above(self) -> bool:
        """Whether what is called now is part of a call that a caller up the stack records."""
        frame = sys._getframe(2)
        for _ in range(32):
            above = frame.f_back
            if above is None:
                return False
            frame = above
            if id(frame.f_code) in self._codes and frame.f_locals.get("self", self) is self:
                return True
        return False

    def _is_recorder(self, code: CodeType) -> None:
        self._codes[id(code)] = code

    def recorded(self, issue: Callable[[], Any]) -> Any:
        """Call `issue`; what it calls in turn is part of what has been recorded."""
        return issue()

    def _step(self) -> int:
        return -1 if self.memory is None else self.memory.step[0]

    def _watch(self, handle: Any) -> None:
        key = id(handle)
        if key in self._watches:
            return

        def gone(_: object) -> None:
            self._watches.pop(key, None)
            for known in self._known:
                known.pop(key, None)

        self._watches[key] = weakref.ref(handle, gone)

    # ---- what several operations have in common

    def start_coalescing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Operations of this thread from here on end together."""

        def start(handle: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(handle, *args, **kwargs)
            if self.live[0]:
                self._batches[threading.get_ident()] = []
                for known in self._known:  # they take the general way now
                    known.pop(id(handle), None)
            return result

        return start

    def end_coalescing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def end(handle: Any, *args: Any, **kwargs: Any) -> Any:
            batch = self._batches.pop(threading.get_ident(), None)
            try:
                work = original(handle, *args, **kwargs)
            except BaseException as error:
                for ticket, _ in batch or ():
                    self.recorder.fail(ticket, error)
                raise
            if batch and work is not None:
                self.works.opened_batch(work, batch)
            else:
                for ticket, _ in batch or ():
                    self.recorder.end(ticket)
            return work

        return end

    def several(
        self, original: Callable[..., Any], name: str, of: Callable[..., tuple[Any, Any]]
    ) -> Callable[..., Any]:
        """A function in C++ that issues any number of collectives, recorded as one.

        of(*args) -> group (None: it cannot be told), payload
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            handle, value = of(*args, **kwargs) if self.live[0] else (None, None)
            if handle is None:
                return original(*args, **kwargs)
            operation = self.groups.operation(handle, name)
            nbytes, meta = operation.measure(value, self.recorder.intern)
            before = sequence_of(handle)
            ticket = self.recorder.begin(meta, operation.next_number(), nbytes)
            try:
                result = original(*args, **kwargs)
            except BaseException as error:
                self.recorder.fail(ticket, error)
                raise
            finally:
                after = sequence_of(handle)
                if before is not None and after is not None:
                    operation.group.extra += after - before - 1
            self.recorder.end(ticket)
            return result

        return call
