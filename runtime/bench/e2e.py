"""`onecast bench e2e`: the same prompts, the same tokens, one control protocol after the other.

Owns the command: which model, how many ranks, launches and turns, and where the report goes. What
a turn is stands in `e2e_run`, what the metrics are in `e2e_rows`, the model of what a message costs
in `e2e_cost`, the figures and their targets in `e2e_report`.

Protocols take turns inside a launch, in an order drawn anew each time; between launches the machine
may be another, and a figure shows its spread over them.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from onecast.comm.all_reduce import TRANSPORTS
from onecast.runtime import demo

from . import e2e_ablation, e2e_telemetry, peers
from .e2e_channels import CHANNELS, SHM
from .e2e_cost import make_ablation
from .e2e_machine import check_model, describe_hardware, describe_model, describe_versions
from .e2e_original import compare_with_original
from .e2e_prompts import LEAST, MOST
from .e2e_report import Seen, make_all_rows, make_ratios, print_report
from .e2e_rows import DEFINITIONS, Drawn, TokensDiffer, check_tokens, make_timelines
from .e2e_run import BLOCK_SIZE, MAX_BATCH_TOKENS, Plan, blocks_of, launch
from .figures import Row, describe_machine
from .synthetic import SHAPES, default_cache, synthetic_model
from .terminal import deliver, make_parser

_BATCHES = (1, 8, 32, 64, 128)
_TELEMETRY_BATCHES = (8, 64)  # as far as they are measured
_DEMO = Path(demo.__path__[0]) / "checkpoint"


class Amount(NamedTuple):
    """How much is measured; `steps` of each point of the ablation in a launch, 0: none."""

    launches: int
    rounds: int
    drawn: int
    telemetry_rounds: int
    steps: int
    batches: tuple[int, ...] = _BATCHES


QUICK = Amount(launches=1, rounds=1, drawn=24, telemetry_rounds=4, steps=25, batches=(1, 8, 64))
FULL = Amount(launches=3, rounds=4, drawn=48, telemetry_rounds=16, steps=75)


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


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write what is asked for; returns the exit status."""
    options = _parser().parse_args(argv)
    amount = QUICK if options.quick else FULL
    given = {"batches": options.batch, "drawn": options.drawn, "rounds": options.rounds}
    amount = amount._replace(**{name: value for name, value in given.items() if value is not None})
    try:
        chosen = _choose(options, shlex.join(["onecast", "bench", "e2e", *argv]))
        report = measure(chosen, amount)
        if options.peer:
            print(f"peers: {', '.join(options.peer)}", file=sys.stderr, flush=True)
            report["peers"] = peers.measure_peers(
                options.peer, chosen.model, drawn=amount.drawn, quick=options.quick
            )
            report["ratios"] += report["peers"]["ratios"]
    except ValueError as error:
        print(f"onecast: {error}", file=sys.stderr)
        return 2
    except TokensDiffer as difference:
        print(f"onecast: {difference}", file=sys.stderr)
        return 1
    status = deliver(report, options.json, print_report)
    if options.report is not None:
        page = import_module("onecast.runtime.bench.e2e_page")  # plots: not needed to measure
        page.write_report(json.loads(json.dumps(report)), options.report)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("e2e", __doc__, "one launch of short turns, under a minute")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face model directory (the shipped one)"
    )
    which.add_argument(
        "--synthetic", choices=tuple(SHAPES), help="random weights of that shape, made once"
    )
    parser.add_argument(
        "--tp", type=_numbers, default=(2,), metavar="N[,N..]", help="numbers of ranks (2)"
    )
    parser.add_argument(
        "--batch", type=_numbers, metavar="N[,N..]",
        help=f"sequences that decode together ({','.join(map(str, _BATCHES))})",
    )  # fmt: skip
    parser.add_argument(
        "--channels", default="all", metavar="NAME[,NAME..]", help=f"of {', '.join(CHANNELS)} (all)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument(
        "--all-reduce", choices=TRANSPORTS, default="auto",
        help="how CPU ranks sum, as for generate (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--drawn", type=_number, metavar="N", help="tokens drawn by each sequence")
    parser.add_argument("--rounds", type=_number, metavar="N", help="turns of each in a launch")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", default=default_cache(),
        help="where synthetic models are kept (%(default)s)",
    )  # fmt: skip
    peers.add_peer_option(parser)
    parser.add_argument("--report", type=Path, metavar="DIR", help="also write an HTML page there")
    return parser


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(map(_number, text.split(","))))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 1,8") from None


def _choose(options: argparse.Namespace, command: str) -> Chosen:
    """ValueError for a channel or a model that there is not, or a disk that is full."""
    names = tuple(CHANNELS) if options.channels == "all" else tuple(options.channels.split(","))
    for name in names:
        if name not in CHANNELS:
            raise ValueError(f"--channels: {name!r} is none of {', '.join(CHANNELS)}")
    channels = tuple(name for name in CHANNELS if name in names)
    if options.synthetic is not None:
        model, name = synthetic_model(options.synthetic, options.cache), options.synthetic
        name = f"synthetic {name}"
    elif options.model is not None:
        model, name = options.model, options.model.resolve().name
    else:
        model, name = _DEMO, "demo checkpoint"
    return Chosen(
        name,
        model,
        options.synthetic,
        options.device,
        options.tp,
        channels,
        options.all_reduce,
        command,
    )


def measure(chosen: Chosen, amount: Amount) -> Row:
    """The whole report. Raises ValueError for what cannot run here, before anything does.

    Raises TokensDiffer where a protocol, or telemetry, changes a token.
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
    )
    for tp in chosen.tp:
        blocks = blocks_of(max(plan.batches), plan.drawn)
        check_model(chosen.model, chosen.device, tp, MOST + plan.drawn, blocks)
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
    targets = chosen.model == _DEMO and chosen.device == "cpu"
    report["ratios"] = make_ratios(seen, targets)
    return report


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
