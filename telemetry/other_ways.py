"""Collectives of a process group that take another way than its backend.

Owns their place among the group's others: the same name, the same numbering (ranks agree on it), so
that who waits, who is behind and who called what else shows as with any collective. Implements
`onecast.comm.CollectiveProbe`. The group's own sequence number does not move with them, which its
coverage takes into account.
"""

from typing import Any

from .intercept_groups import Operation

_NOTHING = 0  # no ticket: what begins after the end of recording


class OtherWays:
    """Writes to what records the calls of torch.distributed; of a group from one thread."""

    def __init__(self, calls: Any) -> None:
        """`calls`: an `intercept_calls.Calls`."""
        self._live = calls.live
        self._groups = calls.groups
        self._recorder = calls.recorder
        self._operations: dict[tuple[str, int], Operation] = {}

    def begin(self, op: str, group: Any, nbytes: int, dtype: Any) -> int:
        if not self._live[0]:
            return _NOTHING
        operation = self._operations.get((op, id(group)))
        if operation is None or operation.group.handle() is not group:
            operation = self._groups.operation(group, op)
            self._operations[op, id(group)] = operation
        meta = operation.metas.get(dtype)
        if meta is None:
            meta = operation.meta_of(dtype, self._recorder.intern)
        number = operation.next_number()
        operation.group.extra -= 1  # the backend does not count it; not sooner, or one is missing
        ticket: int = self._recorder.begin(meta, number, nbytes)
        return ticket

    def end(self, ticket: int) -> None:
        if ticket != _NOTHING:
            self._recorder.end(ticket)

    def fail(self, ticket: int, error: BaseException) -> None:
        if ticket != _NOTHING:
            self._recorder.fail(ticket, error)
