"""The text that Prometheus reads: 0.0.4 and OpenMetrics 1.0.0.

Owns escaping, the order of lines and the forms of numbers. What does not change from scrape to
scrape (names and labels of a series) is written once and kept, so that a histogram of twenty
buckets costs one formatting operation. Whole numbers keep all their digits.

    # HELP onecast_step_duration_seconds Time of one step on one rank
    # TYPE onecast_step_duration_seconds histogram
    onecast_step_duration_seconds_bucket{le="1e-06",rank="0"} 0.0 # {trace_id="..."} 7e-07 1.7e9
    onecast_step_duration_seconds_count{rank="0"} 12.0            (exemplars: OpenMetrics only)
    onecast_step_duration_seconds_sum{rank="0"} 0.0624

Knows nothing of what the series mean.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from .catalogue import Metric
from .histograms import Exemplar, Frozen, Scale

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"


Sample = tuple[tuple[str | int, ...], float]  # label values in the metric's order, and the number


class Numbers(NamedTuple):
    """Samples of a counter or a gauge."""

    metric: Metric
    samples: Sequence[Sample]


class Histograms(NamedTuple):
    """Histograms of one metric: tables, each with label values that follow those of its keys."""

    metric: Metric
    parts: Sequence[tuple[Frozen[Any], tuple[str, ...]]]


Family = Numbers | Histograms


def escape(value: str) -> str:
    """A label's value between its quotes."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def label_text(labels: Iterable[tuple[str, str]]) -> str:
    """`{name="value",...}` in the order of the names; nothing without labels."""
    pairs = ",".join(f'{name}="{escape(value)}"' for name, value in sorted(labels))
    return f"{{{pairs}}}" if pairs else ""


def number_text(number: float) -> str:
    if isinstance(number, int):
        return f"{number}.0"
    if math.isfinite(number):
        return repr(float(number))
    return "NaN" if math.isnan(number) else "+Inf" if number > 0 else "-Inf"


def prefers_openmetrics(accept: str | None) -> bool:
    """Whether an Accept header would rather have OpenMetrics than the plain text."""
    best = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for entry in (accept or "").split(","):
        media, *parameters = (part.strip().lower() for part in entry.split(";"))
        fields = dict(part.partition("=")[::2] for part in parameters)
        if media in best and fields.get("version", "1.0.0") in ("1.0.0", "0.0.1", "0.0.4"):
            try:
                quality = float(fields.get("q", "1"))
            except ValueError:
                quality = 0.0
            best[media] = max(best[media], quality)
    return best["application/openmetrics-text"] > 0 and (
        best["application/openmetrics-text"] >= best["text/plain"]
    )


class Exposition:
    """Writes families down; keeps the texts of their series. Not for several threads."""

    def __init__(self) -> None:
        self._series: dict[str, dict[tuple[str | int, ...], str]] = {}  # by metric and labels
        self._histograms: dict[tuple[str, Hashable, tuple[str, ...]], list[str]] = {}

    def render(self, families: Iterable[Family], *, openmetrics: bool) -> bytes:
        """All families as one page, UTF-8; exemplars are in it with `openmetrics`."""
        chunks: list[str] = []
        for family in families:
            metric = family.metric
            name, text = metric.name, metric.help.replace("\\", r"\\").replace("\n", r"\n")
            if openmetrics:
                text = text.replace('"', r"\"")
                if metric.kind == "counter":
                    name = name.removesuffix("_total")
            chunks.append(f"# HELP {name} {text}\n# TYPE {name} {metric.kind}\n")
            if isinstance(family, Numbers):
                self._add_numbers(chunks, family)
            else:
                self._add_histograms(chunks, family, openmetrics)
        if openmetrics:
            chunks.append("# EOF\n")
        return "".join(chunks).encode()

    def _add_numbers(self, chunks: list[str], family: Numbers) -> None:
        metric, known = family.metric, self._series.setdefault(family.metric.name, {})
        for values, number in family.samples:
            start = known.get(values)
            if start is None:
                labels = label_text(zip(metric.labels, map(str, values), strict=True))
                start = known[values] = f"{metric.name}{labels} "
            chunks.append(f"{start}{number_text(number)}\n")

    def _add_histograms(self, chunks: list[str], family: Histograms, openmetrics: bool) -> None:
        metric, known = family.metric, self._histograms
        for frozen, further in family.parts:
            cumulative, sums = frozen.cumulative.tolist(), frozen.sums.tolist()
            for place, key in enumerate(frozen.keys):
                lines = known.get((metric.name, key, further))
                if lines is None:
                    lines = _histogram_lines(metric, key, further, frozen.scale)
                    known[metric.name, key, further] = lines
                counts = cumulative[place]
                exemplars = frozen.exemplars.get(place) if openmetrics else None
                if exemplars is None:
                    chunks.append(lines[0] % (*counts, counts[-1], sums[place]))
                else:
                    texts = [_exemplar_text(one) if one else "" for one in exemplars]
                    pairs = [part for pair in zip(counts, texts, strict=True) for part in pair]
                    chunks.append(lines[1] % (*pairs, counts[-1], sums[place]))


def _histogram_lines(metric: Metric, key: Any, further: tuple[str, ...], scale: Scale) -> list[str]:
    """Templates of one histogram: without and with room for exemplars."""
    own = key if isinstance(key, tuple) else (key,)
    labels = list(zip(metric.labels, (*map(str, own), *further), strict=True))
    bounds = [*map(repr, scale.bounds), "+Inf"]
    starts = [
        f"{metric.name}_bucket{label_text([*labels, ('le', bound)])} ".replace("%", "%%")
        for bound in bounds
    ]
    rest = label_text(labels).replace("%", "%%")
    end = f"{metric.name}_count{rest} %d.0\n{metric.name}_sum{rest} %r\n"
    return ["".join(f"{start}%d.0{room}\n" for start in starts) + end for room in ("", "%s")]


def _exemplar_text(exemplar: Exemplar) -> str:
    labels = [("trace_id", f"{exemplar.trace_id:032x}")]
    if exemplar.span_id:
        labels.append(("span_id", f"{exemplar.span_id:016x}"))
    return f" # {label_text(labels)} {number_text(exemplar.value)} {exemplar.time_s}"
