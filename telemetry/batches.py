"""Records of several ranks on their way to being counted, thousands at a time.

Owns when there are enough, and how they are laid out: column by column, ranks one after the other,
collectives apart from the rest. Knows nothing of what the records mean beyond that.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .labels import Part
from .ring import COLLECTIVE, META, RECORD_WORDS
from .ring_reader import Rows

Integers = npt.NDArray[np.int64]

_BATCH = 32768  # records; 2 MiB


class Sorted(NamedTuple):
    """Some records of all ranks, and which of them are whose: `parts` are slices, in order."""

    rows: Rows  # each of its columns is contiguous
    parts: list[Part]


class Batch:
    """Collects until it is full. What `take` hands out is good until it is called again."""

    def __init__(self) -> None:
        self._waiting: list[Part] = []
        self._number = 0
        self._everything, self._collectives, self._others = _Room(), _Room(), _Room()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, rank: int, rows: Rows, names: Sequence[str]) -> None:
        self._waiting.append((rank, rows, names))
        self._number += len(rows)

    def full_before(self, rank: int) -> bool:
        """Whether to count before the next records of this rank come in.

        Between two rounds of the ranks, as long as that can be had: then there are few collectives
        of which some ranks' records are missing.
        """
        round_is_over = bool(self._waiting) and self._waiting[0][0] == rank
        return self._number >= (_BATCH if round_is_over else 2 * _BATCH)

    def take(self) -> tuple[Sorted, Sorted]:
        """What has come in: collectives, and the rest."""
        by_rank: dict[int, tuple[list[Rows], Sequence[str]]] = {}
        for rank, rows, names in self._waiting:
            by_rank.setdefault(rank, ([], names))[0].append(rows)
        pieces = [rows.T for parts, _ in by_rank.values() for rows in parts]
        columns = np.concatenate(pieces, axis=1, out=self._everything.of(self._number))
        self._waiting, self._number = [], 0
        stops = np.cumsum([sum(map(len, parts)) for parts, _ in by_rank.values()])
        chosen = columns[META] & 0xF == COLLECTIVE

        def split(where: Integers, room: "_Room") -> Sorted:
            # mode: without it numpy fills memory of its own first
            rows = np.take(columns, where, axis=1, out=room.of(len(where)), mode="clip").T
            ends = np.searchsorted(where, stops).tolist()
            cuts = zip([0, *ends], ends, by_rank.items(), strict=False)
            parts = [(rank, rows[a:b], names) for a, b, (rank, (_, names)) in cuts if a < b]
            return Sorted(rows, parts)

        return (
            split(np.flatnonzero(chosen), self._collectives),
            split(np.flatnonzero(~chosen), self._others),
        )


class _Room:
    """Memory for columns that is used again: fresh pages cost more than what is put into them."""

    def __init__(self) -> None:
        self._columns = np.empty((RECORD_WORDS, 0), np.int64)

    def of(self, number: int) -> Integers:
        """int64 [8, number], with anything in it."""
        if number > self._columns.shape[1]:
            self._columns = np.empty((RECORD_WORDS, number + number // 4), np.int64)
        return self._columns[:, :number]
