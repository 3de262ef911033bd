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
    """Records ordered so that those of one collective stand together."""

    order: Integers  # of the records
    met: Booleans  # in this order: whether its collective is whole and of one operation
    disagree: Booleans  # in this order: whole, but of several operations
    last_begin: Integers  # in this order
    is_last: Booleans  # in this order: one of each collective


def _meet(keys: Integers, sizes: Integers, ops: Integers, begins: Integers) -> _Meetings:
    order = np.argsort(keys)
    keys, begins, ops = keys[order], begins[order], ops[order]
    edges = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    starts = np.concatenate([np.zeros(1, np.int64), edges])
    counts = np.diff(np.append(starts, len(keys)))
    whole = counts == sizes[order[starts]]
    agree = np.maximum.reduceat(ops, starts) == np.minimum.reduceat(ops, starts)
    latest = np.maximum.reduceat(begins, starts)
    meeting = np.repeat(np.arange(len(starts)), counts)
    met = (whole & agree)[meeting]
    last_begin = latest[meeting]
    candidates = np.flatnonzero(met & (begins == last_begin))
    # Two that began in the same nanosecond were not both last.
    first_of_meeting = np.ones(len(candidates), np.bool_)
    first_of_meeting[1:] = meeting[candidates[1:]] != meeting[candidates[:-1]]
    is_last = np.zeros(len(keys), np.bool_)
    is_last[candidates[first_of_meeting]] = True
    return _Meetings(order, met, (whole & ~agree)[meeting], last_begin, is_last)


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
        keys = groups[kind_of] << _SEQUENCE_BITS | rows[where, SEQUENCE]
        meetings = _meet(keys, meta[where] >> 40 & 0xFFFF, ops[kind_of], begins)
        joined = meetings.order[meetings.met]
        last_begin = meetings.last_begin[meetings.met]
        wait[where[joined]] = last_begin - begins[joined]
        ended = ends[joined]
        transfer[where[joined]] = np.where(ended, np.maximum(ended - last_begin, 0), -1)
        is_last[where[joined]] = meetings.is_last[meetings.met]
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

    group: Integers  # its number
    sequence: Integers
    size: Integers  # ranks of the group
    op: Integers  # its number
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
            elsewhere = arriving.size > self._local_ranks
            if elsewhere.any():
                self._give_up("other_nodes", int(np.count_nonzero(elsewhere)))
                arriving = arriving.take(~elsewhere)
        if self._pending is not None:
            arriving = Arriving.concatenate([self._pending, arriving])
        if not len(arriving):
            return None
        self._newest_ns = max(self._newest_ns, int(arriving.end_ns.max()))
        keys = arriving.group << _SEQUENCE_BITS | arriving.sequence
        meetings = _meet(keys, arriving.size, arriving.op, arriving.begin_ns)
        self._give_up("desync", int(np.count_nonzero(meetings.disagree)))
        left = meetings.order[~meetings.met & ~meetings.disagree]
        self._pending = self._patiently(arriving.take(left)) if len(left) else None
        whole = arriving.take(meetings.order[meetings.met])
        last_begin = meetings.last_begin[meetings.met]
        return Joined(
            whole.series,
            last_begin - whole.begin_ns,
            np.maximum(whole.end_ns - last_begin, 0),
            whole.status,
            meetings.is_last[meetings.met],
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
            some_missing = len(self._members[group]) < int(waiting.size[of_group].max())
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
