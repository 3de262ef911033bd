"""Memory for the pools of a KV cache: zeroed, present from the start, page-locked for a GPU.

Owns where pools lie. Knows nothing of blocks; how many fit is decided in `memory.py`.
"""

import mmap
import warnings
from contextlib import suppress

import torch
from torch import Tensor

from .memory import available_host_bytes

_LEAST_HUGE_BYTES = 4 << 20  # below, pages of 2 MiB would be mostly padding


def check_room(*wanted: tuple[torch.device, int]) -> None:
    """Raise ValueError where what is wanted on one device is more than it has free, in bytes."""
    needs: dict[torch.device, int] = {}
    for device, size in wanted:
        needs[device] = needs.get(device, 0) + size
    for device, size in needs.items():
        cuda = device.type == "cuda"
        available = torch.cuda.mem_get_info(device)[0] if cuda else available_host_bytes()
        if size > available:
            raise ValueError(
                f"the KV cache needs {size:,} bytes of {device} memory; {available:,} are available"
            )


def zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, locked: bool = False
) -> Tensor:
    """A pool of zeros on `device`; `locked`: in host memory that a GPU can reach by itself.

    Zeros, not empty: a slot that was never written may be read under a mask, where a NaN would
    survive being multiplied by zero. Where memory cannot be locked, it is left unlocked with a
    RuntimeWarning.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    if locked and size:
        try:
            return torch.zeros(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            warnings.warn(
                f"cannot lock {size:,} bytes of host memory for "
                f"swapped blocks, swapping will be slower: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
    if size < _LEAST_HUGE_BYTES:
        return torch.zeros(shape, dtype=dtype)
    # Scattered blocks of 32 KiB move 8% faster from pages of 2 MiB, and are gathered faster too.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without huge pages: small ones do
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape).zero_()  # touched, all of it
