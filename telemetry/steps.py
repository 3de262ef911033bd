"""Joins the records of all local ranks into steps.

Owns which step is complete and when one is given up on. Knows neither spans nor files. A step
is complete when every local rank has ended it and none of its operations is still in flight.
Which requests it served follows from what the driver wrote when its batch changed.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from .ring import (
    AUX,
    DISCARDED,
    LAST_OF_STEP,
    META,
    NBYTES,
    REQUEST,
    SCHEDULED,
    SEQUENCE,
    STEP,
    STEP_KIND,
)
from .ring_reader import Rows

_MAX_PENDING = 256  # steps that wait for a rank; beyond, the oldest go as they are
_MAX_CHANGES = 1 << 16  # of the batch, that wait for their step


@dataclass(slots=True)
class JoinedStep:
    """One step of the engine: the records of each rank, in the order they began."""

    step: int
    rows: dict[int, Rows]  # by rank
    unfinished: dict[int, Rows] = field(
        default_factory=dict
    )  # in flight when the step was given up
    requests: tuple[int, ...] = ()  # numbers of those in the step's batch, ascending

    @property
    def num_records(self) -> int:
        return sum(map(len, self.rows.values())) + sum(map(len, self.unfinished.values()))


class StepJoiner:
    """Collects rows and releases whole steps, in order. Rows outside any step are ignored."""

    def __init__(self, expected_ranks: int) -> None:
        self._expected = expected_ranks
        self._pending: dict[int, dict[int, list[Rows]]] = {}
        self._ended: dict[int, set[int]] = {}
        self._released = -1  # steps up to this one have left
        self.late = 0  # records that came after their step had left
        self._batch = _Batch()

    def add(self, rank: int, rows: Rows) -> None:
        self._batch.add(rows)
        inside = rows[(rows[:, STEP] >= 0) & ((rows[:, META] & 0xF) <= LAST_OF_STEP)]
        if not len(inside):
            return
        steps = inside[:, STEP]
        if np.any(steps[1:] < steps[:-1]):  # something asynchronous ended after its step
            inside = inside[np.argsort(steps, kind="stable")]
            steps = inside[:, STEP]
        edges = np.flatnonzero(steps[1:] != steps[:-1]) + 1
        bounds = [0, *edges.tolist(), len(inside)]
        for first, last in pairwise(bounds):
            step = int(steps[first])
            if step <= self._released:
                self.late += last - first
                continue
            self._pending.setdefault(step, {}).setdefault(rank, []).append(inside[first:last])
        for end in inside[(inside[:, META] & 0xF) == STEP_KIND].tolist():
            step = end[STEP]
            if step <= self._released:
                continue
            self._ended.setdefault(step, set()).add(rank)
            if end[AUX] & 0xFF == DISCARDED:
                self._discard(step, rank)

    def _discard(self, step: int, rank: int) -> None:
        """It was no step on this rank: as if the rank had never begun it."""
        del self._pending[step][rank]
        if not self._pending[step]:
            del self._pending[step]
            del self._ended[step]

    def release(self, pending: Mapping[int, Rows], *, everything: bool = False) -> list[JoinedStep]:
        """Complete steps, oldest first; with `everything` also those that never completed.

        `pending`: by rank, the records that the last drain did not hand out.
        """
        busy = {
            step
            for rows in pending.values()
            for step in np.unique(rows[:, STEP]).tolist()
            if step >= 0
        }
        released = []
        for step in sorted(self._pending.keys() | (busy if everything else set())):
            complete = len(self._ended.get(step, ())) >= self._expected and step not in busy
            if not (complete or everything or len(self._pending) > _MAX_PENDING):
                break
            parts = self._pending.pop(step, {})
            self._ended.pop(step, None)
            self._released = max(self._released, step)
            open_rows = {
                rank: rows[rows[:, STEP] == step] for rank, rows in pending.items() if not complete
            }
            joined = {
                rank: found[0] if len(found) == 1 else np.concatenate(found)
                for rank, found in parts.items()
            }
            released.append(
                JoinedStep(
                    step,
                    joined,
                    {rank: rows for rank, rows in open_rows.items() if len(rows)},
                    self._batch.at(step),
                )
            )
        return released


class _Batch:
    """The requests in the engine's batch, step by step."""

    def __init__(self) -> None:
        # step, request number, in or out
        self._changes: deque[tuple[int, int, bool]] = deque(maxlen=_MAX_CHANGES)
        self._now: set[int] = set()
        self._told: tuple[int, ...] = ()

    def add(self, rows: Rows) -> None:
        kinds = rows[:, META] & 0xF
        for row in rows[(kinds == SCHEDULED) | (kinds == REQUEST)].tolist():
            if row[META] & 0xF == SCHEDULED:
                self._changes.append((row[STEP], row[SEQUENCE], bool(row[NBYTES])))
            elif row[STEP] >= 0:  # it is over, even if the record that says so was lost
                self._changes.append((row[STEP] + 1, row[SEQUENCE], False))  # that step had it

    def at(self, step: int) -> tuple[int, ...]:
        """Of this step; steps are asked for in order. The same object while nothing changes."""
        changed = False
        while self._changes and self._changes[0][0] <= step:
            _, number, inside = self._changes.popleft()
            changed |= (number in self._now) != inside
            (self._now.add if inside else self._now.discard)(number)
        if changed:
            self._told = tuple(sorted(self._now))
        return self._told
