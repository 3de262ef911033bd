"""`onecast bench e2e`: the same prompts, the same tokens, one control protocol after the other.

Owns the command: which model, how many ranks, launches and turns, and where the report goes. How
it is measured stands in `e2e_measure`.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from onecast.comm.all_reduce import TRANSPORTS
from onecast.runtime.model_config import ModelConfig
from onecast.runtime.model_runner import compute_dtype

from . import peers
from .arguments import at_least_one, made_folder
from .e2e_channels import CHANNELS
from .e2e_machine import check_config
from .e2e_measure import BATCHES, DEMO, Amount, Chosen, measure, room_of
from .e2e_rows import TokensDiffer
from .e2e_tables import print_report
from .synthetic import SHAPES, default_cache, synthetic_model
from .terminal import deliver, make_parser, write

QUICK = Amount(launches=1, rounds=1, drawn=24, telemetry_rounds=4, steps=25, batches=(1, 8, 64))
FULL = Amount(launches=3, rounds=4, drawn=48, telemetry_rounds=16, steps=75)


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write what is asked for; returns the exit status."""
    options = _parser().parse_args(argv)
    amount = QUICK if options.quick else FULL
    given = {"batches": options.batch, "drawn": options.drawn, "rounds": options.rounds}
    amount = amount._replace(**{name: value for name, value in given.items() if value is not None})
    try:
        chosen = _choose(options, amount, shlex.join(["onecast", "bench", "e2e", *argv]))
        report = measure(chosen, amount)
        if options.peer:
            print(f"peers: {', '.join(options.peer)}", file=sys.stderr, flush=True)
            report["peers"] = peers.measure_peers(
                options.peer, chosen.model, drawn=amount.drawn, quick=options.quick
            )
            report["ratios"] += report["peers"]["ratios"]
    except (ValueError, OSError) as error:
        print(f"onecast: {error}", file=sys.stderr)
        return 2
    except TokensDiffer as difference:
        print(f"onecast: {difference}", file=sys.stderr)
        return 1
    status = deliver(report, options.json, print_report)
    if options.report is not None:
        page = import_module("onecast.runtime.bench.e2e_page")  # plots: not needed to measure
        shown = json.loads(json.dumps(report))
        status |= write(
            "--report", options.report, lambda: page.write_report(shown, options.report)
        )
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
        help=f"sequences that decode together ({','.join(map(str, BATCHES))})",
    )  # fmt: skip
    parser.add_argument(
        "--channels", default="all", metavar="NAME[,NAME..]", help=f"of {', '.join(CHANNELS)} (all)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument(
        "--all-reduce", choices=TRANSPORTS, default="auto",
        help="how CPU ranks sum, as for generate (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--drawn", type=at_least_one, metavar="N", help="tokens drawn by each sequence"
    )
    parser.add_argument(
        "--rounds", type=at_least_one, metavar="N", help="turns of each in a launch"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", default=default_cache(),
        help="where synthetic models are kept (%(default)s)",
    )  # fmt: skip
    peers.add_peer_option(parser)
    parser.add_argument(
        "--report", type=made_folder, metavar="DIR", help="also write an HTML page there"
    )
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(at_least_one, text.split(","))))


def _choose(options: argparse.Namespace, amount: Amount, command: str) -> Chosen:
    """ValueError for a channel or a model that there is not, or that does not fit here."""
    names = tuple(CHANNELS) if options.channels == "all" else tuple(options.channels.split(","))
    for name in names:
        if name not in CHANNELS:
            raise ValueError(f"--channels: {name!r} is none of {', '.join(CHANNELS)}")
    channels = tuple(name for name in CHANNELS if name in names)
    if options.synthetic is not None:
        model = synthetic_model(
            options.synthetic, options.cache, partial(_check_synthetic, options, amount)
        )
        name = f"synthetic {options.synthetic}"
    elif options.model is not None:
        model, name = options.model, options.model.resolve().name
    else:
        model, name = DEMO, "demo checkpoint"
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


def _check_synthetic(options: argparse.Namespace, amount: Amount, config: ModelConfig) -> None:
    """Before gigabytes are written for a model that cannot run here."""
    dtype = compute_dtype("auto", config, torch.device(options.device))
    assert dtype is not None, "the shapes of synthetic models name their dtype"
    for tp in options.tp:
        check_config(config, dtype, options.device, tp, *room_of(amount))
