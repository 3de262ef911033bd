"""What holds the records of a rank: the worker.step of every step, and the phases inside it.

Owns where they begin and end, and which of them a record belongs to. Knows nothing of spans beyond
that.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .ring import AUX, BEGIN, END, ERROR, NBYTES, STEP_KIND
from .ring_reader import Rows
from .span_table import NEVER_ENDED, NO_ERROR
from .spans import Words

Flags = npt.NDArray[np.bool_]


class Workers(NamedTuple):
    """The worker.step of each lane; int64 [lanes]."""

    start: Words
    end: Words
    size: Words  # of the batch; -1: not known
    error: Words


def workers_of(rows: Rows, kinds: Words, lane: Words, first_rows: Words) -> Workers:
    start = np.minimum.reduceat(rows[:, BEGIN], first_rows)
    end = np.maximum.reduceat(np.maximum(rows[:, BEGIN], rows[:, END]), first_rows)
    size = np.full(len(start), -1, np.int64)
    error = np.full(len(start), NEVER_ENDED, np.int64)
    found = np.flatnonzero(kinds == STEP_KIND)
    start[lane[found]] = rows[found, BEGIN]
    size[lane[found]] = rows[found, NBYTES]
    found = found[rows[found, END] != 0]
    end[lane[found]] = rows[found, END]
    status = rows[found, AUX]
    error[lane[found]] = np.where(status & 0xFF == ERROR, status >> 8, NO_ERROR)
    return Workers(start, end, size, error)


class Nodes:
    """What holds records: the worker.step of every lane, then all phases in the order of lanes."""

    def __init__(self, workers: Workers, phases: Rows, lanes: Words) -> None:
        num_workers = len(workers.start)
        starts, ends = workers.start.tolist(), workers.end.tolist()
        parents = list(range(num_workers))
        stack = [0]
        for begin, end, lane in zip(
            phases[:, BEGIN].tolist(), phases[:, END].tolist(), lanes.tolist(), strict=True
        ):
            if stack[0] != lane:
                stack = [lane]
            while len(stack) > 1 and begin >= ends[stack[-1]]:
                stack.pop()
            parent = stack[-1]
            start = min(max(begin, starts[parent]), ends[parent])
            stack.append(len(starts))
            parents.append(parent)
            starts.append(start)
            ends.append(max(start, min(end or ends[parent], ends[parent])))
        self._num_workers = num_workers
        self._phase_lane = np.concatenate([lanes, np.full(1, -1)])  # -1: before the first phase
        self._parent = np.array(parents, np.int64)
        self._start = np.array(starts, np.int64)
        self._end = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._start)

    def hold(self, begins: Words, lanes: Words, is_phase: Flags) -> Words:
        """The innermost node around each record; records in order, phases among them."""
        before = np.cumsum(is_phase) - 1 - is_phase  # the last phase that began before
        node = np.where(self._phase_lane[before] == lanes, before + self._num_workers, lanes)
        while True:
            over = np.flatnonzero((node >= self._num_workers) & (begins >= self._end[node]))
            if not len(over):
                return node
            node[over] = self._parent[node[over]]

    def clip(self, begins: Words, ends: Words, node: Words) -> tuple[Words, Words, Words]:
        """Start and end inside their nodes, and by how much the end was cut."""
        first, last = self._start[node], self._end[node]
        starts = np.minimum(np.maximum(begins, first), last)
        stops = np.maximum(starts, np.where(ends == 0, last, np.minimum(ends, last)))
        return starts, stops, np.maximum(ends - last, 0)
