"""What became of the parts of `gpu-check`: pytest's own report read, and the table of it all.

Plain text, and the standard library alone: a machine with a GPU may have no more.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

_NO_MODULE = re.compile(r"No module named '([^'.]+)[^']*'")


class Outcome(NamedTuple):
    """Of one part; `state` is passed, failed or skipped."""

    part: str
    state: str
    text: str
    seconds: float = 0.0
    skipped: tuple[str, ...] = ()  # what, and for which reason
    failed: tuple[str, ...] = ()
    rows: Sequence[dict[str, Any]] = ()


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
        return Outcome("tests", "failed", "not one test was found", seconds)
    state = "failed" if failed else "passed" if passed else "skipped"
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
        by_method = _by_method(outcome)
        if by_method:
            print()
            _print_columns(by_method)
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
    failed = [outcome.part for outcome in outcomes if outcome.state == "failed"]
    verdict = f"FAILED ({', '.join(failed)})" if failed else "ok"
    print(f"\ngpu-check: {verdict}{note}", flush=True)


def _by_method(outcome: Outcome) -> list[tuple[str, ...]]:
    """The rows of a benchmark as a table: a line per method, two columns per metric."""
    metrics = [*dict.fromkeys(row["metric"] for row in outcome.rows)]
    lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in outcome.rows:
        lines.setdefault((row["workload"], row["method"]), {})[row["metric"]] = row
    if not lines:
        return []
    titles = [title for metric in metrics for title in (metric, "p99")]
    table: list[tuple[str, ...]] = [(outcome.part, "method", *titles, "n")]
    for (workload, method), of in lines.items():
        cells = [f"{of[metric][which]:.1f}" for metric in metrics for which in ("median", "p99")]
        table.append((workload, method, *cells, str(of[metrics[0]]["n"])))
    return table


def _print_columns(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
