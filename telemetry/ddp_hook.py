"""Makes the all_reduces of DistributedDataParallel visible: a communication hook in Python.

Owns the patches of DistributedDataParallel. Its C++ reducer calls the process group past every
method that can be patched, unless a hook does the reducing. `hook_ddp()` gives each module that is
made from then on a hook that does what the reducer does by itself:

    reducer, no hook     bucket = grad * (1 / world size)    all_reduce(bucket)
    this hook            bucket = grad;  bucket *= 1 / world size;  all_reduce(bucket)

Gradients are the same bit for bit. The price is one more pass over each bucket and one call into
Python per bucket. Two exceptions. With gradient_as_bucket_view=True the reducer divides instead of
multiplying where a gradient already is its bucket's: for world sizes that are no power of two the
last bit may differ. And in `join(divide_by_initial_world_size=False)` the reducer counts who is
left; this hook does not.

A hook of the program's own, registered later, takes this one's place as if it had never been there.
Modules made before, or by unpickling, keep their reducer; its calls show as unrecorded.
"""

import threading
import weakref
from typing import Any

__all__ = ["hook_ddp", "unhook_ddp"]


class _Hook:
    """What stands in for one module's reducer; the program's own hook, if it registers one."""

    __slots__ = ("group", "own", "state")

    def __init__(self, group: Any) -> None:
        self.group = group
        self.own: Any = None
        self.state: Any = None


def _reduce(hook: _Hook, bucket: Any) -> Any:
    if hook.own is not None:
        return hook.own(hook.state, bucket)
    tensor, size = bucket.buffer(), hook.group.size()
    if tensor.is_sparse:
        tensor.div_(size)
    else:
        tensor.mul_(1.0 / size)
    return hook.group.allreduce([tensor]).get_future().then(_first_value)


def _first_value(future: Any) -> Any:
    return future.value()[0]


class _Patches:
    """The patches of the class, put in place once however often they are asked for."""

    def __init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()
        self._patches: list[tuple[str, Any, Any]] = []
        self._class: Any = None
        self._hooks: weakref.WeakKeyDictionary[Any, _Hook] = weakref.WeakKeyDictionary()

    def add(self) -> None:
        with self._lock:
            self._count += 1
            if self._count > 1:
                return
            from torch.nn.parallel import DistributedDataParallel

            self._class = DistributedDataParallel
            for name, make in (
                ("__init__", self._init),
                ("register_comm_hook", self._register),
                ("_register_builtin_comm_hook", self._register_builtin),
            ):
                entry = self._class.__dict__.get(name)
                if entry is not None:  # torch versions differ
                    replacement = make(entry)
                    replacement.__name__, replacement.__doc__ = name, entry.__doc__
                    replacement.__wrapped__ = entry
                    setattr(self._class, name, replacement)
                    self._patches.append((name, entry, replacement))

    def remove(self) -> None:
        with self._lock:
            self._count = max(0, self._count - 1)
            if self._count:
                return
            for name, entry, replacement in reversed(self._patches):
                if self._class.__dict__.get(name) is replacement:
                    setattr(self._class, name, entry)
            self._patches.clear()

    def _init(self, original: Any) -> Any:
        def __init__(module: Any, *args: Any, **kwargs: Any) -> None:
            original(module, *args, **kwargs)
            in_python = getattr(module, "_use_python_reducer", False)
            if self._count and not module._comm_hooks and not in_python:
                from torch._C import _distributed_c10d

                hook = self._hooks[module] = _Hook(module.process_group)
                _distributed_c10d._register_comm_hook(module.reducer, hook, _reduce)

        return __init__

    def _register(self, original: Any) -> Any:
        def register_comm_hook(module: Any, state: Any, hook: Any) -> None:
            ours = self._hooks.get(module)
            if ours is None or ours.own is not None:
                original(module, state, hook)  # a second hook is refused there
                return
            module._check_comm_hook(hook)
            module.logger._set_comm_hook_name(hook.__qualname__)
            module._comm_hooks.append((hook, state))
            ours.own, ours.state = hook, state

        return register_comm_hook

    def _register_builtin(self, original: Any) -> Any:
        def _register_builtin_comm_hook(module: Any, kind: Any) -> None:
            ours = self._hooks.get(module)
            if ours is None or ours.own is not None:
                original(module, kind)
                return
            from torch._C._distributed_c10d import BuiltinCommHookType
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            ours.own, ours.state = (
                {
                    BuiltinCommHookType.ALLREDUCE: default_hooks.allreduce_hook,
                    BuiltinCommHookType.FP16_COMPRESS: default_hooks.fp16_compress_hook,
                }[kind],
                module.process_group,
            )
            module.logger._set_comm_hook_name(str(kind))

        return _register_builtin_comm_hook


_patches = _Patches()


def hook_ddp() -> None:
    """From now on every new DistributedDataParallel reduces by a hook that can be seen."""
    _patches.add()


def unhook_ddp() -> None:
    """Undo one `hook_ddp`; after as many, the class is as it was. Modules keep their hooks."""
    _patches.remove()
