"""Who came last to a collective, and how long the others waited: ranks joined.

Owns the meeting of records: those with one (group, sequence) are one collective, and it is
whole when as many are there as the group has ranks. wait = last begin - own begin;
transfer = own end - last begin, at least 0. Clocks of one host agree, those of two do not: only
collectives whose ranks are all on this node are joined; the rest is counted, with the reason.
Knows neither series nor labels beyond the numbers it is given.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .labels import name_at
from .ring import (
    BEGIN,
    COLLECTIVE,
    END,
    META,
    SEQUENCE,
    is_point_to_point,
    meta_group,
    meta_name,
)
from .ring_reader import Rows

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

UNJOINED = ("other_nodes", "lost", "desync")  # why records were not joined
_SEQUENCE_BITS = 48  # of a key; above them the number of the group
_MAX_SPARSE = 8  # places in the table per record
_PATIENCE_NS = 60 * 10**9  # for the records of other ranks
# After so long a group that some local ranks have never called has its other ranks elsewhere.
_ACQUAINTANCE_NS = 10 * 10**9
_MAX_PENDING = 1 << 16  # records that wait for those of other ranks: 4 MiB


class Arrivals(NamedTuple):
    """Of each record of one rank; -1 where it is not known."""

    wait_ns: Integers
    is_last: Booleans
    transfer_ns: Integers


class _Meetings(NamedTuple):
    """Of each record, in the order they were given."""

    met: Booleans  # whether its collective is whole and of one operation
    disagree: Booleans  # whole, but of several operations
    last_begin: Integers
    is_last: Booleans  # one of each whole collective


def _meet(groups: Integers, sequences: Integers, kinds: Integers, begins: Integers) -> _Meetings:
    """`kinds`: what was called, the size of the group in its low 16 bits.

    Without sorting: collectives are numbered one after the other, so each has a place of its own
    in a table that is hardly larger than they are many.
    """
    meeting, number = _places(groups, sequences)
    last_begin = np.full(number, np.iinfo(np.int64).min)
    np.maximum.at(last_begin, meeting, begins)
    kind = np.zeros(number, np.int64)
    kind[meeting] = kinds
    whole = np.bincount(meeting, minlength=number) == kind & 0xFFFF
    agree = np.ones(number, np.bool_)
    agree[meeting[kind[meeting] != kinds]] = False
    last_begin = last_begin[meeting]
    met = (whole & agree)[meeting]
    # Two that began in the same nanosecond were not both last: one of them stays.
    candidates = np.flatnonzero(met & (begins == last_begin))
    chosen = np.full(number, -1)
    chosen[meeting[candidates]] = candidates
    is_last = np.zeros(len(begins), np.bool_)
    is_last[chosen[chosen >= 0]] = True
    return _Meetings(met, (whole & ~agree)[meeting], last_begin, is_last)


def _places(groups: Integers, sequences: Integers) -> tuple[Integers, int]:
    """A number for each collective, and how many there can be."""
    first = np.full(int(groups.max()) + 1, np.iinfo(np.int64).max)
    last = np.full(len(first), -1)
    np.minimum.at(first, groups, sequences)
    np.maximum.at(last, groups, sequences)
    widths = np.where(last >= 0, last - first + 1, 0)
    number = int(widths.sum())
    if number > _MAX_SPARSE * len(groups):  # records that wait since long ago
        kept, places = np.unique(groups << _SEQUENCE_BITS | sequences, return_inverse=True)
        return places, len(kept)
    return (np.cumsum(widths) - widths - first)[groups] + sequences, number


def arrivals_of(
    rows_by_rank: Mapping[int, Rows], names_by_rank: Mapping[int, Sequence[str]]
) -> dict[int, Arrivals]:
    """Waits of the collectives among these records, for the ranks that are there.

    Arrays aligned with the rows. Unfinished records count as arrivals and have no transfer.
    """
    rows = (
        np.concatenate(list(rows_by_rank.values())) if rows_by_rank else np.empty((0, 8), np.int64)
    )
    wait = np.full(len(rows), -1, np.int64)
    transfer = wait.copy()
    is_last = np.zeros(len(rows), np.bool_)
    lengths = [len(part) for part in rows_by_rank.values()]
    place = np.repeat(np.arange(len(lengths)), lengths)
    meta = rows[:, META]
    # The place of the rank takes that of the dtype, so that a kind of call is one number.
    kinds, kind_of = np.unique(meta & ~(0xFFF << 28) | place << 28, return_inverse=True)
    groups, ops, joinable = _identify(kinds, list(rows_by_rank), names_by_rank)
    where = np.flatnonzero(joinable[kind_of])
    if len(where):
        kind_of = kind_of[where]
        begins, ends = rows[where, BEGIN], rows[where, END]
        kinds = ops[kind_of] << 16 | meta[where] >> 40 & 0xFFFF
        meetings = _meet(groups[kind_of], rows[where, SEQUENCE], kinds, begins)
        met = meetings.met
        wait[where] = np.where(met, meetings.last_begin - begins, -1)
        taken = np.maximum(ends - meetings.last_begin, 0)
        transfer[where] = np.where(met & (ends != 0), taken, -1)
        is_last[where] = meetings.is_last
    stops = np.cumsum(lengths).tolist()
    parts = [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    return {
        rank: Arrivals(wait[part], is_last[part], transfer[part])
        for rank, part in zip(rows_by_rank, parts, strict=True)
    }


def _identify(
    kinds: Integers, ranks: Sequence[int], names_by_rank: Mapping[int, Sequence[str]]
) -> tuple[Integers, Integers, Booleans]:
    """Per kind of call: numbers of its group and its operation, equal across ranks; joinable."""
    groups: dict[str, int] = {}
    ops: dict[str, int] = {}
    found = []
    for kind in kinds.tolist():
        if kind & 0xF != COLLECTIVE:
            found.append((0, 0, False))
            continue
        names = names_by_rank[ranks[kind >> 28 & 0xFFF]]
        op = name_at(names, meta_name(kind))
        group = groups.setdefault(name_at(names, meta_group(kind)), len(groups))
        found.append((group, ops.setdefault(op, len(ops)), not is_point_to_point(op)))
    columns = np.array(found, np.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2].astype(np.bool_)


@dataclass(slots=True)
class Arriving:
    """Finished collectives as columns, int64 [n]."""

    group: Integers  # its number, the same for all ranks
    sequence: Integers
    kind: Integers  # number of the operation << 16 | size of the group
    begin_ns: Integers
    end_ns: Integers
    series: Integers  # handed through, as the next
    status: Integers

    def __len__(self) -> int:
        return len(self.group)

    def take(self, where: Integers | Booleans) -> "Arriving":
        return Arriving(*(getattr(self, one.name)[where] for one in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence["Arriving"]) -> "Arriving":
        return cls(
            *(np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(cls))
        )


class Joined(NamedTuple):
    """Records whose collective has become whole; int64 [n] but the last, bool [n]."""

    series: Integers
    wait_ns: Integers
    transfer_ns: Integers
    status: Integers
    is_last: Booleans


class ArrivalJoiner:
    """Joins records as they come, in any order; remembers a bounded number of them.

    `local_ranks`: how many ranks this node has; None: not known.
    `unjoined` counts the records that were given up, by reason: "other_nodes" (the group has
    ranks elsewhere), "lost" (another rank's record never came), "desync" (the ranks called
    different operations).
    """

    def __init__(self, local_ranks: int | None = None) -> None:
        self.unjoined: Counter[str] = Counter()
        self._local_ranks = local_ranks
        self._members: list[set[int]] = []  # by group: local ranks that have called it
        self._first_ns: list[int] = []  # by group: end of its first record
        self._ranks: set[int] = set()
        self._pending: Arriving | None = None
        self._newest_ns = 0

    @property
    def pending(self) -> int:
        return len(self._pending) if self._pending is not None else 0

    def member(self, group: int, rank: int) -> None:
        """A local rank calls this group; say so before its first record is joined."""
        while len(self._members) <= group:
            self._members.append(set())
            self._first_ns.append(0)
        self._members[group].add(rank)
        self._ranks.add(rank)

    def join(self, arriving: Arriving) -> Joined | None:
        """Take in records and hand out those whose collective is whole now."""
        if self._local_ranks is not None:
            elsewhere = arriving.kind & 0xFFFF > self._local_ranks
            if elsewhere.any():
                self._give_up("other_nodes", int(np.count_nonzero(elsewhere)))
                arriving = arriving.take(~elsewhere)
        if self._pending is not None:
            arriving = Arriving.concatenate([self._pending, arriving])
        if not len(arriving):
            return None
        self._newest_ns = max(self._newest_ns, int(arriving.end_ns.max()))
        meetings = _meet(arriving.group, arriving.sequence, arriving.kind, arriving.begin_ns)
        self._pending = None
        met = slice(None) if meetings.met.all() else np.flatnonzero(meetings.met)
        if not isinstance(met, slice):
            self._give_up("desync", int(np.count_nonzero(meetings.disagree)))
            left = np.flatnonzero(~(meetings.met | meetings.disagree))
            self._pending = self._patiently(arriving.take(left)) if len(left) else None
        last_begin = meetings.last_begin[met]
        return Joined(
            arriving.series[met],
            last_begin - arriving.begin_ns[met],
            np.maximum(arriving.end_ns[met] - last_begin, 0),
            arriving.status[met],
            meetings.is_last[met],
        )

    def _patiently(self, waiting: Arriving) -> Arriving | None:
        """Those of the waiting records that still have a chance."""
        groups = np.flatnonzero(np.bincount(waiting.group)).tolist()
        foreign = np.zeros(len(self._members), np.bool_)
        all_known = self._local_ranks is not None and len(self._ranks) >= self._local_ranks
        for group in groups:
            of_group = waiting.group == group
            if not self._first_ns[group]:
                self._first_ns[group] = int(waiting.end_ns[of_group].min())
            acquainted = self._newest_ns - self._first_ns[group] > _ACQUAINTANCE_NS
            some_missing = len(self._members[group]) < int(waiting.kind[of_group].max() & 0xFFFF)
            foreign[group] = acquainted and some_missing and all_known
        elsewhere = foreign[waiting.group]
        lost = ~elsewhere & (waiting.end_ns < self._newest_ns - _PATIENCE_NS)
        keep = np.flatnonzero(~elsewhere & ~lost)
        if len(keep) > _MAX_PENDING:
            oldest_first = keep[np.argsort(waiting.end_ns[keep])]
            keep = oldest_first[-_MAX_PENDING:]
        abroad = int(np.count_nonzero(elsewhere))
        self._give_up("other_nodes", abroad)
        self._give_up("lost", len(waiting) - len(keep) - abroad)
        return waiting.take(keep) if len(keep) else None

    def _give_up(self, reason: str, records: int) -> None:
        if records:
            self.unjoined[reason] += records
