"""Steps and phases as reusable contexts: entering one allocates nothing.

Owns how a `with` becomes a record. Knows rings and nothing else.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from .ring import DISCARDED, OK, PHASE, STEP_KIND, RingWriter, pack_meta


class PhaseScope:
    """A part of a step: one object per name."""

    __slots__ = ("_begin", "_end", "_fail", "_meta", "_tickets")

    def __init__(self, ring: RingWriter, name: str) -> None:
        self._begin: Callable[[int, int, int], int] = ring.begin
        self._end: Callable[..., None] = ring.end
        self._fail = ring.fail
        self._meta = pack_meta(PHASE, ring.intern(name))
        self._tickets: list[int] = []  # a stack: a phase may hold another of its name

    def __enter__(self) -> None:
        self._tickets.append(self._begin(self._meta, 0, 0))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ticket = self._tickets.pop()
        if error is None:
            self._end(ticket)
        else:
            self._fail(ticket, error)


class StepScope:
    """The one step that is open; steps do not nest. Set `step` and `batch_size`, then enter."""

    __slots__ = ("_after", "_meta", "_ring", "_status", "_ticket", "batch_size", "step")

    def __init__(self, ring: RingWriter, after: Callable[[], Any]) -> None:
        """`after` is called at the end of each step, outside of it."""
        self._ring = ring
        self._after = after
        self._meta = pack_meta(STEP_KIND)
        self._ticket = -1
        self._status = OK
        self.step = -1
        self.batch_size = 0

    def __enter__(self) -> Self:
        self._status = OK
        self._ring.set_step(self.step)
        self._ticket = self._ring.begin(self._meta, self.step, self.batch_size)
        return self

    def set_batch_size(self, num_sequences: int) -> None:
        """For a rank that learns it only inside the step."""
        self._ring.set_nbytes(self._ticket, num_sequences)

    def discard(self) -> None:
        """No step after all (the wait for one ended with the run): no trace, no duration."""
        self._ring.discard_step(self._ticket)
        self._status = DISCARDED

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._ring.end(self._ticket, self._status)
        else:
            self._ring.fail(self._ticket, error)
        self._ring.set_step(-1)
        self._after()
