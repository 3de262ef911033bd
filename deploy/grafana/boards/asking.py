"""What Grafana would ask Prometheus to show a board, and what it would show.

Owns the reading of a dashboard's JSON: its variables, their values, `$name` in expressions and
titles, repeated panels. Draws nothing. For tests and for pictures without a Grafana.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Get = Callable[..., Any]  # (path, **parameters) -> `data` of an answer of Prometheus' /api/v1
_LABEL_VALUES = re.compile(r"label_values\((?P<series>.*),\s*(?P<label>\w+)\)")
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$([A-Za-z_]\w*)")  # not $1, which is label_replace's


@dataclass(frozen=True)
class Span:
    """The time that is shown, in seconds since the epoch, and how finely."""

    start_s: float
    end_s: float
    step_s: float
    scrape_s: float

    def builtin(self) -> dict[str, str]:
        """Grafana's own variables; its $__rate_interval holds four scrapes or more."""
        rate_s = max(self.step_s + self.scrape_s, 4 * self.scrape_s)
        return {
            "__rate_interval": _milliseconds(rate_s),
            "__interval": _milliseconds(self.step_s),
            "__range": _milliseconds(self.end_s - self.start_s),
        }


@dataclass
class Answer:
    """One query's: rows of (labels, [(time_s, value)]); exemplars are (time_s, value, labels)."""

    query: dict[str, Any]
    expr: str
    series: list[tuple[dict[str, str], list[tuple[float, float]]]]
    exemplars: list[tuple[float, float, dict[str, str]]] = field(default_factory=list)

    def legend(self, labels: Mapping[str, str]) -> str:
        text = str(self.query["legendFormat"])
        if text == "__auto":
            return ", ".join(f"{k}={v}" for k, v in labels.items() if k != "__name__")
        return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda m: labels.get(m[1], ""), text)


def _milliseconds(seconds: float) -> str:
    return f"{max(1, math.ceil(seconds * 1000))}ms"


def variables_of(board: Mapping[str, Any], get: Get, span: Span) -> dict[str, list[str]]:
    """Each variable's values, all of them chosen; the ones it depends on come before it."""
    found: dict[str, list[str]] = {}
    for variable in board["templating"]["list"]:
        if variable["type"] != "query":
            continue
        asked = _LABEL_VALUES.fullmatch(variable["query"]["query"])
        if asked is None:
            raise ValueError(f"variable {variable['name']}: {variable['query']['query']!r}")
        series = interpolate(asked["series"], found)
        path = f"label/{asked['label']}/values"
        times = {"start": str(span.start_s), "end": str(span.end_s)}
        found[variable["name"]] = get(path, **{"match[]": series}, **times)
    return found


def interpolate(
    text: str, variables: Mapping[str, list[str]], builtin: Mapping[str, str] | None = None
) -> str:
    """`text` with its variables' values; ValueError for one that is not there."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if builtin and name in builtin:
            return builtin[name]
        if name not in variables:
            raise ValueError(f"no variable ${name}: {text}")
        chosen = [re.escape(one).replace("\\", "\\\\") for one in variables[name]]
        return chosen[0] if len(chosen) == 1 else f"({'|'.join(chosen)})"

    return _VARIABLE.sub(value, text)


def panels_of(
    board: Mapping[str, Any], variables: Mapping[str, list[str]]
) -> Iterator[tuple[dict[str, Any], dict[str, list[str]]]]:
    """Rows and panels in their order, with the variables they see; repeated ones once a value."""
    shift = 0
    for panel in board["panels"]:
        panel = copy.deepcopy(panel)
        panel["gridPos"]["y"] += shift
        if not panel.get("repeat"):
            yield panel, dict(variables)
            continue
        values, across = variables[panel["repeat"]], int(panel["maxPerRow"])
        width, height = 24 // min(across, len(values)), panel["gridPos"]["h"]
        for number, value in enumerate(values):
            place = {"x": number % across * width, "w": width, "h": height}
            place["y"] = panel["gridPos"]["y"] + number // across * height
            narrowed = {**variables, panel["repeat"]: [value]}
            title = re.sub(rf"\${panel['repeat']}\b", value, panel["title"])
            yield {**copy.deepcopy(panel), "gridPos": place, "title": title}, narrowed
        shift += (math.ceil(len(values) / across) - 1) * height


def ask(
    panel: Mapping[str, Any], variables: Mapping[str, list[str]], get: Get, span: Span
) -> list[Answer]:
    """The answers to a panel's queries."""
    answers = []
    for target in panel["targets"]:
        expr = interpolate(target["expr"], variables, span.builtin())
        if target.get("instant"):
            result = get("query", query=expr, time=str(span.end_s))["result"]
            rows = [(one["metric"], [one["value"]]) for one in result]
        else:
            result = get(
                "query_range",
                query=expr,
                start=str(span.start_s),
                end=str(span.end_s),
                step=str(span.step_s),
            )["result"]
            rows = [(one["metric"], one["values"]) for one in result]
        series = [(labels, [(float(t), float(v)) for t, v in values]) for labels, values in rows]
        answer = Answer(dict(target), expr, series)
        if target.get("exemplar"):
            times = {"start": str(span.start_s), "end": str(span.end_s)}
            found = get("query_exemplars", query=expr, **times)
            answer.exemplars = [
                (float(one["timestamp"]), float(one["value"]), one["labels"])
                for one in itertools.chain.from_iterable(s["exemplars"] for s in found)
            ]
        answers.append(answer)
    return answers
