"""What every benchmark of `onecast gpu-check` is asked, and how it hands over what it found.

Owns the options, and the file that the results go to. It is written anew whenever something was
found, so that a part which is ended for want of time still leaves what it has:

    {"rows": [...], "ratios": [...], "skipped": ["what: why"], "reports": [...]}

Ranks that do not come to an end in time show their stacks, and the exit status says so. Knows
nothing of what is measured.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from onecast.comm.testing import RanksHung

from .arguments import at_least_one

Row = dict[str, Any]
STEPS = 500
HUNG_STATUS = 4  # ranks did not come to an end in time


class Asked(NamedTuple):
    """How much, and where."""

    device: str  # "cuda", "cpu"
    steps: int  # timed ones, at most
    deadline: float  # of time.monotonic

    @property
    def timeout_s(self) -> float:
        """What is left for all ranks of a launch."""
        return max(self.deadline - time.monotonic(), 1.0)


class Results:
    """What a part has found so far."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.found: dict[str, list[Any]] = {"rows": [], "ratios": [], "skipped": [], "reports": []}

    def add(self, **found: Sequence[Any]) -> None:
        """More of `rows`, `ratios`, `skipped` or whole `reports`; the file has it at once."""
        for name, more in found.items():
            self.found[name] += more
        if self.path is not None:
            unfinished = self.path.with_suffix(".part")  # whoever reads finds the whole of it
            unfinished.write_text(self.text())
            os.replace(unfinished, self.path)

    def text(self) -> str:
        return json.dumps(self.found, indent=2) + "\n"


Measure = Callable[[Asked, Results], None]


def run_part(module: str, doc: str | None, measure: Measure, argv: Sequence[str] | None) -> int:
    """Read the options, measure, and print what was found unless a file takes it.

    Returns the exit status: 0, or HUNG_STATUS.
    """
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog=module, description=doc)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=at_least_one, default=STEPS, help="timed ones, %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument(
        "--timeout", type=float, default=180.0, metavar="S", help="for all launches"
    )
    options = parser.parse_args(argv)
    results = Results(options.json)
    status = 0
    try:
        measure(Asked(options.device, options.steps, start + options.timeout), results)
    except RanksHung as error:
        print(error, file=sys.stderr)
        status = HUNG_STATUS
    results.add()
    if options.json is None:
        sys.stdout.write(results.text())
    return status
