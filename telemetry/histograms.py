"""Histograms of durations and sizes, counted by numpy.

Owns the buckets. Each histogram counts in fine buckets, sixteen (durations) or eight (sizes) to
an octave, every edge of the coarse ones among them: Prometheus gets the coarse ones by summing,
exactly; quantiles come from the fine ones, good to about 5%. Knows nothing of what is counted.
"""

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class Scale:
    """Bucket edges (inclusive upper bounds) from `smallest` up, `per_octave` to a doubling."""

    def __init__(
        self, smallest: int, octaves: int, per_octave: int, shown: range, unit: float
    ) -> None:
        exponents = np.arange(octaves * per_octave + 1) / per_octave
        self.edges: Integers = np.floor(smallest * 2.0**exponents).astype(np.int64)
        self.unit = unit
        self.bounds = [smallest * 2**octave * unit for octave in shown]
        self._shown = [octave * per_octave for octave in shown]

    def index(self, values: Integers) -> Integers:
        return np.searchsorted(self.edges, values, side="left")

    def cumulative(self, counts: Integers) -> list[int]:
        """Counts at or below each of `bounds`, then all."""
        totals = np.cumsum(counts)
        return [int(totals[index]) for index in self._shown] + [int(totals[-1])]


# 1 µs x 2^0 .. 2^18 are shown; the fine edges start at 125 ns and end at 67 s.
# 125 ns x 2^3 = 1 µs exactly, so the shown edges are whole nanoseconds.
DURATIONS = Scale(125, 29, 16, range(3, 22), 1e-9)
# 64 B x 4^0 .. 4^10 are shown.
SIZES = Scale(64, 24, 8, range(0, 21, 2), 1.0)


class Histogram:
    """Counts of one series. Sums are exact integers of the scale's unit."""

    __slots__ = ("count", "counts", "scale", "total")

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.counts: Integers = np.zeros(len(scale.edges) + 1, np.int64)
        self.count = 0
        self.total = 0

    def add(self, values: Integers) -> None:
        self.counts += np.bincount(self.scale.index(values), minlength=len(self.counts))
        self.count += len(values)
        self.total += int(values.sum())

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, cumulative count), as prometheus_client takes them."""
        bounds = [*(repr(bound) for bound in self._shown_bounds()), "+Inf"]
        return list(zip(bounds, map(float, self.scale.cumulative(self.counts)), strict=True))

    def _shown_bounds(self) -> list[float]:
        return [float(f"{bound:.9g}") for bound in self.scale.bounds]

    @property
    def sum(self) -> float:
        return self.total * self.scale.unit

    def quantile(self, fraction: float) -> float | None:
        """The value that `fraction` of the counted ones do not exceed; None without any."""
        return merged_quantile([self], fraction)


def merged_quantile(histograms: list["Histogram"], fraction: float) -> float | None:
    """A quantile of several histograms of one scale, as if they were one."""
    counts = np.sum([histogram.counts for histogram in histograms], axis=0)
    total = int(counts.sum())
    if not total:
        return None
    scale = histograms[0].scale
    target = max(1, int(np.ceil(fraction * total)))
    bucket = int(np.searchsorted(np.cumsum(counts), target))
    edges = scale.edges
    upper = edges[min(bucket, len(edges) - 1)]
    lower = edges[bucket - 1] if 0 < bucket < len(edges) else upper
    return float(np.sqrt(float(lower) * float(upper))) * scale.unit
