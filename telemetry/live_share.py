"""Where a step's time went: the broadcast, other collectives, waiting in either, and the rest.

Owns which part of which record counts as what. A frame that came through shared memory is a
broadcast as well: encoding, publishing and decoding it are the broadcast, before that is waiting.
What ran beside the step (before `Work.wait`, or never waited for) costs the step nothing.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .exposed import union_lengths
from .labels import name_at
from .ring import AUX, BEGIN, END, META, UNWAITED, meta_name
from .ring_reader import Rows
from .step_totals import unpack_frames

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


def share_of(
    calls: Rows,
    spent: tuple[Integers, Integers, Integers],
    frames: Rows,
    names: Sequence[str],
    step: tuple[int, int],
) -> list[int]:
    """Nanoseconds of one rank's step: [broadcast, waiting for it, transfer of other collectives,
    waiting in them for the last rank, the rest].

    `calls`: its COLLECTIVE records; `spent`: of each, nanoseconds it took, until its wait was
    called, and until the last rank came (-1: not known). `frames`: its FRAME records; `step`: begin
    and end. Of what overlaps, the part named first has it.
    """
    took, overlap, wait = spent
    ended = calls[:, BEGIN] + took
    called = np.where(calls[:, AUX] & 0xFF == UNWAITED, ended, calls[:, BEGIN] + overlap)
    arrived = np.clip(calls[:, BEGIN] + wait.clip(0), called, ended)
    cast = _by_name(calls, names, lambda name: name.startswith("broadcast"))
    got = _by_name(frames, names, lambda name: name != "published")
    *_, last = unpack_frames(frames)
    came = np.where(got, frames[:, END] - last, frames[:, BEGIN])
    parts = [
        ([arrived[cast], came], [ended[cast], frames[:, END]]),
        ([called[cast], frames[got, BEGIN]], [arrived[cast], came[got]]),
        ([arrived[~cast]], [ended[~cast]]),
        ([called[~cast]], [arrived[~cast]]),
    ]
    # Each part together with those before it: what it adds to their union is its own.
    begins: list[Integers] = []
    ends: list[Integers] = []
    owners: list[Integers] = []
    for place, (part_begins, part_ends) in enumerate(parts):
        begin, end = np.concatenate(part_begins), np.concatenate(part_ends)
        for owner in range(place, len(parts)):
            begins.append(begin)
            ends.append(end)
            owners.append(np.full(len(begin), owner, np.int64))
    unions = union_lengths(
        np.concatenate(owners),
        np.concatenate(begins).clip(*step),
        np.concatenate(ends).clip(*step),
        len(parts),
    ).tolist()
    own = [union - before for union, before in zip(unions, [0, *unions[:-1]], strict=True)]
    return [*own, max(0, step[1] - step[0] - unions[-1])]


def _by_name(rows: Rows, names: Sequence[str], holds: Callable[[str], bool]) -> Booleans:
    """Whether it holds of each record's name."""
    metas, which = np.unique(rows[:, META], return_inverse=True)
    found = [holds(name_at(names, meta_name(meta))) for meta in metas.tolist()]
    return np.array(found, np.bool_)[which]
