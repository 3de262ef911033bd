"""What the turns of the end-to-end benchmark become: rows, timelines, and the check of the tokens.

Owns the names of the metrics and what each is. Knows nothing of targets.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .e2e_channels import TWO
from .e2e_run import Case, Turn
from .e2e_steps import Step, steps_of
from .figures import Row, p99

TOKENS_PER_S = "tokens/s"
STEP, PREFILL, BROADCAST_US = "step us", "prefill us", "broadcast us"
SHARE = "broadcast share"
ALL_REDUCE = "all-reduce us"
BROADCASTS, BYTES, METADATA = "broadcasts/step", "bytes/step", "metadata bytes/step"
PAIRED = f"{TOKENS_PER_S} vs {TWO}"

DEFINITIONS = {
    TOKENS_PER_S: "tokens drawn in a turn over the time from its first step to the end of its "
    "last, prefill included; each turn is one value",
    PAIRED: "the tokens/s of a turn over those of the turn with two-broadcasts in the same round",
    STEP: "a call of Engine.step on rank 0 in which every sequence of the batch draws one token",
    PREFILL: "a call of Engine.step on rank 0 before those, in which prompts are computed",
    BROADCAST_US: "from the driver beginning to publish until the last rank has the mapping in "
    "hand, in decode steps",
    SHARE: "the same over the time of that step, from 0 to 1",
    "wait us": "in receive, before the driver begins to publish",
    ALL_REDUCE: "in all-reduce, waiting for other ranks included; part of forward us",
    "other us": "of a rank's step, what is in no phase",
    BROADCASTS: "dist.broadcast calls on the source, mean over the steps of a turn",
    BYTES: "of the message of a decode step, mean over a turn",
    METADATA: "of those, what is neither tensor content nor padding",
}

Key = tuple[Case, int | None, str]
Values = dict[Key, list[list[float]]]  # turn by turn


class Drawn(NamedTuple):
    """The tokens of one turn, and what they have to be equal to."""

    group: str  # "TP 2, batch 8"
    by: str  # the channel, and what else is of interest
    tokens: list[list[int]]


_SHOWN = 3  # steps of a timeline


class TokensDiffer(Exception):
    """Two protocols gave different tokens for the same prompts."""


def check_tokens(drawn: Iterable[Drawn]) -> None:
    """Raise TokensDiffer, naming the first difference, unless all of a group drew alike.

    Groups are of one number of ranks and one batch size: sums over another number of ranks are
    rounded otherwise.
    """
    first: dict[str, Drawn] = {}
    for one in drawn:
        other = first.setdefault(one.group, one)
        for sequence, (found, expected) in enumerate(zip(one.tokens, other.tokens, strict=True)):
            if found == expected:
                continue
            both = enumerate(zip(found, expected, strict=False))
            shorter = min(len(found), len(expected))
            place = next((n for n, (a, b) in both if a != b), shorter)
            names = [str(t[place]) if place < len(t) else "none" for t in (found, expected)]
            raise TokensDiffer(
                f"{one.group}, sequence {sequence}, token {place}: {one.by} drew {names[0]}, "
                f"{other.by} {names[1]}"
            )


def make_rows(launches: Sequence[Sequence[Turn]]) -> list[Row]:
    """One row per case, rank and metric, over all launches; the spread is over turns."""
    values: Values = {}
    for turns in launches:
        for turn in turns:
            for (rank, metric), found in _of_turn(turn).items():
                values.setdefault((turn.case, rank, metric), []).append(found)
        for case, ratio in _paired(turns):
            values.setdefault((case, None, PAIRED), []).append([ratio])
    return [make_row(*key, found) for key, found in values.items()]


def make_row(case: Case, rank: int | None, metric: str, turns: Sequence[Sequence[float]]) -> Row:
    pooled = [value for turn in turns for value in turn]
    medians = [statistics.median(turn) for turn in turns if turn]
    return {
        **case._asdict(),
        "rank": rank,
        "metric": metric,
        "median": statistics.median(pooled),
        "p99": p99(pooled),
        "n": len(pooled),
        "spread": [min(medians), max(medians)],
    }


def _of_turn(turn: Turn) -> dict[tuple[int | None, str], list[float]]:
    found: dict[tuple[int | None, str], list[float]] = {}

    def add(rank: int | None, metric: str, value: float) -> None:
        found.setdefault((rank, metric), []).append(value)

    steps = list(steps_of(turn))
    decodes = [step for step in steps if step.decodes]
    assert decodes, f"{turn.case}: no step in which the whole batch decodes"
    add(None, TOKENS_PER_S, turn.driver.tokens_per_s)
    for step in steps:
        if not step.decodes:
            add(None, PREFILL, step.step_us)
    for step in decodes:
        add(None, STEP, step.step_us)
        add(None, BROADCAST_US, step.broadcast_us)
        add(None, SHARE, step.broadcast_us / step.step_us)
        for rank in range(len(step.ranks)):
            for phase, us in step.phase_us(rank).items():
                add(rank, f"{phase} us", us)
            add(rank, ALL_REDUCE, step.all_reduces_ns[rank] / 1e3)
    driver = turn.driver
    messages = [driver.published[step.number] for step in decodes]
    add(None, BROADCASTS, driver.broadcasts / len(driver.steps))
    add(None, BYTES, statistics.mean(message.nbytes for message in messages))
    add(None, METADATA, statistics.mean(message.metadata_bytes for message in messages))
    return found


def _paired(turns: Sequence[Turn]) -> Iterable[tuple[Case, float]]:
    """Of each turn, its tokens/s over those of two-broadcasts in the same round."""
    base = {
        (turn.round, turn.case.tp, turn.case.batch): turn.driver.tokens_per_s
        for turn in turns
        if turn.case.channel == TWO
    }
    for turn in turns:
        before = base.get((turn.round, turn.case.tp, turn.case.batch))
        if before is not None:
            yield turn.case, turn.driver.tokens_per_s / before


# ---- timelines


def make_timelines(turns: Sequence[Turn]) -> list[Row]:
    """Of each case some decode steps in a row, out of the middle of its median turn."""
    of_case: dict[Case, list[Turn]] = {}
    for turn in turns:
        of_case.setdefault(turn.case, []).append(turn)
    return [_timeline(case, found) for case, found in of_case.items()]


def _timeline(case: Case, turns: list[Turn]) -> Row:
    median = sorted(turns, key=lambda turn: turn.driver.tokens_per_s)[len(turns) // 2]
    steps = [step for step in steps_of(median) if step.decodes]
    first = max((len(steps) - _SHOWN) // 2, 0)
    shown = steps[first : first + _SHOWN]
    origin = shown[0].begin_ns
    return {**case._asdict(), "steps": [_shown(step, origin) for step in shown]}


def _shown(step: Step, origin_ns: int) -> dict[str, Any]:
    def us(ns: int) -> float:
        return (ns - origin_ns) / 1e3

    return {
        "step": step.number,
        "begin_us": us(step.begin_ns),
        "step_us": step.step_us,
        "publish_begin_us": us(step.publish_ns),
        "in_hand_us": us(step.in_hand_ns),
        "ranks": [
            {
                "rank": rank,
                "phases": [
                    {"phase": s.name, "begin_us": us(s.begin_ns), "end_us": us(s.end_ns)}
                    for s in spans
                ],
            }
            for rank, spans in enumerate(step.ranks)
        ],
    }
