"""Sampling: which steps are kept, and by what reason."""

from typing import Any

import numpy as np
import pytest

from onecast.telemetry import TelemetrySettings, ring
from onecast.telemetry.ring import pack_meta
from onecast.telemetry.sampling import TailSampler
from onecast.telemetry.steps import JoinedStep

NAMES = {rank: ["", "all_reduce", "tp\t0", "float32", "KeyError", "forward"] for rank in (0, 1)}
MS = 1_000_000
REDUCE = pack_meta(ring.COLLECTIVE, 1, 2, 3, 2)


def row(begin: int, end: int, meta: int, sequence: int = 0, aux: int = 0) -> list[int]:
    return [begin, end, 0, meta, sequence, 0, aux, 1]


def step(
    number: int, duration: int = MS, *, late: int = 0, more: Any = (), unfinished: Any = ()
) -> JoinedStep:
    """A step of two ranks; rank 1 enters its only collective `late` ns after rank 0."""
    found = {}
    for rank in (0, 1):
        begin = 10 + rank * late
        found[rank] = np.array(
            [
                row(0, duration, pack_meta(ring.STEP_KIND)),
                row(begin, begin + late + 5, REDUCE, number + 1),
                *(more if rank else ()),
            ],
            np.int64,
        )
    open_rows = {1: np.array(unfinished, np.int64)} if len(unfinished) else {}
    return JoinedStep(number, found, open_rows)


def sampler(**changes: Any) -> TailSampler:
    none: dict[str, Any] = {"trace_one_in": 0, "trace_slow": False, "trace_skew_s": 0}
    return TailSampler(TelemetrySettings(**none | changes))


def test_one_in_n_is_the_same_steps_everywhere() -> None:
    one_in_4 = sampler(trace_one_in=4)
    reasons = [one_in_4.decide(step(number), NAMES) for number in range(3, 10)]
    assert reasons == [None, "one_in_n", None, None, None, "one_in_n", None]
    assert sampler(trace_one_in=1).decide(step(7), NAMES) == "all"


def test_everything_off_keeps_nothing_not_even_errors() -> None:
    failed = step(1, more=[row(1, 2, REDUCE, 9, ring.ERROR | 4 << 8)])
    assert sampler().decide(failed, NAMES) is None
    assert not sampler().enabled and sampler(trace_slow=True).enabled


@pytest.mark.parametrize("kind", [ring.COLLECTIVE, ring.STEP_KIND])
def test_steps_that_raised_are_kept(kind: int) -> None:
    failed = step(1, more=[row(1, 2, pack_meta(kind, 1, 2), 9, ring.ERROR | 4 << 8)])
    assert sampler(trace_one_in=1000).decide(failed, NAMES) == "error"
    unwaited = step(1, more=[row(1, 2, REDUCE, 9, ring.UNWAITED)])
    assert sampler(trace_one_in=1000).decide(unwaited, NAMES) is None


def test_steps_given_up_in_a_collective_are_kept() -> None:
    tail = sampler(trace_slow=True)
    assert tail.decide(step(1, unfinished=[row(1, 0, REDUCE, 9)]), NAMES) == "hang"
    phase = row(1, 0, pack_meta(ring.PHASE, 5))
    assert tail.decide(step(2, unfinished=[phase]), NAMES) is None


def test_steps_that_went_on_after_a_hang_are_kept_as_such() -> None:
    tail = sampler(trace_one_in=1000, trace_slow=True, trace_skew_s=0.004, hang_s=0.05)
    assert tail.decide(step(1, late=50 * MS), NAMES) == "skew"
    assert tail.decide(step(2, late=50 * MS + 1), NAMES) == "hang"
    never = sampler(trace_one_in=1000, hang_s=0)
    assert never.decide(step(3, late=50 * MS), NAMES) is None


def test_steps_slower_than_the_rolling_p99_are_kept_once_a_hundred_are_known() -> None:
    tail = sampler(trace_slow=True)
    assert tail.decide(step(0, 50 * MS), NAMES) is None, "nothing to compare with"
    for number in range(1, 100):
        assert tail.decide(step(number, MS + number), NAMES) is None
    assert tail.decide(step(100, 2 * MS), NAMES) is None, "the slowest of a hundred was slower"
    assert tail.decide(step(101, 60 * MS), NAMES) == "slow"
    for number in range(102, 400):
        tail.decide(step(number, MS + number % 100), NAMES)
    assert tail.decide(step(400, 2 * MS), NAMES) == "slow", "1% may be slower"
    for number in range(401, 2200):  # the window moves on: what was slow is not any more
        tail.decide(step(number, 100 * MS), NAMES)
    assert tail.decide(step(2200, 90 * MS), NAMES) is None
    assert tail.decide(step(2201, 101 * MS), NAMES) == "slow"


def test_a_rank_that_waited_for_work_makes_no_step_slow() -> None:
    tail = sampler(trace_slow=True)
    for number in range(150):
        tail.decide(step(number), NAMES)
    waited = step(150)
    waited.rows[1][0, ring.END] = 80 * MS  # the follower: its driver had nothing to do
    assert tail.decide(waited, NAMES) is None


def test_steps_in_which_a_rank_came_late_are_kept() -> None:
    tail = sampler(trace_skew_s=0.004)
    assert tail.decide(step(1, late=4 * MS), NAMES) is None
    assert tail.decide(step(2, late=4 * MS + 1), NAMES) == "skew"
    assert tail.decide(step(3), NAMES) is None
