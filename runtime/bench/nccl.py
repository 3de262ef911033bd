"""Whether ranks can meet over NCCL on this machine, and by which NCCL.

Owns the question, and the answer as a line for people. Several ranks on one GPU: NCCL 2.30 and
later allow it where NCCL_MULTI_RANK_GPU_ENABLE=1; PyTorch may bring an older one, and a newer one
be preloaded (LD_PRELOAD).
"""

import ctypes
import os

import torch
import torch.distributed as dist

_SHARES = (2, 30)  # the first that puts several ranks on a GPU


def nccl_refusal(ranks: int) -> str | None:
    """Why so many ranks cannot meet over NCCL on this machine; None if they can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    count = torch.cuda.device_count()
    if count >= ranks:
        return None
    shares = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    found = nccl_version()
    if shares and found >= _SHARES:
        return None
    version = ".".join(map(str, found))
    return (
        f"{ranks} ranks of NCCL on {count} GPU need NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL 2.30 or "
        f"later: the variable is {'set' if shares else 'not set'}, NCCL is {version}"
    )


def nccl_version() -> tuple[int, ...]:
    """Of the library that is loaded: torch only knows which one it was built with. () for none."""
    if not dist.is_nccl_available():
        return ()
    try:
        ask = ctypes.CDLL(None).ncclGetVersion
    except AttributeError:
        built: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        return built[:3]
    code = ctypes.c_int()
    if ask(ctypes.byref(code)) != 0:
        return ()
    return code.value // 10_000, code.value // 100 % 100, code.value % 100
