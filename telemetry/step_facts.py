"""What sampling and tracing need to know of steps, found for many of them at once.

Owns the pass over the records of joined steps. Decides nothing. One pass over five steps costs a
third of five passes: most of what numpy does to so few records is to begin.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .arrivals import Arrivals, arrivals_of
from .ring import AUX, BEGIN, COLLECTIVE, END, ERROR, META, OK, PHASE, STEP_KIND
from .ring_reader import Rows
from .steps import JoinedStep

_UNKNOWN = (1 << 63) - 1


class StepFacts(NamedTuple):
    arrivals: Mapping[int, Arrivals]  # by rank, aligned with `rows_of` it
    failed: bool  # a collective or the step itself raised
    hung: bool  # it was given up while a collective was in flight
    duration_ns: int | None  # of the rank that took the least; None where none ended it well
    longest_wait_ns: int  # of any rank for the last one; -1: nothing is known
    num_spans: int  # without engine.step


def rows_of(joined: JoinedStep, rank: int) -> Rows:
    """All records of a rank: those that ended, then those that never did."""
    parts = [part[rank] for part in (joined.rows, joined.unfinished) if rank in part]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def ranks_of(joined: JoinedStep) -> list[int]:
    return sorted(joined.rows.keys() | joined.unfinished.keys())


def step_facts(
    steps: Sequence[JoinedStep], names_by_rank: Mapping[int, Sequence[str]]
) -> list[StepFacts]:
    """In the order of the steps. A *lane* is what one rank did in one step."""
    parts: dict[int, list[tuple[int, Rows]]] = {}  # by rank: place of the step, rows
    for place, joined in enumerate(steps):
        for rank in ranks_of(joined):
            parts.setdefault(rank, []).append((place, rows_of(joined, rank)))
    if not parts:
        return []
    ranks = sorted(parts)
    found = arrivals_of(
        {rank: np.concatenate([rows for _, rows in parts[rank]]) for rank in ranks}, names_by_rank
    )
    lanes = [(rank, place, rows) for rank in ranks for place, rows in parts[rank]]
    lengths = [len(rows) for _, _, rows in lanes]
    rows = np.concatenate([rows for _, _, rows in lanes])
    waits = np.concatenate([found[rank].wait_ns for rank in ranks])
    step_of_lane = np.array([place for _, place, _ in lanes])
    step = np.repeat(step_of_lane, lengths)

    kinds, status = rows[:, META] & 0xF, rows[:, AUX] & 0xFF
    ended = rows[:, END] != 0
    is_collective, is_step = kinds == COLLECTIVE, kinds == STEP_KIND
    failed = step[(status == ERROR) & ended & (is_collective | is_step)]
    hung = step[is_collective & ~ended]
    spans = np.bincount(step[is_collective | (kinds == PHASE)], minlength=len(steps))
    spans += np.bincount(step_of_lane, minlength=len(steps))  # a worker.step each
    whole = np.flatnonzero(is_step & ended & (status == OK))
    durations = np.full(len(steps), _UNKNOWN, np.int64)
    np.minimum.at(durations, step[whole], rows[whole, END] - rows[whole, BEGIN])
    longest = np.full(len(steps), -1, np.int64)
    first_rows = np.cumsum([0, *lengths[:-1]])
    np.maximum.at(longest, step_of_lane, np.maximum.reduceat(waits, first_rows))

    arrivals: list[dict[int, Arrivals]] = [{} for _ in steps]
    for rank in ranks:
        waits_of_rank, are_last, transfers = found[rank]
        first = 0
        for place, part in parts[rank]:
            last = first + len(part)
            arrivals[place][rank] = Arrivals(
                waits_of_rank[first:last], are_last[first:last], transfers[first:last]
            )
            first = last
    failed_steps, hung_steps = set(failed.tolist()), set(hung.tolist())
    return [
        StepFacts(
            arrivals[place],
            place in failed_steps,
            place in hung_steps,
            duration if duration != _UNKNOWN else None,
            wait,
            number,
        )
        for place, (duration, wait, number) in enumerate(
            zip(durations.tolist(), longest.tolist(), spans.tolist(), strict=True)
        )
    ]
