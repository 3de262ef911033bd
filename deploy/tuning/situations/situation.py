"""A situation: a run that goes badly, the same run with the knob turned, and where both show.

Owns what a situation says of itself and how it is carried out: case after case, under one
Prometheus. Each of the other modules here is one situation and knows nothing of the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .prometheus import Prometheus, free_port, prometheus
from .runs import Ended
from .spans import Spans

_PER_S = (
    'sum(onecast_tokens_total{CASE, kind="KIND"})'
    ' / sum(onecast_step_duration_seconds_sum{CASE, rank="0"})'
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to Prometheus: PromQL, in which CASE stands for the matcher of the run."""

    what: str
    expression: str
    unit: str = ""


# Since the beginning: a rate over a minute says little of a run that takes seconds.
GENERATED = Asked("tokens generated", _PER_S.replace("KIND", "generated"), "/s")
PROMPT = Asked("tokens of prompts", _PER_S.replace("KIND", "prompt"), "/s")
STEPS = 'sum(onecast_step_duration_seconds_count{CASE, rank="0"})'
STEP = Asked("step, median", "onecast:step_duration_seconds:p50_1m{CASE}", "s")


def phase_share(what: str, phase: str, rank: int) -> Asked:
    """The part of its steps' time that a rank spends in phases; `phase` is a regular expression."""
    of_rank = f'{{CASE, rank="{rank}"}}'
    in_phase = f'{{CASE, rank="{rank}", phase=~"{phase}"}}'
    time = f"sum(onecast_step_phase_seconds_sum{in_phase}) or vector(0)"
    return Asked(what, f"({time}) / sum(onecast_step_duration_seconds_sum{of_rank})", "share")


@dataclass(frozen=True, slots=True)
class Shown:
    """A span of the trace on one rank (None: of the engine): its median duration, or longest."""

    name: str
    rank: int | None = None
    longest: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a case may write, and what it is to serve its metrics at."""

    folder: Path
    port: int
    trace: Path


@dataclass(frozen=True, slots=True)
class Case:
    """One run. `name` is the value of the label `case`; `setting` is what differs, in words."""

    name: str
    setting: str
    run: Callable[[Place], Ended]


@dataclass(frozen=True, slots=True)
class Situation:
    """`alert` shows in the first case; the last case has the knob turned.

    Lines that a run prints with `says` in them belong to what is shown.
    """

    name: str
    alert: str
    knob: str
    cases: Sequence[Case]
    asked: Sequence[Asked]
    shown: Sequence[Shown]
    says: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one case came to. Values parallel to the situation's `asked`."""

    case: Case
    ended: Ended
    values: list[float | None]
    alert: tuple[str, float] | None  # its state, and for how many seconds
    spans: Spans


def carry_out(situation: Situation, folder: Path) -> list[Outcome]:
    """Every case in turn; ValueError without a Prometheus, RuntimeError for a run that fails."""
    places = {}
    for case in situation.cases:
        own = folder / case.name
        own.mkdir()
        places[case.name] = Place(own, free_port(), own / "trace.json")
    with prometheus(folder, {name: place.port for name, place in places.items()}) as server:
        return [_outcome(situation, case, places[case.name], server) for case in situation.cases]


def _outcome(situation: Situation, case: Case, place: Place, server: Prometheus) -> Outcome:
    ended = case.run(place)
    at = server.last_seen(case.name)
    if at is None:
        raise RuntimeError(f"Prometheus never saw the run of case {case.name}:\n{ended.output}")
    return Outcome(
        case,
        ended,
        [server.value(asked.expression, case.name, at) for asked in situation.asked],
        server.alert(situation.alert, case.name, at),
        Spans.read(place.trace),
    )
