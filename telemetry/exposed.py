"""Exposed communication: for how much of a step a rank did nothing but wait for collectives.

Owns the union of intervals, per step: two operations that were waited for at the same time count
once. An operation is exposed from the call of Work.wait (where the call itself waited: from its
begin) to its end, on the host's clock. One that nobody waited for is not exposed.
"""

import numpy as np
import numpy.typing as npt

from .ring import AUX, BEGIN, END, ERROR, OK, STEP
from .ring_reader import Rows

Integers = npt.NDArray[np.int64]

_MAX_PENDING = 1 << 16  # operations of a step that does not end: beyond, they are forgotten


def union_lengths(owner: Integers, starts: Integers, ends: Integers, owners: int) -> Integers:
    """Length of the union of each owner's intervals; int64 [owners].

    `owner` [n] numbers them from 0; starts and ends [n] in any order.
    """
    lengths = np.zeros(owners, np.int64)
    if not len(starts):
        return lengths
    if not _in_order(owner, starts):
        order = np.lexsort((starts, owner))
        owner, starts, ends = owner[order], starts[order], ends[order]
    # Each owner's times from its own first start, and owners one after the other on one axis: so
    # that a running maximum of the ends never reaches from one owner into the next.
    first = np.concatenate([np.ones(1, np.bool_), owner[1:] != owner[:-1]])
    zero = starts[first][np.cumsum(first) - 1]
    starts, ends = starts - zero, np.maximum(ends, starts) - zero
    shift = owner * (int(ends.max()) + 1)
    reached = np.maximum.accumulate(ends + shift)
    before = np.concatenate([np.zeros(1, np.int64), reached[:-1]])
    added = np.maximum(reached - np.maximum(starts + shift, before), 0)
    np.add.at(lengths, owner, added)
    return lengths


def _in_order(owner: Integers, starts: Integers) -> bool:
    up = (owner[1:] > owner[:-1]) | ((owner[1:] == owner[:-1]) & (starts[1:] >= starts[:-1]))
    return bool(up.all())


class ExposedTime:
    """Of one rank: takes its collectives as they come, gives the time of its steps as they end."""

    def __init__(self) -> None:
        self._waiting: list[Integers] = []  # [3, n]: begin, start and end of the exposed part
        self._num_waiting = 0

    def add(self, rows: Rows) -> None:
        """Take in finished COLLECTIVE records."""
        aux = rows[:, AUX].copy()
        status = aux & 0xFF
        begins = rows[:, BEGIN]
        times = np.stack([begins, begins + np.where(status == OK, aux >> 8, 0), rows[:, END]])
        counted = (rows[:, STEP] >= 0) & (status <= ERROR)
        if not counted.all():
            times = times[:, counted]
        self._waiting.append(times)
        self._num_waiting += times.shape[1]
        while self._num_waiting > _MAX_PENDING and len(self._waiting) > 1:
            self._num_waiting -= self._waiting.pop(0).shape[1]

    def take(self, steps: Rows) -> Integers:
        """Exposed nanoseconds of the good ones of these STEP_KIND records, by begin; [n].

        Everything that ended in them must have been added.
        """
        steps = steps[np.argsort(steps[:, BEGIN], kind="stable")]
        good = steps[:, AUX] & 0xFF == OK
        if not self._num_waiting:
            return np.zeros(int(np.count_nonzero(good)), np.int64)
        times = np.concatenate(self._waiting, axis=1)
        begins, starts, ends = times
        # A rank's steps follow each other: the step of an operation is the last that began before.
        owner = np.searchsorted(steps[:, BEGIN], begins, side="right") - 1
        later = begins >= steps[-1, END]
        inside = (owner >= 0) & ~later
        owner = owner[inside]
        step_ends = steps[owner, END]
        lengths = union_lengths(
            owner,
            np.minimum(starts[inside], step_ends),
            np.minimum(ends[inside], step_ends),
            len(steps),
        )
        self._waiting = [times[:, later]]
        self._num_waiting = self._waiting[0].shape[1]
        exposed: Integers = lengths[good]
        return exposed
