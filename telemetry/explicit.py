"""Communication that bypasses torch.distributed, told by whoever does it.

Owns its numbers and names in the ring: it counts like any collective of a group of its own.
"""

import itertools
import time
from collections.abc import Callable

from .ring import COLLECTIVE, RingWriter, is_point_to_point, pack_meta


class ExplicitCollectives:
    """Writes finished operations. Safe for several threads, but for one group in one of them."""

    def __init__(self, ring: RingWriter) -> None:
        self._ring = ring
        self._metas: dict[tuple[str, str, int, str], tuple[int, Callable[[], int]]] = {}
        self._numbers: dict[tuple[str, str], Callable[[], int]] = {}

    def record(
        self,
        op: str,
        begin_ns: int,
        end_ns: int | None = None,
        nbytes: int = 0,
        *,
        group: str = "own",
        group_size: int = 1,
        dtype: str = "uint8",
    ) -> None:
        key = op, group, group_size, dtype
        known = self._metas.get(key)
        if known is None:
            known = self._metas[key] = self._first(*key)
        meta, number = known
        end_ns = time.perf_counter_ns() if end_ns is None else end_ns
        self._ring.record(begin_ns, end_ns, meta, number(), nbytes, 0)

    def _first(
        self, op: str, group: str, group_size: int, dtype: str
    ) -> tuple[int, Callable[[], int]]:
        if group_size < 1:
            raise ValueError(f"group_size is {group_size}; it must be at least 1")
        intern = self._ring.intern
        entry = intern(f"{group}\texplicit {group}")
        meta = pack_meta(COLLECTIVE, intern(op), entry, intern(dtype), group_size)
        counted = group, op if is_point_to_point(op) else ""
        return meta, self._numbers.setdefault(counted, itertools.count(1).__next__)
