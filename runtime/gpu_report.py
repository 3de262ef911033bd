"""What became of the parts of `gpu-check`: pytest's own report read, and the table of it all.

Plain text, and the standard library alone: a machine with a GPU may have no more.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
NOT_RUN = "not run"  # for want of what the machine should have
OUT_OF_TIME = "out of time"  # ended before it came to its end; what it has found by then is there

_NO_MODULE = re.compile(r"No module named '([^'.]+)[^']*'")


class Outcome(NamedTuple):
    """Of one part; `state` is one of the five above."""

    part: str
    state: str
    text: str
    seconds: float = 0.0
    skipped: tuple[str, ...] = ()  # what, and for which reason
    failed: tuple[str, ...] = ()
    rows: Sequence[dict[str, Any]] = ()
    ratios: Sequence[dict[str, Any]] = ()  # name, value, target, holds
    reports: Sequence[dict[str, Any]] = ()  # of a benchmark, whole


def read_junit(text: str, seconds: float) -> Outcome:
    """What pytest reports. A module that needs a package which is not here counts as skipped."""
    skipped: Counter[str] = Counter()
    failed: list[str] = []
    passed = 0
    for case in ElementTree.fromstring(text).iter("testcase"):
        name = ".".join(filter(None, (case.get("classname"), case.get("name"))))
        skip, problems = case.find("skipped"), [*case.iterfind("failure"), *case.iterfind("error")]
        if problems:
            package = _missing_package(problems[0])
            if package is not None:
                skipped[f"{name}: needs the package {package}"] += 1
            else:
                failed.append(f"{name}: {_first_line(problems[0])}")
        elif skip is not None:
            skipped[f"{name.partition('[')[0]}: {skip.get('message', 'no reason')}"] += 1
        else:
            passed += 1
    summary = f"{passed} passed, {len(failed)} failed, {sum(skipped.values())} skipped"
    reasons = tuple(f"{what} ({count}x)" if count > 1 else what for what, count in skipped.items())
    if not (passed or failed or skipped):
        return Outcome("tests", FAILED, "not one test was found", seconds)
    state = FAILED if failed else PASSED if passed else SKIPPED
    return Outcome("tests", state, summary, seconds, reasons, tuple(failed))


def _missing_package(problem: ElementTree.Element) -> str | None:
    """The package for want of which a module was not imported."""
    found = _NO_MODULE.findall(f"{problem.get('message', '')}\n{problem.text or ''}")
    if not found or problem.get("message") != "collection failure":
        return None
    package: str = found[-1]
    return package if importlib.util.find_spec(package) is None else None


def _first_line(problem: ElementTree.Element) -> str:
    text = (problem.get("message") or problem.text or "no text").strip()
    return text.splitlines()[0][:200]


def print_report(outcomes: Sequence[Outcome], note: str = "") -> None:
    """The table, the reasons for what is not in it, and the verdict on the last line."""
    print("\n==== gpu-check")
    for outcome in outcomes:
        for table in (*_by_method(outcome), *_figures(outcome)):
            print()
            _print_columns(table)
    for outcome in outcomes:
        for title, lines in (("skipped", outcome.skipped), ("FAILED", outcome.failed)):
            if lines:
                print(f"\n{outcome.part}, {title}:")
                print("\n".join(f"  {line}" for line in lines))
    print()
    _print_columns(
        [("part", "state", "seconds", "")]
        + [(one.part, one.state, f"{one.seconds:.1f}", one.text) for one in outcomes]
    )
    print(f"\ngpu-check: {_verdict(outcomes)}{note}", flush=True)


def _verdict(outcomes: Sequence[Outcome]) -> str:
    said = []
    for state in (FAILED, NOT_RUN, OUT_OF_TIME):
        parts = [outcome.part for outcome in outcomes if outcome.state == state]
        if parts:
            said.append(f"{state.upper()} ({', '.join(parts)})")
    return "; ".join(said) or "ok"


def _by_method(outcome: Outcome) -> list[list[tuple[str, ...]]]:
    """The rows of a benchmark as tables: a line per method, two columns per metric.

    A table for each set of metrics that methods have in common.
    """
    lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in outcome.rows:
        lines.setdefault((row["workload"], row["method"]), {})[row["metric"]] = row
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for (workload, method), of in lines.items():
        titles = [title for metric in of for title in (metric, "p99")]
        table = tables.setdefault((*of,), [(outcome.part, "method", *titles, "n")])
        cells = [_short(row[which]) for row in of.values() for which in ("median", "p99")]
        table.append((workload, method, *cells, str(next(iter(of.values()))["n"])))
    return list(tables.values())


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.4f}"


def _figures(outcome: Outcome) -> list[list[tuple[str, ...]]]:
    if not outcome.ratios:
        return []
    verdicts = {True: "met", False: "missed", None: ""}
    return [
        [(outcome.part, "value", "target", "")]
        + [
            (one["name"], f"{one['value']:.2f}", one["target"], verdicts[one["holds"]])
            for one in outcome.ratios
        ]
    ]


def _print_columns(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
