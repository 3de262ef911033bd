"""Sees every collective of this process, whoever issued it, and writes it to a recorder.

Owns where torch is patched; `instrument` and `uninstrument` are neighbours and undo each other
exactly. Knows nothing of files, metrics or spans. This is the one seam to torch: should
torch.distributed offer hooks of its own, they take the place of `_install`.

    methods of ProcessGroup and Backend    intercept_calls, operations by `_METHODS`
    Work.wait and its kin, Future.wait     intercept_works
    operators of _c10d_functional          functional: DTensor, torch.compile
    functions in C++ that DDP calls        intercept_functions

Recorded: operation (torch.distributed's name for it), group, group size, its number among the
group's collectives (the same on all ranks, which call them in the same order; send and recv are
counted apart), dtype, begin, end, how long after its begin it was waited for, error and payload
bytes. The payload follows nccl-tests, so that all ranks of an operation agree: the tensor for
all_reduce, broadcast, reduce, send and recv; the gathered whole (one rank's share times the group
size) for all_gather and gather; the unscattered whole for reduce_scatter and scatter; all that a
rank sends for all_to_all; 0 for barriers.

An operation begins when its method is called and ends when `Work.wait` returns, or at once where
the method returns no Work. With NCCL `wait` only orders streams, so these are host times.

NOT SEEN (all of it but the last two shows as a difference, see `sample_coverage`)
    all_reduces of DDP's C++ reducer           seen with `ddp_hook.hook_ddp()`, else not
    the bitmap that DDP sums with              one all_reduce a backward, in C++
      find_unused_parameters=True
    torch.ops.c10d.* and legacy c10d_functional.* called directly, C++ extensions that call a
      process group, AOTInductor's C++ wrapper
    functional batch_p2p_ops                   its sends and recvs are issued in C++
    Python subclasses of ProcessGroup, Backend or Work that override a method without calling
      super(): what they override (a Work of their own ends when it is collected)
    what debug level DETAIL of torch.distributed adds by itself
    symmetric memory and collectives inside custom kernels, and what bypasses torch.distributed
      altogether (NVSHMEM, MPI, a library's own NCCL): record it with `Session.record`, or, where
      it does the work of a process group, with `Session.collectives`
    device times of functional collectives

torch is imported by `instrument`, not by this module: the sidecar shares this package and
must start fast.
"""

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from .functional import FunctionalCollectives
from .intercept_calls import NONE, Calls, Method
from .intercept_functions import patch_functions
from .intercept_groups import Coverage, Recorder
from .other_ways import OtherWays

__all__ = ["CollectiveInstrumentor", "Coverage", "Recorder"]

_METHODS = {
    "allreduce": Method("all_reduce", 0, False),
    "allreduce_coalesced": Method("all_reduce_coalesced", 0, False),
    "broadcast": Method("broadcast", 0, False),
    "reduce": Method("reduce", 0, False),
    "allgather": Method("all_gather", 1, True),
    "_allgather_base": Method("all_gather_into_tensor", 1, True),
    "all_gather_single": Method("all_gather_into_tensor", 1, True),
    "allgather_coalesced": Method("all_gather_coalesced", 1, True),
    "allgather_into_tensor_coalesced": Method("all_gather_into_tensor_coalesced", 1, True),
    "all_gather_single_coalesced": Method("all_gather_into_tensor_coalesced", 1, True),
    "gather": Method("gather", 1, True),
    "scatter": Method("scatter", 0, True),
    "reduce_scatter": Method("reduce_scatter", 0, True),
    "_reduce_scatter_base": Method("reduce_scatter_tensor", 0, True),
    "reduce_scatter_single": Method("reduce_scatter_tensor", 0, True),
    "reduce_scatter_tensor_coalesced": Method("reduce_scatter_tensor_coalesced", 0, True),
    "reduce_scatter_single_coalesced": Method("reduce_scatter_tensor_coalesced", 0, True),
    "alltoall": Method("all_to_all", 1, False),
    "alltoall_base": Method("all_to_all_single", 1, False),
    "all_to_all_single": Method("all_to_all_single", 1, False),
    "send": Method("send", 0, False),
    "recv": Method("recv", 0, False),
    "recv_anysource": Method("recv", 0, False),
    "barrier": Method("barrier", NONE, False),
    "monitored_barrier": Method("monitored_barrier", NONE, False),
}
_WAITS = ("wait", "synchronize", "block_current_stream")

RecorderOrFactory = Recorder | Callable[[], Recorder | None]


class CollectiveInstrumentor:
    """Patches torch.distributed for one recorder.

    Several may be active in one process; each records everything. If another patch lies on top
    when one is removed, that patch stays and this one becomes a pass-through beneath it.
    """

    def __init__(self) -> None:
        self._patches: list[tuple[Any, str, Any, Any]] = []
        self._calls: Calls | None = None
        self._functional: FunctionalCollectives | None = None
        self._factory: Callable[[], Recorder | None] | None = None
        self._asked: weakref.WeakSet[Any] = weakref.WeakSet()
        self._asking = threading.local()
        self._lock = threading.RLock()
        self._next_sample_s = 0.0
        self._options: tuple[Any, Any] = None, None

    @property
    def active(self) -> bool:
        return bool(self._patches)

    def instrument(
        self, recorder: RecorderOrFactory, device_timer: Any = None, capture_log: Any = None
    ) -> None:
        """Record to `recorder` from now on. ValueError if this instrumentor already does.

        `recorder` may be a function without arguments that gives it: called at the first collective
        of each group, until it returns one; None: not yet, this collective is not recorded.
        `device_timer`: a `device_time.DeviceTimer`; `capture_log`: a `cuda_graphs.CaptureLog`.
        """
        if self._patches:
            raise ValueError("this CollectiveInstrumentor is already active: uninstrument() first")
        self._options = device_timer, capture_log
        if hasattr(recorder, "begin"):
            self._install(recorder)
        else:
            self._factory = recorder
            self._install_asking()
        self._functional = FunctionalCollectives(self._calls_for)
        self._functional.install()

    def uninstrument(self) -> None:
        """Put back what `instrument` found, entry by entry."""
        if self._functional is not None:
            self._functional.remove()
            self._functional = None
        self.sample_coverage()
        with self._lock:
            self._factory = None
            self._remove_patches()
            if self._calls is not None:
                self._calls.close()
                self._calls = None

    def other_ways(self) -> OtherWays | None:
        """For collectives of a group that its backend does not carry; None while not active."""
        return None if self._calls is None else OtherWays(self._calls)

    def sample_coverage(self, at_most_every_s: float = 0.0) -> None:
        """Compare each group's sequence number with what was recorded, and publish the difference.

        Does nothing if the last time was less than `at_most_every_s` ago. Exact for Gloo. Backends
        that number a batch of operations once can hide unrecorded ones behind recorded ones.
        """
        calls = self._calls
        if calls is None:
            return
        calls.works.flush()
        if at_most_every_s:
            now_s = time.monotonic()
            if now_s < self._next_sample_s:
                return
            self._next_sample_s = now_s + at_most_every_s
        calls.groups.publish()

    def coverage(self) -> list[Coverage]:
        """By group: what it has issued since `instrument`, and how much of it was recorded."""
        return [] if self._calls is None else self._calls.groups.coverage()

    # ---- the patches

    def _install(self, recorder: Any) -> None:
        from torch._C import Future
        from torch._C._distributed_c10d import Backend, Work
        from torch.distributed import ProcessGroup

        calls = self._calls = Calls(recorder, *self._options)
        for owner in (ProcessGroup, Backend):
            for name, method in _METHODS.items():
                if name in owner.__dict__:  # torch versions differ
                    original = getattr(owner, name)
                    self._patch(owner, name, calls.method(original, method, owner is Backend))
            for name, make in (
                ("_start_coalescing", calls.start_coalescing),
                ("_end_coalescing", calls.end_coalescing),
            ):
                if name in owner.__dict__:
                    self._patch(owner, name, make(getattr(owner, name)))
        works = calls.works
        for name in _WAITS:
            if name in Work.__dict__:
                original = getattr(Work, name)
                if name == "wait" and calls.memory is not None:
                    self._patch(Work, name, works.wait_in(calls.memory, original))
                else:
                    self._patch(Work, name, works.wait(original))
        self._patch(Work, "is_completed", works.is_completed(Work.is_completed))
        self._patch(Work, "get_future", works.get_future(Work.get_future))
        self._patch(Future, "wait", works.wait_for_future(Future.wait))
        patch_functions(calls, self._patch)

    def _patch(self, owner: Any, name: str, replacement: Any) -> None:
        entry = owner.__dict__[name]  # getattr would lose the binding of self
        replacement.__name__ = name
        replacement.__qualname__ = f"{getattr(owner, '__qualname__', owner.__name__)}.{name}"
        replacement.__doc__ = entry.__doc__
        setattr(owner, name, replacement)
        self._patches.append((owner, name, entry, replacement))

    def _remove_patches(self) -> None:
        for owner, name, entry, replacement in reversed(self._patches):
            if owner.__dict__.get(name) is replacement:
                setattr(owner, name, entry)
        self._patches.clear()

    # ---- a recorder that is not there yet

    def _install_asking(self) -> None:
        """Stand-ins that ask for the recorder, and are replaced once there is one."""
        from torch._C._distributed_c10d import Backend
        from torch.distributed import ProcessGroup

        for owner in (ProcessGroup, Backend):
            for name in _METHODS:
                if name in owner.__dict__:
                    self._patch(owner, name, self._asking_call(owner, name, getattr(owner, name)))

    def _asking_call(self, owner: Any, name: str, original: Callable[..., Any]) -> Any:
        def call(handle: Any, *args: Any, **kwargs: Any) -> Any:
            if self._factory is not None and self._calls_for(handle) is not None:
                return getattr(owner, name)(handle, *args, **kwargs)
            return original(handle, *args, **kwargs)

        return call

    def _calls_for(self, handle: Any) -> Calls | None:
        """What records the collectives of a group; asks for it at the group's first one."""
        if self._calls is not None or self._factory is None:
            return self._calls
        if handle in self._asked or getattr(self._asking, "now", False):
            return None
        with self._lock:
            if self._calls is not None or self._factory is None:
                return self._calls
            self._asking.now = True
            try:
                recorder = self._factory()
            finally:
                self._asking.now = False
            if recorder is None:
                self._asked.add(handle)
                return None
            self._factory = None
            self._remove_patches()
            self._install(recorder)
            return self._calls
