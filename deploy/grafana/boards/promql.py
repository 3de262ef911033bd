"""Expressions over onecast's series, each checked against the catalogue when it is written.

Owns which labels select what a dashboard's variables chose. Knows no panel.

A label's value is matched as it stands; one that begins with =~, != or !~ brings its operator.
"""

from onecast.telemetry.catalogue import CATALOGUE  # noqa: TID251 - what /metrics really has

INTERVAL = "[$__rate_interval]"
_PARTS = {"histogram": ("_bucket", "_sum", "_count")}


def select(series: str, *, chosen: tuple[str, ...] = ("rank",), **labels: str) -> str:
    """A selector of `series`, within the job and the instances that were chosen.

    Of `chosen`, those that the series has and `labels` does not say select by the variable of that
    name. ValueError for a series or a label that the catalogue does not have.
    """
    has = _labels_of(series)
    unknown = labels.keys() - has
    if unknown:
        raise ValueError(f"{series} has no label {sorted(unknown)[0]!r}; it has {sorted(has)}")
    matchers = ['job=~"$job"', 'instance=~"$instance"']
    matchers += [f'{name}=~"${name}"' for name in chosen if name in has and name not in labels]
    for name, value in labels.items():
        operator = value[:2] if value[:2] in ("=~", "!=", "!~") else ""
        matchers.append(f'{name}{operator or "="}"{value.removeprefix(operator)}"')
    return f"{series}{{{','.join(matchers)}}}"


def _labels_of(series: str) -> set[str]:
    for name, metric in CATALOGUE.items():
        parts = [name + part for part in _PARTS.get(metric.kind, ("",))]
        if series in parts:
            return {*metric.labels, *(["le"] if series.endswith("_bucket") else [])}
    raise ValueError(f"no series {series!r} in the catalogue of onecast.telemetry")


def rate(series: str, *, chosen: tuple[str, ...] = ("rank",), **labels: str) -> str:
    """Per second."""
    return f"rate({select(series, chosen=chosen, **labels)}{INTERVAL})"


def sum_rate(
    series: str, by: tuple[str, ...] = (), *, chosen: tuple[str, ...] = ("rank",), **labels: str
) -> str:
    """Per second, added up but for the labels `by`."""
    return f"sum{_by(by)} ({rate(series, chosen=chosen, **labels)})"


def quantile(
    share: float,
    histogram: str,
    by: tuple[str, ...] = (),
    *,
    chosen: tuple[str, ...] = ("rank",),
    **labels: str,
) -> str:
    """The value below which `share` of a histogram's observations lie, exact to its buckets."""
    inner = sum_rate(f"{histogram}_bucket", ("le", *by), chosen=chosen, **labels)
    return f"histogram_quantile({share}, {inner})"


def mean(
    histogram: str,
    by: tuple[str, ...] = (),
    *,
    chosen: tuple[str, ...] = ("rank",),
    **labels: str,
) -> str:
    """The mean of a histogram's observations; nothing where there were none."""
    return ratio(
        sum_rate(f"{histogram}_sum", by, chosen=chosen, **labels),
        sum_rate(f"{histogram}_count", by, chosen=chosen, **labels),
    )


def buckets(histogram: str, *, chosen: tuple[str, ...] = ("rank",), **labels: str) -> str:
    """What a heat map takes: observations by bucket, in the interval that a column stands for."""
    selector = select(f"{histogram}_bucket", chosen=chosen, **labels)
    return f"sum by (le) (increase({selector}{INTERVAL}))"


def ratio(part: str, whole: str, matching: str = "") -> str:
    """`part / whole`; nothing where the whole is nothing, instead of a division by zero."""
    return f"{part} / {matching + ' ' if matching else ''}({whole} > 0)"


def in_range(series: str, **labels: str) -> str:
    """How much a counter grew over the time that is shown; 0 for one that never counted.

    A series that begins with its first event has no increase for it: its value stands in.
    """
    selector = select(series, chosen=("rank",), **labels)
    return (
        f"sum(increase({selector}[$__range]) > 0 or "
        f"({selector} unless {selector} offset $__range)) or vector(0)"
    )


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""
