"""Collectives of a process group that take another way than its backend.

Owns their place among the group's others: the same name, the same numbering (ranks agree on it), so
that who waits, who is behind and who called what else shows as with any collective. Implements
`onecast.comm.CollectiveProbe`. The group's own sequence number does not move with them, which its
coverage takes into account.
"""

import time
import weakref
from collections.abc import Callable
from typing import Any

from .intercept_groups import Operation
from .ring import H_HEAD, RingMemory

_NOTHING = 0  # no ticket: what begins after the end of recording


class OtherWays:
    """Writes to what records the calls of torch.distributed; of a group from one thread."""

    begin: Callable[[str, Any, int, Any], int]
    end: Callable[[int], None]

    def __init__(self, calls: Any) -> None:
        """`calls`: an `intercept_calls.Calls`."""
        self._live = calls.live
        self._groups = calls.groups
        self._recorder = calls.recorder
        # By operation, dtype and id of the group: that group, its numbers, and the meta word.
        self._known: dict[tuple[str, Any, int], tuple[weakref.ref[Any], Any, int]] = {}
        if calls.memory is None:
            self.begin, self.end = self._begin, self._end
        else:
            self._write_out(calls.memory)

    def fail(self, ticket: int, error: BaseException) -> None:
        if ticket != _NOTHING:
            self._recorder.fail(ticket, error)

    def _begin(self, op: str, group: Any, nbytes: int, dtype: Any) -> int:
        if not self._live[0]:
            return _NOTHING
        operation, meta = self._find(op, group, dtype)
        number, _ = operation.group.next_other_number()
        ticket: int = self._recorder.begin(meta, number, nbytes)
        return ticket

    def _end(self, ticket: int) -> None:
        if ticket != _NOTHING:
            self._recorder.end(ticket)

    def _write_out(self, memory: RingMemory) -> None:
        """The same for a ring, where nothing is called that need not be: half of the time."""
        live, known, find_numbers, now = (
            self._live,
            self._known,
            self._numbers,
            time.perf_counter_ns,
        )
        mapping, words, mask, records = memory[:4]
        step, ends, published, open_record = (
            memory.step, memory.ends, memory.published, memory.open_record,
        )  # fmt: skip

        def begin(op: str, group: Any, nbytes: int, dtype: Any) -> int:
            if not live[0]:
                return _NOTHING
            found = known.get((op, dtype, id(group)))
            if found is None or found[0]() is not group:
                found = find_numbers(op, group, dtype)
            _, next_numbers, meta = found
            ticket: int
            ticket, number, _ = next_numbers()
            words[H_HEAD] = ticket  # before the slot changes, see `RingWriter`
            open_record(
                mapping, records + ((ticket - 1 & mask) << 6), now(), step[0], meta, number, nbytes,
                ticket,
            )  # fmt: skip
            return ticket

        def end(ticket: int) -> None:
            slot = ticket - 1 & mask
            if ticket != _NOTHING and published[slot] == ticket:
                ends[slot] = now()

        self.begin, self.end = begin, end

    def _numbers(self, op: str, group: Any, dtype: Any) -> tuple["weakref.ref[Any]", Any, int]:
        operation, meta = self._find(op, group, dtype)
        found = operation.group.handle, operation.group.next_other_numbers, meta
        self._known[op, dtype, id(group)] = found
        return found

    def _find(self, op: str, group: Any, dtype: Any) -> tuple[Operation, int]:
        operation = self._groups.operation(group, op)
        meta = operation.metas.get(dtype)
        if meta is None:
            meta = operation.meta_of(dtype, self._recorder.intern)
        return operation, meta
