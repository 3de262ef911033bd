"""Takes what instrumentation has put into torch.distributed out again, and back, in no time.

Owns the snapshot of the classes before and after. With it, blocks with and without take turns in
one process, and nothing else of a session changes between them. Knows nothing of what was patched
by whom.
"""

from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Backend, Work

_CLASSES: tuple[Any, ...] = (dist.ProcessGroup, Backend, Work)


class Toggle:
    """Make it before the instrumentation, call `instrumented` after it."""

    def __init__(self) -> None:
        self._before = [dict(owner.__dict__) for owner in _CLASSES]
        self._changes: list[tuple[Any, str, Any, Any]] = []

    def instrumented(self) -> None:
        """RuntimeError if nothing has changed: there would be nothing to compare."""
        self._changes = [
            (owner, name, before[name], entry)
            for owner, before in zip(_CLASSES, self._before, strict=True)
            for name, entry in owner.__dict__.items()
            if name in before and before[name] is not entry
        ]
        if not self._changes:
            raise RuntimeError("the instrumentation has patched no class of torch.distributed")

    def switch(self, on: bool) -> None:
        for owner, name, before, after in self._changes:
            setattr(owner, name, after if on else before)
