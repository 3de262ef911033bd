"""What is known of the process groups whose collectives are recorded, and how many were.

Owns each group's name entry, its numbers and the comparison with its own sequence number. Knows
nothing of how a call is seen, nor of the Works that it returns.

    recorded = numbers handed out - those of other ways + extra
    issued   = the group's sequence number now - base

What takes another way than the backend does not move the sequence number. `extra` corrects for
calls that move it by another amount than 1 (2 for Gloo's reduce_scatter of two ranks, 0 for
point-to-point with NCCL) and for calls that raised before anything was issued. Some backends have
no sequence numbers: nothing can be said of their groups.
"""

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from .ring import COLLECTIVE, is_point_to_point, pack_meta, with_dtype


class Recorder(Protocol):
    """Where operations go; `RingWriter` is one."""

    @property
    def begin(self) -> Callable[[int, int, int], int]: ...
    @property
    def end(self) -> Callable[..., None]: ...  # (ticket, aux=OK)
    def fail(self, ticket: int, error: BaseException) -> None: ...
    def intern(self, name: str) -> int: ...
    def set_coverage(self, group: int, unrecorded: int) -> None: ...


class Coverage(NamedTuple):
    """How many operations of one group the group itself has counted, and how many were seen."""

    group: str  # its name entry, "label\tunique"
    recorded: int
    issued: int


class Group:
    """One process group: its label, its size and its counters."""

    def __init__(
        self, handle: Any, recorder: Recorder, tickets: Any, base: int | None, era: int = 1
    ) -> None:
        """`era`: the how-manieth default group this one lives beside."""
        if hasattr(handle, "group_name"):
            unique = handle.group_name
            description = handle.group_desc
            label = unique if description in ("", "undefined") else description
        else:  # a Backend without a process group
            label, unique = f"{handle.name()} backend", f"backend {id(handle):x}"
        # torch gives the same names again after destroy_process_group and a new beginning.
        self.name = f"{label}\t{unique}" if era == 1 else f"{label}\t{unique} (again {era})"
        self.size: int = handle.size()
        self.entry = recorder.intern(self.name)
        self.handle = weakref.ref(handle)
        self.base = sequence_of(handle) if base is None else base
        self.operations: dict[str, Operation] = {}
        self.unrecorded = 0
        self.extra = 0
        self._collectives = itertools.count(1)
        self._point_to_points = itertools.count(1)
        self.next_collective = self._collectives.__next__
        self.next_point_to_point = self._point_to_points.__next__
        # A ticket of the ring and a number of the group in one step, which no thread can split.
        self.next_numbers = [
            zip(tickets, numbers, strict=False).__next__ if tickets is not None else None
            for numbers in (self._collectives, self._point_to_points)
        ]
        # Of a collective that takes another way, which is counted apart in the same step: with a
        # ticket, and without.
        self._others = itertools.count(1)
        numbers = self._collectives, self._others
        self.next_other_number = zip(*numbers, strict=False).__next__
        self.next_other_numbers = (
            zip(tickets, *numbers, strict=False).__next__ if tickets is not None else None
        )

    @property
    def recorded(self) -> int:
        """In units of the group's own sequence number."""
        numbers = _taken(self._collectives) + _taken(self._point_to_points)
        return numbers - _taken(self._others) + self.extra

    def issued(self) -> int | None:
        """None: the group is gone, or its backend does not count."""
        handle = self.handle()
        sequence = None if handle is None else sequence_of(handle)
        return None if sequence is None or self.base is None else sequence - self.base


class Operation:
    """One operation of one group: its meta words by dtype and where its numbers come from.

    `numbers`: by how much a call moves the group's sequence number; None until two calls agree.
    """

    __slots__ = ("_moved", "group", "meta", "metas", "name", "next_number", "numbers")

    def __init__(self, group: Group, name: str, recorder: Recorder) -> None:
        self.group = group
        self.name = name
        self.meta = pack_meta(COLLECTIVE, recorder.intern(name), group.entry, group_size=group.size)
        self.metas: dict[Any, int] = {}
        self.next_number = (
            group.next_point_to_point if is_point_to_point(name) else group.next_collective
        )
        self.numbers: int | None = None if group.base is not None else 1
        self._moved: int | None = None

    @property
    def next_numbers(self) -> Any:
        """Its (ticket, number) iterator's next, for a ring's memory."""
        return self.group.next_numbers[is_point_to_point(self.name)]

    def moved(self, by: int) -> None:
        """A call has moved the sequence number by so much."""
        self.group.extra += by - 1
        if by in (1, self._moved):
            self.numbers = by
        self._moved = by

    def measure(self, value: Any, intern: Callable[[str], int]) -> tuple[int, int]:
        """Bytes and meta word of a tensor or of a (nested) list of tensors."""
        if isinstance(value, (list, tuple)):
            parts = [self.measure(part, intern) for part in value]
            return sum(nbytes for nbytes, _ in parts), parts[0][1] if parts else self.meta
        if not hasattr(value, "element_size"):
            return 0, self.meta  # no tensor: the call itself will say so
        meta = self.metas.get(value.dtype)
        if meta is None:
            meta = self.meta_of(value.dtype, intern)
        return value.numel() * value.element_size(), meta

    def meta_of(self, dtype: Any, intern: Callable[[str], int]) -> int:
        """The meta word for tensors of this dtype."""
        name = intern(str(dtype).removeprefix("torch."))
        meta = self.metas[dtype] = with_dtype(self.meta, name)
        return meta


class Groups:
    """All groups of one recorder. Safe for several threads."""

    def __init__(self, recorder: Recorder, tickets: Any = None) -> None:
        """`tickets`: the recorder's own, where it has some, see `RingMemory`."""
        self._recorder = recorder
        self._tickets = tickets
        self._groups: dict[int, Group] = {}
        self._lock = threading.Lock()
        self._default: weakref.ref[Any] | None = None
        self._era = 0
        self.meet()

    def meet(self) -> None:
        """Count from here in every group there is, even if nobody is ever seen to use it."""
        from torch.distributed import distributed_c10d

        for handle in list(distributed_c10d._world.pg_map):
            if hasattr(handle, "_get_sequence_number_for_group"):  # not the mark of a non-member
                self._group(handle)

    def operation(self, handle: Any, name: str) -> Operation:
        """Of a ProcessGroup, or of the one a Backend belongs to."""
        owner = _owner(handle)
        group = self._group(owner)
        with self._lock:
            operation = group.operations.get(name)
            if operation is None:
                operation = group.operations[name] = Operation(group, name, self._recorder)
            return operation

    def _group(self, owner: Any) -> Group:
        with self._lock:
            group = self._groups.get(id(owner))
            if group is None or group.handle() is not owner:
                group = Group(owner, self._recorder, self._tickets, None, self._current_era())
                self._groups[id(owner)] = group
            return group

    def _current_era(self) -> int:
        """How many default groups there have been, this one included."""
        from torch.distributed import distributed_c10d

        default = distributed_c10d._world.default_pg
        known = self._default() if self._default is not None else None
        if self._era == 0 or (default is not None and known is not default):
            self._era += 1
            self._default = None if default is None else weakref.ref(default)
        return self._era

    def sequences(self) -> list[tuple[Any, int]]:
        """Every process group that counts, and its own sequence number."""
        from torch.distributed import distributed_c10d

        found = [(handle, sequence_of(handle)) for handle in list(distributed_c10d._world.pg_map)]
        return [(handle, sequence) for handle, sequence in found if sequence is not None]

    def coverage(self) -> list[Coverage]:
        """Of every group that lives and counts."""
        found = []
        for group in list(self._groups.values()):
            issued = group.issued()
            if issued is not None:
                found.append(Coverage(group.name, group.recorded, issued))
        return found

    def publish(self) -> None:
        """Tell the recorder what went by unrecorded: totals, which never go back."""
        for group in list(self._groups.values()):
            issued = group.issued()
            if issued is not None and issued - group.recorded > group.unrecorded:
                group.unrecorded = issued - group.recorded
                self._recorder.set_coverage(group.entry, group.unrecorded)
        self.meet()


def sequence_of(handle: Any) -> int | None:
    """The group's own count of what it has issued; None where its backend keeps none."""
    try:
        sequence: int = handle._get_sequence_number_for_group()
    except (AttributeError, RuntimeError):
        return None
    return sequence


def _taken(counter: "itertools.count[int]") -> int:
    """How often the counter has been advanced, by what it says of itself: "count(3)" is twice."""
    return int(repr(counter)[len("count(") : -1]) - 1


def _owner(handle: Any) -> Any:
    """The process group itself; for a Backend, the group it belongs to if one can be found."""
    from torch.distributed import ProcessGroup, distributed_c10d

    if not isinstance(handle, ProcessGroup):
        for group in list(distributed_c10d._world.pg_map):
            if any(group._get_backend(device) is handle for device in group._device_types):
                return group
    return handle
