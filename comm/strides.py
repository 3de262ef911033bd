"""Whether a tensor's elements lie apart: what is written to must not overlap itself.

Owns the arithmetic of sizes and strides. Knows nothing of what is written.
"""

import torch
from torch import Tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a strided tensor share memory, as in one that was expanded.

    Exact. Takes memory only for strides that interleave, which none of torch's views but
    `as_strided` and `unfold` have.
    """
    steps = sorted((s, n) for s, n in zip(tensor.stride(), tensor.size(), strict=True) if n > 1)
    if tensor.numel() == 0:
        return False
    reach, interleaved = 0, False  # of the steps so far, from the first element to the last
    for stride, size in steps:
        if stride == 0:
            return True
        interleaved |= stride <= reach
        reach += stride * (size - 1)
    if not interleaved:
        return False
    if tensor.numel() > reach + 1:
        return True
    seen = torch.zeros(reach + 1, dtype=torch.bool)
    seen.as_strided(tensor.size(), tensor.stride()).fill_(True)
    return int(seen.count_nonzero()) < tensor.numel()


def refuse_overlap(tensor: Tensor) -> None:
    """Raise ValueError for a tensor that cannot be written to, since it overlaps itself."""
    if overlaps_itself(tensor):
        raise ValueError(
            f"a tensor of size {list(tensor.size())} and strides {list(tensor.stride())} overlaps "
            "itself: there is no place for the sum of each element; give a contiguous copy"
        )
