"""`onecast gpu-check`: every test and every benchmark that needs a GPU, and a short table last.

Owns the command: what this machine lacks, in which order the parts run, the verdict and the JSON.
It needs no more than the standard library to say what is missing, and installs nothing.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .bench.arguments import at_least_one, made_folder, new_file
from .gpu_parts import (
    NEEDED,
    PARTS,
    ROOT,
    TESTS,
    TOTAL_S,
    limit_of,
    run_benchmark,
    run_tests,
)
from .gpu_report import FAILED, NOT_RUN, OUT_OF_TIME, Outcome, print_report

_INCOMPLETE = 3
_STEPS = 500
_ENVIRONMENT = ("NCCL_MULTI_RANK_GPU_ENABLE", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES")


_HELP = """\
Run all tests and benchmarks that need a GPU, and print a short table last. From a bare checkout:

    PYTHONPATH=.links python -P -m onecast.runtime.gpu_check

All of it takes less than eight minutes: each part has its share of them, and what those before it
left. The JSON is written anew after each part: what is known stays, whatever ends the command. The
part e2e writes 2.5 GB of random weights, once, to `~/.cache/onecast`.

The environment goes to every part as it is. Several ranks of NCCL on one GPU need NCCL 2.30, which
may be another than torch's; without, the parts skip what they need several ranks for:

    LD_PRELOAD=.../nvidia/nccl/lib/libnccl.so.2 NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 \\
        NCCL_MAX_CTAS=4 onecast gpu-check              # of the package nvidia-nccl-cu13

A machine that has torch but not msgspec, and no network, gets it as a wheel from elsewhere:

    pip download --no-deps --only-binary=:all: --python-version 3.12 \\
        --platform manylinux2014_x86_64 --dest wheels msgspec       # elsewhere
    pip install --no-index --no-deps --target site wheels/*.whl     # there; PYTHONPATH=.links:site

Exit status 0: all parts have run and all tests have passed, but for what was skipped for a reason
that is printed; 1: something failed; 2: bad usage; 3: nothing failed, but parts did not run because
this machine lacks what they need (a GPU, torch, pytest), or did not come to their end in time.
Figures that are missed are printed so.
"""


class Missing(NamedTuple):
    """What this machine lacks; `parts` cannot run for it."""

    what: str
    parts: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts and print the table; returns the exit status."""
    start = time.monotonic()
    options = _parser().parse_args(argv)
    missing = find_missing(options.device)
    machine = describe_machine()
    for line in machine:
        print(line)
    for one in missing:
        print(f"MISSING: {one.what}; without it: no {', '.join(one.parts)}")
    if any(one.what.startswith("the package") for one in missing):
        print("How to bring a package to a machine without a network: see --help")
    sys.stdout.flush()
    outcomes = []
    for outcome in _run(options, missing, start + TOTAL_S):
        outcomes.append(outcome)
        if options.json is not None:
            report = {
                "machine": machine,
                "missing": [one.what for one in missing],
                "seconds": time.monotonic() - start,
                "parts": [one._asdict() for one in outcomes],
            }
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.report is not None:
        _write_pages(outcomes, options.report)
    note = "" if options.device == "cuda" else ", tried out on the CPU"
    print_report(outcomes, f" ({time.monotonic() - start:.0f} s{note})")
    states = {outcome.state for outcome in outcomes}
    return 1 if FAILED in states else _INCOMPLETE if {NOT_RUN, OUT_OF_TIME} & states else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onecast gpu-check",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="also write the results there"
    )
    parser.add_argument(
        "--report",
        type=made_folder,
        metavar="DIR",
        help="also write the pages of the part e2e there",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the command out"
    )
    parser.add_argument(
        "--steps", type=at_least_one, default=_STEPS, help="of a benchmark (%(default)s)"
    )
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", metavar="DIR")
    parser.add_argument(
        "--only", choices=tuple(PARTS), action="append", help="one part; any number of times"
    )
    return parser


def _run(
    options: argparse.Namespace, missing: Sequence[Missing], deadline: float
) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory(prefix="onecast-gpu-check-") as folder:
        chosen = [name for name in PARTS if not options.only or name in options.only]
        for name in chosen:
            lacks = [one.what for one in missing if name in one.parts]
            budget_s = limit_of(name, chosen, deadline - time.monotonic())
            if lacks:
                yield Outcome(name, NOT_RUN, f"missing: {', '.join(lacks)}")
            elif name == TESTS:
                yield run_tests(options.tests, Path(folder, "tests.xml"), budget_s)
            else:
                result = Path(folder, f"{name}.json")
                yield run_benchmark(name, options.device, options.steps, result, budget_s)


def _write_pages(outcomes: Sequence[Outcome], folder: Path) -> None:
    """One for each number of ranks; none where the part has not run."""
    for report in (report for outcome in outcomes for report in outcome.reports):
        from .bench.e2e_page import write_report

        print(write_report(report, folder / f"tp{max(report['plan']['tp'])}"))


def find_missing(device: str) -> list[Missing]:
    """What the parts need and this machine has not."""
    everything = tuple(PARTS)
    missing = []
    needs = dict.fromkeys(NEEDED, everything)
    for name, part in PARTS.items():
        for package in part.needs:
            needs[package] = (*needs.get(package, ()), name)
    for package, parts in needs.items():
        if importlib.util.find_spec(package) is None:
            missing.append(Missing(f"the package {package}", parts))
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: of a library that it loads
        missing.append(Missing(f"torch ({error})", everything))
    else:
        if device == "cuda" and not torch.cuda.is_available():
            why = "built without CUDA" if torch.version.cuda is None else "it sees none"
            missing.append(Missing(f"a GPU that torch can use ({why})", everything))
    return missing


def describe_machine() -> list[str]:
    """Lines that say what the results are of."""
    lines = [f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores"]
    try:
        import torch
    except (ImportError, OSError):
        pass  # it is missing, and told so
    else:
        lines[0] += f", torch {torch.__version__}"
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            names = {torch.cuda.get_device_name(index) for index in range(count)}
            lines[0] += f", {count} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
            from .bench.nccl import nccl_version

            lines[0] += f", NCCL {'.'.join(map(str, nccl_version())) or 'missing'}"
    for name in _ENVIRONMENT:
        lines.append(f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set")
    return lines


if __name__ == "__main__":
    sys.exit(main())
