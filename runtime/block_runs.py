"""Pairs of blocks: brought to the host, checked, and merged into runs of neighbouring blocks.

Owns the meaning of a run. Knows nothing of memory: blocks are numbers here.

    pairs (source, destination)          runs (source, destination, length)
    (7, 2) (4, 9) (8, 3) (5, 0)    ->    (4, 9, 1) (5, 0, 1) (7, 2, 2)
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from .block_mover import Pairs

Run: TypeAlias = tuple[int, int, int]
Column: TypeAlias = Sequence[int]

_INTEGERS = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
_MOST = 2**63 - 1
_FEW_PAIRS = 64  # up to here loops are faster than numpy's calls, the more so from cold caches


def host_pairs(pairs: Any) -> Pairs:
    """Pairs as int64 `[n, 2]`, contiguous, in host memory; of what has that already, a view.

    `pairs` is a list of pairs, a numpy array or a torch tensor on any device. Raises ValueError
    where the shape or the kind of number is another, or a number is no int64.
    """
    if isinstance(pairs, torch.Tensor):
        if pairs.dtype not in _INTEGERS:
            raise _no_pairs(pairs.dtype, pairs.shape)
        pairs = (pairs if pairs.is_cpu else pairs.cpu()).numpy()
    elif not isinstance(pairs, np.ndarray):
        pairs = np.array(pairs) if len(pairs) else np.empty((0, 2), np.int64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise _no_pairs(pairs.dtype, pairs.shape)
    if pairs.dtype == np.uint64 and pairs.size and pairs.max() > _MOST:
        raise ValueError(f"block {pairs.max()} is above {_MOST}, the largest int64")
    return np.ascontiguousarray(pairs, dtype=np.int64)


def _no_pairs(dtype: object, shape: Sequence[int]) -> ValueError:
    return ValueError(f"pairs of blocks are {dtype} {list(shape)}; they must be integers [n, 2]")


def check_range(kind: str, pairs: Pairs, num_sources: int, num_destinations: int) -> None:
    """AssertionError, naming the first pair of `kind` that leaves a pool, and the pool's size."""
    if len(pairs) <= _FEW_PAIRS:
        for source, destination in pairs.tolist():
            if not (0 <= source < num_sources and 0 <= destination < num_destinations):
                break
        else:
            return
    else:
        # As unsigned numbers the negative ones are the largest: one look finds all that is wrong.
        source, destination = pairs.view(np.uint64).max(axis=0).tolist()
        if source < num_sources and destination < num_destinations:
            return
    for source, destination in pairs.tolist():
        for block, size, verb in (
            (source, num_sources, "read"),
            (destination, num_destinations, "fill"),
        ):
            if not 0 <= block < size:
                raise AssertionError(
                    f"{kind} ({source}, {destination}): block {block} of {size} to {verb}"
                )


def merge_runs(pairs: Pairs) -> list[Run]:
    """Runs `(source, destination, length)` that stand for `pairs`, by rising source.

    A run copies blocks `source, source + 1, ...` to `destination, destination + 1, ...`. Where no
    source is named twice there is no way with fewer runs.
    """
    return list(zip(*run_columns(pairs), strict=True))


def run_columns(pairs: Pairs, unit: int = 1) -> tuple[Column, Column, Column]:
    """Sources, destinations and lengths of `merge_runs`, each multiplied by `unit`.

    For thousands of runs this is fast where a list of tuples is not: the copying goes on evicting
    those from the caches.
    """
    return (_few if len(pairs) <= _FEW_PAIRS else _many)(pairs, unit)


def _few(pairs: Pairs, unit: int) -> tuple[Column, Column, Column]:
    sources: list[int] = []
    destinations: list[int] = []
    lengths: list[int] = []
    next_source = next_destination = -1
    for source, destination in sorted(pairs.tolist()):
        if source == next_source and destination == next_destination:
            lengths[-1] += unit
        else:
            sources.append(source * unit)
            destinations.append(destination * unit)
            lengths.append(unit)
        next_source, next_destination = source + 1, destination + 1
    return sources, destinations, lengths


def _many(pairs: Pairs, unit: int) -> tuple[Column, Column, Column]:
    # Source and destination side by side in one number: sorting takes one call, and so does
    # finding where both go up by one. Block tables are int32, so both fit.
    keys = np.sort(pairs[:, 0] << 32 | pairs[:, 1])
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] - keys[:-1] != (1 << 32) + 1)))
    lengths = np.diff(starts, append=len(keys))
    keys = keys[starts]
    sources, destinations = keys >> 32, keys & 0xFFFF_FFFF
    return (sources * unit).data, (destinations * unit).data, (lengths * unit).data
