"""Sees every collective of this process, whoever issued it, and writes it to a recorder.

Owns the patches of torch.distributed's pybind classes: the operations of `ProcessGroup`, the same
of `Backend` for those who call one directly, and `Work.wait`, where Gloo's operations complete.
`instrument` and `uninstrument` are neighbours and undo each other exactly. Knows nothing of files,
metrics or spans: a recorder is anything with the four methods below.

Recorded: operation (torch.distributed's name for it), group, group size, its number among the
group's collectives (the same on all ranks, which call them in the same order; send and recv are
counted apart), dtype, begin, end, how long after its begin it was waited for, error and payload
bytes. The payload follows nccl-tests,
so that all ranks of an operation agree: the tensor for all_reduce, broadcast, reduce, send and
recv; the gathered whole (one rank's share times the group size) for all_gather and gather; the
unscattered whole for reduce_scatter and scatter; all that a rank sends for all_to_all; 0 for
barriers.

An operation begins when its ProcessGroup method is called and ends when `Work.wait` returns, or
at once where the method returns no Work. A Work that nobody waits for ends when it is
collected, marked UNWAITED. With NCCL `wait` only orders streams, so these are host times.

Not seen: functional collectives (DTensor, torch.compile: `torch.ops._c10d_functional`) and DDP's
own reducer, which call the group from C++. They do show: once a step the group's own sequence
number is compared with what was recorded, see `sample_coverage`.

torch is imported by `instrument`, not by this module: the sidecar shares this package and
must start fast.
"""

import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any, Protocol

from .ring import COLLECTIVE, OK, UNWAITED, is_point_to_point, pack_meta, with_dtype


class Recorder(Protocol):
    """Where operations go; `RingWriter` is one."""

    @property
    def begin(self) -> Callable[[int, int, int], int]: ...
    @property
    def end(self) -> Callable[..., None]: ...  # (ticket, aux=OK)
    def fail(self, ticket: int, error: BaseException) -> None: ...
    def intern(self, name: str) -> int: ...
    def set_coverage(self, group: int, unrecorded: int) -> None: ...


# method: (operation, the argument that holds the payload, whether it counts once per rank)
_NONE = -1
_METHODS: dict[str, tuple[str, int, bool]] = {
    "allreduce": ("all_reduce", 0, False),
    "allreduce_coalesced": ("all_reduce_coalesced", 0, False),
    "broadcast": ("broadcast", 0, False),
    "reduce": ("reduce", 0, False),
    "allgather": ("all_gather", 1, True),
    "_allgather_base": ("all_gather_into_tensor", 1, True),
    "all_gather_single": ("all_gather_into_tensor", 1, True),
    "allgather_coalesced": ("all_gather_coalesced", 1, True),
    "allgather_into_tensor_coalesced": ("all_gather_into_tensor_coalesced", 1, True),
    "all_gather_single_coalesced": ("all_gather_into_tensor_coalesced", 1, True),
    "gather": ("gather", 1, True),
    "scatter": ("scatter", 0, True),
    "reduce_scatter": ("reduce_scatter", 0, True),
    "_reduce_scatter_base": ("reduce_scatter_tensor", 0, True),
    "reduce_scatter_single": ("reduce_scatter_tensor", 0, True),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_tensor_coalesced", 0, True),
    "reduce_scatter_single_coalesced": ("reduce_scatter_tensor_coalesced", 0, True),
    "alltoall": ("all_to_all", 1, False),
    "alltoall_base": ("all_to_all_single", 1, False),
    "all_to_all_single": ("all_to_all_single", 1, False),
    "send": ("send", 0, False),
    "recv": ("recv", 0, False),
    "recv_anysource": ("recv", 0, False),
    "barrier": ("barrier", _NONE, False),
    "monitored_barrier": ("monitored_barrier", _NONE, False),
}
_INPUTS = ("input_tensors", "input_tensor", "input", "inputTensor", "inputs", "input_list")
_OUTPUTS = (
    "tensors", "tensor", "output_tensors", "output_tensor", "output", "outputTensor", "outputs",
)  # fmt: skip


class _Group:
    """What is known of one process group: its label, its size, and its counters."""

    def __init__(self, handle: Any, recorder: Recorder) -> None:
        if hasattr(handle, "group_name"):
            unique = handle.group_name
            description = handle.group_desc
            label = unique if description in ("", "undefined") else description
        else:  # a Backend without a process group
            label, unique = f"{handle.name()} backend", f"backend {id(handle):x}"
        self.size: int = handle.size()
        self.entry = recorder.intern(f"{label}\t{unique}")
        self.handle = weakref.ref(handle)
        self.base = handle._get_sequence_number_for_group()
        self.next_collective = itertools.count(1).__next__
        self.next_point_to_point = itertools.count(1).__next__
        self.operations: dict[str, _Operation] = {}
        self.unrecorded = 0


class _Operation:
    """One operation of one group: its meta words by dtype, its calls, where its numbers come from.

    `numbers` is by how much one call moves the group's own sequence number, seen at the first:
    1 as a rule, but 2 for Gloo's reduce_scatter of two ranks and 0 for NCCL's point-to-point.
    """

    __slots__ = ("calls", "group_size", "meta", "metas", "next_sequence", "numbers", "refused")

    def __init__(self, meta: int, group: _Group, name: str) -> None:
        self.meta = meta
        self.metas: dict[Any, int] = {}
        self.group_size = group.size
        self.next_sequence = (
            group.next_point_to_point if is_point_to_point(name) else group.next_collective
        )
        self.calls = 0
        self.numbers: int | None = None
        self.refused = 0  # calls that raised before anything was issued


# By id of a Work that nobody has waited for: a weak reference that fires if nobody will, its
# ticket, and when it began. A subclass of weakref.ref with attributes costs 40 ns more.
_Pending = dict[int, tuple[weakref.ref[Any], int, int]]


def _owner(handle: Any) -> Any:
    """The process group itself; for a Backend, the group it belongs to if one can be found."""
    from torch.distributed import ProcessGroup, distributed_c10d

    if not isinstance(handle, ProcessGroup):
        for group in list(distributed_c10d._world.pg_map):
            if any(group._get_backend(device) is handle for device in group._device_types):
                return group
    return handle


def _recorded_above(code: CodeType, live: list[bool]) -> bool:
    """Whether a caller up the stack is a wrapper of the same instrumentor.

    Only where a group or a backend is written in Python does one wrapped method call another
    through Python; the outer one has recorded the operation then.
    """
    frame = sys._getframe(2)
    for _ in range(32):
        above = frame.f_back
        if above is None:
            return False
        frame = above
        if frame.f_code is code and frame.f_locals.get("live") is live:
            return True
    return False


class CollectiveInstrumentor:
    """Patches torch.distributed's classes for one recorder.

    Several may be active in one process; each records everything. If another patch lies on top
    when one is removed, that patch stays and this one becomes a pass-through beneath it.
    """

    def __init__(self) -> None:
        self._patches: list[tuple[type, str, Any, Any]] = []
        self._groups: dict[int, _Group] = {}
        self._lock = threading.Lock()
        self._recorder: Recorder | None = None
        self._live: list[bool] = []

    @property
    def active(self) -> bool:
        return bool(self._patches)

    def instrument(self, recorder: Recorder) -> None:
        """Record to `recorder` from now on. ValueError if this instrumentor already does."""
        from torch._C._distributed_c10d import Backend, Work
        from torch.distributed import ProcessGroup

        if self._patches:
            raise ValueError("this CollectiveInstrumentor is already active: uninstrument() first")
        self._recorder = recorder
        self._groups = {}
        self._live = [True]
        pending: _Pending = {}
        for owner in (ProcessGroup, Backend):
            for name, (operation, payload, per_rank) in _METHODS.items():
                if name in owner.__dict__:  # torch versions differ
                    call = self._operation(owner, name, operation, payload, per_rank, pending)
                    self._patch(owner, name, call)
        self._patch(Work, "wait", self._wait(Work, pending))

    def uninstrument(self) -> None:
        """Put back what `instrument` found, entry by entry."""
        self._live[:] = [False]
        for owner, name, entry, replacement in reversed(self._patches):
            if owner.__dict__.get(name) is replacement:
                setattr(owner, name, entry)
        self._patches.clear()
        self._groups = {}
        self._recorder = None

    def sample_coverage(self) -> None:
        """Compare each group's sequence number with what was recorded, and publish the difference.

        Exact for Gloo. Backends that number a batch of operations once can hide unrecorded ones
        behind recorded ones.
        """
        recorder = self._recorder
        if recorder is None:
            return
        for group in list(self._groups.values()):
            handle = group.handle()
            if handle is None:
                continue
            issued = handle._get_sequence_number_for_group() - group.base
            recorded = sum(
                (operation.calls - operation.refused) * operation.numbers
                for operation in list(group.operations.values())
                if operation.numbers is not None
            )
            if issued - recorded > group.unrecorded:  # a total: it never goes back
                group.unrecorded = issued - recorded
                recorder.set_coverage(group.entry, group.unrecorded)

    def _patch(self, owner: type, name: str, replacement: Any) -> None:
        entry = owner.__dict__[name]  # getattr would lose the binding of self
        replacement.__name__ = name
        replacement.__qualname__ = f"{owner.__qualname__}.{name}"
        replacement.__doc__ = entry.__doc__
        setattr(owner, name, replacement)
        self._patches.append((owner, name, entry, replacement))

    def _attach(self, handle: Any, name: str) -> _Operation:
        """First sight of an operation on a group."""
        recorder = self._recorder
        assert recorder is not None
        with self._lock:
            owner = _owner(handle)
            group = self._groups.get(id(owner))
            if group is None or group.handle() is not owner:
                group = self._groups[id(owner)] = _Group(owner, recorder)
            operation = group.operations.get(name)
            if operation is None:
                meta = pack_meta(
                    COLLECTIVE, recorder.intern(name), group.entry, group_size=group.size
                )
                operation = _Operation(meta, group, name)
                group.operations[name] = operation
            return operation

    def _operation(
        self, owner: type, method: str, name: str, payload: int, per_rank: bool,
        pending: _Pending,
    ) -> Callable[..., Any]:  # fmt: skip
        original = getattr(owner, method)
        recorder = self._recorder
        assert recorder is not None
        begin, end, fail, intern = recorder.begin, recorder.end, recorder.fail, recorder.intern
        attach, live, reference = self._attach, self._live, weakref.ref
        now = time.perf_counter_ns
        known: dict[int, _Operation] = {}  # by id of the group
        watches: dict[int, weakref.ref[Any]] = {}  # take an id out again when its group is gone
        keywords = (_OUTPUTS, _INPUTS)[max(payload, 0)]
        direct = owner.__name__ == "Backend"

        def forget(watch: weakref.ref[Any]) -> None:
            for key, (candidate, ticket, _) in list(pending.items()):
                if candidate is watch:
                    del pending[key]
                    end(ticket, UNWAITED)
                    return

        def operation_of(handle: Any) -> _Operation:
            operation = attach(handle, name)
            key = id(handle)
            known[key] = operation

            def gone(_: object) -> None:
                known.pop(key, None)
                watches.pop(key, None)

            watches[key] = weakref.ref(handle, gone)
            return operation

        def measure(operation: _Operation, value: Any) -> tuple[int, int]:
            """Bytes and meta word of a tensor or of a (nested) list of tensors."""
            if isinstance(value, (list, tuple)):
                parts = [measure(operation, part) for part in value]
                return sum(nbytes for nbytes, _ in parts), parts[0][1] if parts else operation.meta
            if not hasattr(value, "element_size"):
                return 0, operation.meta  # no tensor: the call itself will say so
            meta = operation.metas.get(value.dtype)
            if meta is None:
                dtype = intern(str(value.dtype).removeprefix("torch."))
                meta = operation.metas[value.dtype] = with_dtype(operation.meta, dtype)
            return value.numel() * value.element_size(), meta

        def call(handle: Any, *args: Any, **kwargs: Any) -> Any:
            if not live[0] or (direct and _recorded_above(code, live)):
                return original(handle, *args, **kwargs)
            operation = known.get(id(handle))
            issued = None
            if operation is None:
                operation = operation_of(handle)
                issued = handle._get_sequence_number_for_group()
            nbytes, meta = 0, operation.meta
            if payload >= 0:
                if len(args) > payload:
                    value = args[payload]
                else:
                    value = next((kwargs[word] for word in keywords if word in kwargs), ())
                if type(value) is list and len(value) == 1:
                    value = value[0]
                try:  # the usual case: one tensor of a known dtype
                    meta = operation.metas[value.dtype]
                    nbytes = value.nbytes
                except (AttributeError, KeyError, RuntimeError):
                    nbytes, meta = measure(operation, value)
                if per_rank:
                    nbytes *= operation.group_size
            operation.calls += 1
            begin_ns = now()
            ticket = begin(meta, operation.next_sequence(), nbytes)
            try:
                work = original(handle, *args, **kwargs)
            except BaseException as error:
                fail(ticket, error)
                operation.refused += 1
                if operation.numbers is None:
                    known.pop(id(handle), None)  # the next call is the first again
                raise
            if issued is not None and operation.numbers is None:
                operation.numbers = handle._get_sequence_number_for_group() - issued
            if work is None:
                end(ticket)
            else:
                pending[id(work)] = reference(work, forget), ticket, begin_ns
            return work

        code = call.__code__
        return call

    def _wait(self, owner: Any, pending: _Pending) -> Callable[..., Any]:
        original = owner.wait
        recorder = self._recorder
        assert recorder is not None
        end, fail = recorder.end, recorder.fail
        take = pending.pop
        now = time.perf_counter_ns

        def wait(work: Any, timeout: Any = None) -> Any:
            found = take(id(work), None)
            called_ns = now()
            try:
                result = original(work) if timeout is None else original(work, timeout)
            except BaseException as error:
                if found is not None:
                    fail(found[1], error)
                raise
            if found is not None:
                end(found[1], OK | max(0, called_ns - found[2]) << 8)
            return result

        return wait
