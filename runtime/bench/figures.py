"""What the reports of all benchmarks have: rows of measurements, figures against their targets.

Owns how values become a row and how a figure is held against its target. Knows nothing of what was
measured, nor of terminals: it is also for machines without the packages that print.
"""

import operator
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

Row = dict[str, Any]

REPORTED = "reported"  # the target of a figure that has none

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    "=": operator.eq,
}


def summarize(values: Sequence[float]) -> Row:
    """Median, p99 and number of what was measured."""
    return {"median": statistics.median(values), "p99": p99(values), "n": len(values)}


def p99(values: Sequence[float]) -> float:
    """The value of which a hundredth is greater."""
    ordered = sorted(values)
    return ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)]


def make_figure(name: str, target: str, value: float, launches: Sequence[float]) -> Row:
    """Name, value, target, whether it holds, and the spread over the launches' own values."""
    return {
        "name": name,
        "value": value,
        "target": target,
        "holds": holds(value, target),
        "spread": [min(launches), max(launches)],
    }


def holds(value: float, target: str) -> bool | None:
    """Whether a value reaches a target such as ">= 3"; None for one that is only reported."""
    if target == REPORTED:
        return None
    relation, number = target.split()
    return _RELATIONS[relation](value, float(number))


def describe_machine(load: float, *more: str) -> str:
    """A line that says what a report is of; `load` is the machine's before the measurement."""
    cores = len(os.sched_getaffinity(0))
    parts = [
        f"{platform.machine()}, {cores} cores",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        *more,
        f"load {load:.1f} before",
    ]
    return ", ".join(parts)
