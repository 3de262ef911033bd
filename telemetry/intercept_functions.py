"""What DistributedDataParallel and its kin issue from C++: found by the functions that do so.

Owns the patches of the few functions of torch.distributed, written in C++ and called from Python,
that issue collectives past every method of ProcessGroup. How many each issues (it depends on sizes)
the group's sequence number tells; together they are one record. DDP's reducer, which issues its
all_reduces while autograd runs, is none of them: see `ddp_hook`.

    torch.distributed._broadcast_coalesced               buffers and parameters of a module
    torch.distributed._verify_params_across_processes    as DDP is made
    Reducer._rebuild_buckets                             before DDP's second iteration
"""

from collections.abc import Callable
from typing import Any

from .intercept_calls import Calls

Patch = Callable[[Any, str, Any], None]


def patch_functions(calls: Calls, patch: Patch) -> None:
    """Record them to `calls`; `patch(owner, name, replacement)` puts a replacement in place."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    for name, operation, of in (
        ("_broadcast_coalesced", "broadcast_coalesced", _group_and_tensors),
        ("_verify_params_across_processes", "verify_params", _group_alone),
    ):
        for owner in (dist, distributed_c10d):
            if name in owner.__dict__:  # torch versions differ
                patch(owner, name, calls.several(owner.__dict__[name], operation, of))
    reducer = getattr(dist, "Reducer", None)
    if reducer is not None and "_rebuild_buckets" in reducer.__dict__:
        rebuild = calls.several_somewhere(reducer._rebuild_buckets, "rebuild_buckets")
        patch(reducer, "_rebuild_buckets", rebuild)


def _group_and_tensors(process_group: Any, tensors: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    return process_group, tensors


def _group_alone(process_group: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    return process_group, ()
