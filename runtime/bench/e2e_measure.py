"""The whole of `onecast bench e2e` as a report, for a command or another program to ask for.

Owns which launches there are, and what the report holds. What a turn is stands in `e2e_run`, what
the metrics are in `e2e_rows`, the model of what a message costs in `e2e_cost`, the figures and
their targets in `e2e_report`.

Protocols take turns inside a launch, in an order drawn anew each time; between launches the machine
may be another, and a figure shows its spread over them.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from onecast.runtime import demo

from . import e2e_ablation, e2e_telemetry
from .e2e_channels import CHANNELS, SHM
from .e2e_cost import make_ablation
from .e2e_machine import check_model, describe_hardware, describe_model, describe_versions
from .e2e_original import compare_with_original
from .e2e_prompts import LEAST, MOST
from .e2e_report import Seen, make_all_rows, make_ratios
from .e2e_rows import DEFINITIONS, Drawn, check_tokens, make_timelines
from .e2e_run import BLOCK_SIZE, MAX_BATCH_TOKENS, Plan, blocks_of, launch
from .figures import Row, describe_machine

BATCHES = (1, 8, 32, 64, 128)
DEMO = Path(demo.__path__[0]) / "checkpoint"

_TELEMETRY_BATCHES = (8, 64)  # as far as they are measured


class Amount(NamedTuple):
    """How much is measured; `steps` of each point of the ablation in a launch, 0: none."""

    launches: int
    rounds: int
    drawn: int
    telemetry_rounds: int
    steps: int
    batches: tuple[int, ...] = BATCHES


class Chosen(NamedTuple):
    """What is measured, of what there is."""

    name: str
    model: Path
    synthetic: str | None
    device: str
    tp: tuple[int, ...]
    channels: tuple[str, ...]
    all_reduce: str
    command: str


def measure(chosen: Chosen, amount: Amount, timeout_s: float = 3600.0) -> Row:
    """The whole report; no launch of ranks takes longer than `timeout_s`.

    Raises ValueError for what cannot run here, before anything does; TokensDiffer where a protocol,
    or telemetry, changes a token; RanksHung.
    """
    load = os.getloadavg()[0]
    plan = Plan(
        chosen.model,
        chosen.device,
        amount.batches,
        chosen.channels,
        amount.rounds,
        amount.drawn,
        chosen.all_reduce,
        timeout_s,
    )
    for tp in chosen.tp:
        check_model(chosen.model, chosen.device, tp, *room_of(amount))
    seen = _launch_all(chosen, amount, plan)
    turns = [turn for one in seen.turns for turn in one]
    ablation = make_ablation(seen.ablation) if seen.ablation else None
    report: Row = {
        "bench": "e2e",
        "command": chosen.command,
        "machine": describe_machine(load, f"TP {', '.join(map(str, chosen.tp))}", chosen.device),
        "hardware": describe_hardware(),
        "versions": describe_versions(),
        "model": describe_model(chosen.model, chosen.name, chosen.synthetic, chosen.device),
        "workload": {
            "prompt_tokens": [LEAST, MOST],
            "drawn_tokens": plan.drawn,
            "block_size": BLOCK_SIZE,
            "max_batch_tokens": MAX_BATCH_TOKENS,
        },
        "plan": {
            "tp": list(chosen.tp),
            "batches": list(plan.batches),
            "channels": list(chosen.channels),
            "launches": amount.launches,
            "rounds": amount.rounds,
            "all_reduce": plan.all_reduce,
        },
        "channels": {name: CHANNELS[name] for name in chosen.channels},
        "definitions": DEFINITIONS,
        "rows": make_all_rows(seen),
        "timelines": make_timelines(turns),
    }
    if ablation is not None:
        report["ablation"] = ablation
        report["original"] = compare_with_original(ablation["protocols"])
    targets = chosen.model == DEMO and chosen.device == "cpu"
    report["ratios"] = make_ratios(seen, targets)
    return report


def room_of(amount: Amount) -> tuple[int, int]:
    """Tokens of the longest sequence, and blocks of each rank's cache."""
    return MOST + amount.drawn, blocks_of(max(amount.batches), amount.drawn)


def _launch_all(chosen: Chosen, amount: Amount, plan: Plan) -> Seen:
    """Every launch, and the check of the tokens after each."""
    seen = Seen([], [], [])
    of_telemetry = [batch for batch in plan.batches if batch in _TELEMETRY_BATCHES]
    telemetry_plan = plan._replace(
        batches=tuple(of_telemetry) or plan.batches[:1], rounds=amount.telemetry_rounds
    )
    for number in range(amount.launches):
        progress = f"launch {number + 1} of {amount.launches}"
        turns = []
        for tp in chosen.tp:
            print(f"{progress}: TP {tp}", file=sys.stderr, flush=True)
            turns += launch(tp, plan)
        seen.turns.append(turns)
        check_tokens(_drawn(seen))
        if SHM in chosen.channels and amount.telemetry_rounds:
            tp = 2 if 2 in chosen.tp else chosen.tp[0]
            print(f"{progress}: telemetry, TP {tp}", file=sys.stderr, flush=True)
            toggled = e2e_telemetry.launch(tp, SHM, telemetry_plan)
            seen.telemetry.append((tp, SHM, toggled))
            check_tokens(_drawn(seen))
        if amount.steps:
            print(f"{progress}: ablation", file=sys.stderr, flush=True)
            seen.ablation.append(e2e_ablation.launch(amount.steps))
    return seen


def _drawn(seen: Seen) -> Iterator[Drawn]:
    for turns in seen.turns:
        for turn in turns:
            case = turn.case
            yield Drawn(f"TP {case.tp}, batch {case.batch}", case.channel, turn.driver.tokens)
    for tp, channel, toggled in seen.telemetry:
        for one in toggled:
            by = f"{channel}, telemetry {'on' if one.on else 'off'}"
            yield Drawn(f"TP {tp}, batch {one.batch}", by, one.tokens)
