"""The labels under which collectives are counted.

Owns the size classes, the keys of series and nccl-tests' bus factors. Counts nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .ring_reader import Rows

# Payloads by size, at most eight classes, powers of four: label and inclusive upper bound.
SIZE_CLASSES = ("1KiB", "4KiB", "16KiB", "64KiB", "256KiB", "1MiB", "4MiB", "inf")
_SIZE_BOUNDS = 1024 * 4 ** np.arange(7, dtype=np.int64)


Part = tuple[int, Rows, Sequence[str]]  # a rank, records of it, its names


class CollectiveKey(NamedTuple):
    op: str
    group: str
    size: str  # of SIZE_CLASSES
    rank: int


class GroupKey(NamedTuple):
    op: str
    group: str
    rank: int


def size_classes(nbytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The index in SIZE_CLASSES of each payload."""
    return np.searchsorted(_SIZE_BOUNDS, nbytes, side="left")


def bus_factor(op: str, group_size: int) -> float:
    """nccl-tests' factor from payload to bytes on the bus."""
    if group_size < 2 or op in ("barrier", "monitored_barrier"):
        return 0.0
    if op.startswith("all_reduce"):
        return 2 * (group_size - 1) / group_size
    if op.startswith(("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")):
        return (group_size - 1) / group_size
    return 1.0  # broadcast, reduce, send, recv


def group_label(entry: str) -> str:
    """The label of a group's name entry; its second half is unique in the cluster."""
    return entry.partition("\t")[0]


def name_at(names: Sequence[str], entry: int) -> str:
    """A name by its number; a torn record may hold one that nobody has."""
    return names[entry] if entry < len(names) else "(unknown)"
