"""Functional collectives: what DTensor and torch.compile issue, past every method of ProcessGroup.

Owns Python kernels on the operators of `_c10d_functional`, for the dispatch key BackendSelect:
above the device's own kernel, below autograd and the modes that only trace. A kernel records the
operation and hands on; `wait_tensor` ends it. An operation whose result nobody waits for ends when
that is noticed to be gone, marked UNWAITED. They add about 5 us to an operation and its wait.

Which result is waited for is told by its storage, as torch does itself. On a GPU these operations
have host times only: their Works stay in C++.
"""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from .intercept_calls import Calls
from .intercept_groups import Operation, Recorder, sequence_of
from .intercept_works import AT_ONCE_NS
from .ring import OK, UNWAITED

_SWEEP_AT = 64  # results that nobody has waited for


class _Operator(NamedTuple):
    operation: str
    per_rank: bool = False  # whether the input counts once per rank


_OPERATORS = {
    "all_reduce": _Operator("all_reduce"),
    "all_reduce_": _Operator("all_reduce"),
    "all_reduce_coalesced": _Operator("all_reduce_coalesced"),
    "all_reduce_coalesced_": _Operator("all_reduce_coalesced"),
    "all_gather_into_tensor": _Operator("all_gather_into_tensor", True),
    "all_gather_into_tensor_out": _Operator("all_gather_into_tensor", True),
    "all_gather_into_tensor_coalesced": _Operator("all_gather_into_tensor_coalesced", True),
    "reduce_scatter_tensor": _Operator("reduce_scatter_tensor"),
    "reduce_scatter_tensor_out": _Operator("reduce_scatter_tensor"),
    "reduce_scatter_tensor_coalesced": _Operator("reduce_scatter_tensor_coalesced"),
    "all_to_all_single": _Operator("all_to_all_single"),
    "broadcast": _Operator("broadcast"),
    "broadcast_": _Operator("broadcast"),
    "isend": _Operator("send"),
    "irecv": _Operator("recv"),
}


class _Result(NamedTuple):
    """A result that nobody has waited for yet, and its operation."""

    storage: Any  # StorageWeakRef
    recorder: Recorder
    ticket: int
    begin_ns: int
    keys: tuple[int, ...]  # of all results of the operation


class FunctionalCollectives:
    """Records to what `calls(handle)` gives for a process group; None: nothing."""

    def __init__(self, calls: Callable[[Any], Calls | None]) -> None:
        self._calls = calls
        self._results: dict[int, _Result] = {}  # by address of the result's storage
        self._operations: dict[tuple[int, str], Operation] = {}  # by id of the group, name

    def install(self) -> None:
        _kernels.listen(self)

    def remove(self) -> None:
        """With the last one that listens the dispatcher is as it was."""
        _kernels.leave(self)
        self._sweep(everything=True)

    # ---- what the kernels tell

    def around(
        self, operator: _Operator, handle: Any, value: Any, issue: Callable[[], Any]
    ) -> Callable[[], Any]:
        """`issue`, recorded."""
        calls = self._calls(handle)
        return issue if calls is None else partial(self._record, calls, operator, handle, value,
                                                   issue)  # fmt: skip

    def _record(
        self, calls: Calls, operator: _Operator, handle: Any, value: Any, issue: Callable[[], Any]
    ) -> Any:
        key = id(handle), operator.operation
        operation = self._operations.get(key)
        if operation is None or operation.group.handle() is not handle:
            operation = calls.groups.operation(handle, operator.operation)
            self._operations[key] = operation
        nbytes, meta = operation.measure(value, calls.recorder.intern)
        if operator.per_rank:
            nbytes *= operation.group.size
        if calls.capturing():
            return calls.capture(operation, handle, value, nbytes, issue)
        before = sequence_of(handle) if operation.numbers is None else None
        begin_ns = time.perf_counter_ns()
        ticket = calls.recorder.begin(meta, operation.next_number(), nbytes)
        try:
            result = calls.recorded(issue)
        except BaseException as error:
            calls.refused(operation, ticket, error)
            raise
        calls.moved(operation, handle, before)
        self._keep(result, calls.recorder, ticket, begin_ns)
        return result

    def _keep(self, results: Any, recorder: Recorder, ticket: int, begin_ns: int) -> None:
        if len(self._results) > _SWEEP_AT:
            self._sweep()
        weak = _kernels.weak
        storages = [weak(tensor.untyped_storage()) for tensor in _tensors(results)]
        keys = tuple(storage.cdata for storage in storages)
        for key, storage in zip(keys, storages, strict=True):
            earlier = self._results.get(key)
            self._results[key] = _Result(storage, recorder, ticket, begin_ns, keys)
            if earlier is not None and earlier.ticket != ticket:
                self._close(earlier, UNWAITED)

    def awaited(self, tensor: Any, wait: Callable[[], Any]) -> Callable[[], Any]:
        """`wait`, which ends the operation that `tensor` is a result of."""
        if not self._results:
            return wait
        found = self._results.pop(tensor.untyped_storage()._cdata, None)
        return wait if found is None else partial(self._end, found, wait)

    def _end(self, found: _Result, wait: Callable[[], Any]) -> Any:
        hidden = time.perf_counter_ns() - found.begin_ns
        try:
            result = wait()
        except BaseException as error:
            found.recorder.fail(found.ticket, error)
            raise
        self._close(found, OK | hidden << 8 if hidden > AT_ONCE_NS else OK)
        return result

    def _close(self, result: _Result, aux: int) -> None:
        """One operation may have several results: the first that is waited for ends it."""
        for key in result.keys:
            other = self._results.get(key)
            if other is not None and other.ticket == result.ticket:
                del self._results[key]
        result.recorder.end(result.ticket, aux)

    def _sweep(self, *, everything: bool = False) -> None:
        """End what can no longer be waited for."""
        for key, result in list(self._results.items()):
            if key in self._results and (everything or result.storage.expired()):
                self._close(result, UNWAITED)


class _Kernels:
    """The one set of kernels of this process: an operator has one kernel for a key."""

    def __init__(self) -> None:
        self._listeners: tuple[FunctionalCollectives, ...] = ()
        self._library: Any = None
        self._lock = threading.Lock()
        self.weak: Any = None  # StorageWeakRef

    def listen(self, listener: FunctionalCollectives) -> None:
        with self._lock:
            if not self._listeners:
                self._register()
            self._listeners += (listener,)

    def leave(self, listener: FunctionalCollectives) -> None:
        with self._lock:
            self._listeners = tuple(one for one in self._listeners if one is not listener)
            library = self._library
            if not self._listeners and library is not None:
                self._library = None
                library._destroy()

    def _register(self) -> None:
        import torch
        from torch.multiprocessing.reductions import StorageWeakRef

        self.weak = StorageWeakRef
        make: Any = torch.library.Library
        self._library = make("_c10d_functional", "IMPL")
        kernels = {"wait_tensor": self._wait_tensor()}
        for name, operator in _OPERATORS.items():
            if hasattr(torch.ops._c10d_functional, name):  # all in C++, but torch versions differ
                kernels[name] = self._collective(name, operator)
        for name, kernel in kernels.items():
            self._library.impl(name, kernel, "BackendSelect", with_keyset=True)

    def _collective(self, name: str, operator: _Operator) -> Callable[..., Any]:
        import torch

        packet = getattr(torch.ops._c10d_functional, name).default
        at_group = [argument.name for argument in packet._schema.arguments].index("group_name")
        redispatch, key = packet.redispatch, torch._C.DispatchKey.BackendSelect
        is_traced, group_of = _tracing(), _groups()

        def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            issue: Callable[[], Any] = partial(redispatch, keyset.remove(key), *args, **kwargs)
            if not is_traced(args[0]):
                handle = group_of(args[at_group] if len(args) > at_group else kwargs["group_name"])
                for listener in self._listeners if handle is not None else ():
                    issue = listener.around(operator, handle, args[0], issue)
            return issue()

        return kernel

    def _wait_tensor(self) -> Callable[..., Any]:
        import torch

        redispatch = torch.ops._c10d_functional.wait_tensor.default.redispatch
        key, is_traced = torch._C.DispatchKey.BackendSelect, _tracing()

        def kernel(keyset: Any, tensor: Any) -> Any:
            wait: Callable[[], Any] = partial(redispatch, keyset.remove(key), tensor)
            if not is_traced(tensor):
                for listener in self._listeners:
                    wait = listener.awaited(tensor, wait)
            return wait()

        return kernel


_kernels = _Kernels()


def _groups() -> Callable[[Any], Any]:
    """Finds the process group that an operator was told of; None if there is no such group."""
    from torch.distributed import ProcessGroup, distributed_c10d

    resolve: Any = getattr(distributed_c10d, "_resolve_process_group")  # noqa: B009 (not exported)

    def group_of(name: Any) -> Any:
        if isinstance(name, ProcessGroup):
            return name
        if not isinstance(name, str):
            return ProcessGroup.unbox(name)
        try:
            return resolve(name)
        except RuntimeError:
            return None  # torch says so better

    return group_of


def _tracing() -> Callable[[Any], bool]:
    """Tells whether nothing is sent, only shapes are found out."""
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensor

    def is_traced(value: Any) -> bool:
        if type(value) is Tensor:
            return bool(value.is_meta)
        if isinstance(value, (list, tuple)):
            return bool(value) and is_traced(value[0])
        return isinstance(value, FakeTensor) or bool(value.is_meta)

    return is_traced


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    else:
        yield value
