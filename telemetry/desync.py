"""Where ranks first disagree about what they call together.

Owns the comparison of calls under one key: the group's unique name and the number of the call in
it, which are equal on all ranks of a correct program. Knows neither files nor processes.

Compared are the operation, the payload where all ranks must give the same (all but all_to_all,
whose ranks send what they like, and gathering or scattering into lists, which some backends do
unevenly), and the dtype of what is reduced. Point-to-point calls have no partner by number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .flight_words import call_text, dtype_text, label_of, name_at, ranks_text, unique_of
from .ring import (
    BEGIN,
    COLLECTIVE,
    META,
    NBYTES,
    SEQUENCE,
    is_point_to_point,
    meta_group,
    meta_name,
)
from .ring_reader import Rows

_UNEVEN = ("all_to_all", "all_to_all_single", "all_gather", "reduce_scatter")
_REDUCING = ("all_reduce", "reduce", "reduce_scatter")
_AHEAD = 8  # calls looked at past a disagreement, to tell another order from another call
_Call = tuple[str, int, str]  # operation, payload if it must be equal, dtype if it must be equal


@dataclass(frozen=True, slots=True)
class Disagreement:
    """The first call about which ranks disagree."""

    what: str  # "op", "size", "dtype", or "order": the same calls, one of them earlier or later
    group: str  # label
    unique: str
    sequence: int
    begin_ns: int  # of the first rank that called it
    calls: dict[int, str]  # by rank: "all_reduce (16 KiB)"
    text: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "what": self.what,
            "group": self.group,
            "sequence": self.sequence,
            "begin_ns": self.begin_ns,
            "calls": {str(rank): call for rank, call in self.calls.items()},
            "text": self.text,
        }


def joinable(entry: str, op: str) -> bool:
    """Whether other ranks have the call under the same key."""
    # A backend that belongs to no group has a name of its own on every rank; a group that came
    # when the name table was full has none.
    shared = "\t" in entry and not unique_of(entry).startswith("backend ")
    return shared and not is_point_to_point(op)


def comparable(row: Sequence[int], names: Sequence[str]) -> _Call:
    """What must be equal on all ranks of a COLLECTIVE record's call."""
    op = name_at(names, meta_name(int(row[META])))
    nbytes = 0 if op in _UNEVEN else int(row[NBYTES])
    return op, nbytes, dtype_text(row, names) if op.startswith(_REDUCING) else ""


def difference(calls: Sequence[_Call]) -> str:
    """How different calls under one key differ: "op", "size" or "dtype"; "" if they do not."""
    for what, field in (("op", 0), ("size", 1), ("dtype", 2)):
        if len({call[field] for call in calls}) > 1:
            return what
    return ""


def first_disagreement(
    rows_by_rank: Mapping[int, Rows], names_by_rank: Mapping[int, Sequence[str]]
) -> Disagreement | None:
    """The earliest call, of any group, that ranks made differently; None if none was found.

    Rows int64 [n, 8], finished or in flight, of any kinds; names: the ranks' name tables. Numbers
    that only some ranks have (overwritten, or never reached) are not compared.
    """
    firsts = []
    for unique, parts in _by_group(rows_by_rank, names_by_rank).items():
        found = _first_in_group(unique, parts, names_by_rank)
        if found is not None:
            firsts.append(found)
    return min(firsts, key=lambda found: found.begin_ns, default=None)


def _by_group(
    rows_by_rank: Mapping[int, Rows], names_by_rank: Mapping[int, Sequence[str]]
) -> dict[str, dict[int, Rows]]:
    """Unique name of a group: the joinable collectives of each rank in it, by number."""
    found: dict[str, dict[int, Rows]] = {}
    for rank, rows in rows_by_rank.items():
        names = names_by_rank[rank]
        metas = rows[:, META]
        together = np.array([not is_point_to_point(name) for name in names] + [True])
        index = np.minimum(metas >> 4 & 0xFFF, len(names))
        chosen = rows[((metas & 0xF) == COLLECTIVE) & together[index]]
        groups = chosen[:, META] >> 16 & 0xFFF
        for group in np.unique(groups).tolist():
            entry = name_at(names, group)
            if not joinable(entry, ""):
                continue
            own = chosen[groups == group]
            own = own[np.argsort(own[:, SEQUENCE], kind="stable")]
            found.setdefault(unique_of(entry), {})[rank] = own
    return found


def _first_in_group(
    unique: str, parts: dict[int, Rows], names_by_rank: Mapping[int, Sequence[str]]
) -> Disagreement | None:
    if len(parts) < 2:
        return None
    calls: dict[_Call, int] = {}
    numbered = [_call_numbers(rows, names_by_rank[rank], calls) for rank, rows in parts.items()]
    sequences = np.concatenate([rows[:, SEQUENCE] for rows in parts.values()])
    numbers = np.concatenate(numbered)
    order = np.argsort(sequences, kind="stable")
    sequences, numbers = sequences[order], numbers[order]
    differs = (sequences[1:] == sequences[:-1]) & (numbers[1:] != numbers[:-1])
    if not differs.any():
        return None
    return _describe(unique, int(sequences[1:][differs][0]), parts, names_by_rank)


def _call_numbers(
    rows: Rows, names: Sequence[str], calls: dict[_Call, int]
) -> npt.NDArray[np.int64]:
    """Every row's call as a number, equal on all ranks."""
    # Kind, group and size out of the way: what is left are few different calls.
    words = np.stack([rows[:, META] >> 4 & 0xFFF, rows[:, META] >> 28 & 0xFFF, rows[:, NBYTES]])
    _, firsts, inverse = np.unique(words, axis=1, return_index=True, return_inverse=True)
    found = [
        calls.setdefault(comparable(rows[first].tolist(), names), len(calls)) for first in firsts
    ]
    numbers: npt.NDArray[np.int64] = np.array(found, np.int64)[inverse.reshape(-1)]
    return numbers


def _describe(
    unique: str,
    sequence: int,
    parts: dict[int, Rows],
    names_by_rank: Mapping[int, Sequence[str]],
) -> Disagreement:
    ahead: dict[int, dict[int, _Call]] = {}  # by rank: the calls from `sequence` on
    here: dict[int, list[int]] = {}
    for rank, rows in sorted(parts.items()):
        offsets = rows[:, SEQUENCE] - sequence
        near = rows[(offsets >= 0) & (offsets <= _AHEAD)]
        names = names_by_rank[rank]
        ahead[rank] = {int(row[SEQUENCE]): comparable(row.tolist(), names) for row in near}
        found = near[near[:, SEQUENCE] == sequence]
        if len(found):
            here[rank] = found[0].tolist()
    what = difference([ahead[rank][sequence] for rank in here])
    other_order = _other_order(sequence, {rank: ahead[rank] for rank in here})
    calls = {rank: _call(row, names_by_rank[rank], what) for rank, row in here.items()}
    first = next(iter(here))
    label = label_of(name_at(names_by_rank[first], meta_group(here[first][META])))
    return Disagreement(
        "order" if other_order else what,
        label,
        unique,
        sequence,
        min(row[BEGIN] for row in here.values()),
        calls,
        f"{disagreement_text(label, sequence, calls)}{other_order}",
    )


def disagreement_text(label: str, sequence: int, calls: Mapping[int, str]) -> str:
    """ "ranks disagree on #5 of tp: rank 0 called all_reduce (16 KiB), rank 1 barrier"."""
    callers: dict[str, list[int]] = {}
    for rank, call in calls.items():
        callers.setdefault(call, []).append(rank)
    told = [f"{ranks_text(ranks)} called {call}" for call, ranks in callers.items()]
    return f"ranks disagree on #{sequence} of {label}: {', '.join(told)}"


def _call(row: Sequence[int], names: Sequence[str], what: str) -> str:
    text = call_text(row, names, group=False)
    return f"{text} of {dtype_text(row, names)}" if what == "dtype" else text


def _other_order(sequence: int, ahead: Mapping[int, Mapping[int, _Call]]) -> str:
    """How one rank's calls, moved, are another's: " (rank 1 makes ...)"; "" if they are not."""
    ranks = list(ahead)
    for a in ranks:
        for b in ranks:
            mine, other = ahead[a], ahead[b]
            if mine[sequence] == other[sequence]:
                continue
            following = sequence + 1
            if following not in mine or following not in other:
                continue
            if mine[following] == other[sequence] and other[following] == mine[sequence]:
                return f": the same two calls, in another order on rank {b}"
            shifted = [n for n in mine if n > sequence and n - 1 in other]
            if mine[following] != other[following] and all(
                mine[n] == other[n - 1] for n in shifted
            ):
                return f": rank {a} makes one call more than rank {b}, or rank {b} left one out"
    return ""
