"""The same families written by prometheus_client: what our own text is compared with."""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest as plain_text
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.registry import Collector, CollectorRegistry

from onecast.telemetry.exposition import Family, Histograms


class Families(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = list(families)

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        return map(_metric, self._families)


def _metric(family: Family) -> Any:
    name, kind, labels, text = family.metric
    if isinstance(family, Histograms):
        histogram: Any = HistogramMetricFamily(name, text, labels=labels)
        for frozen, further in family.parts:
            bounds = [*map(repr, frozen.scale.bounds), "+Inf"]
            for place, key in enumerate(frozen.keys):
                values = key if isinstance(key, tuple) else (key,)
                exemplars = frozen.exemplars.get(place, [None] * len(bounds))
                buckets: list[Any] = []
                for bound, count, found in zip(
                    bounds, frozen.cumulative[place].tolist(), exemplars, strict=True
                ):
                    buckets.append((bound, count))
                    if found is not None:
                        ids = {"trace_id": f"{found.trace_id:032x}"}
                        if found.span_id:
                            ids["span_id"] = f"{found.span_id:016x}"
                        buckets[-1] = (bound, count, Exemplar(ids, found.value, found.time_s))
                histogram.add_metric([*map(str, values), *further], buckets, frozen.sums[place])
        return histogram
    numbers: Any = (
        CounterMetricFamily(name.removesuffix("_total"), text, labels=labels)
        if kind == "counter"
        else GaugeMetricFamily(name, text, labels=labels)
    )
    for values, number in family.samples:
        numbers.add_metric(list(map(str, values)), number)
    return numbers


def reference(families: Iterable[Family], *, openmetrics: bool) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Families(families))
    text: bytes = (openmetrics_text if openmetrics else plain_text)(registry)
    return text.decode()
