"""Figures of several launches: rows, and ratios with their targets.

Owns the names of the ratios. A ratio is of medians over all launches; its spread is from the lowest
to the highest launch.
"""

import math
import statistics
from collections.abc import Callable, Sequence

import torch

from .all_reduce import GLOO as GLOO_SUM
from .all_reduce import GLOO_AGAIN as GLOO_SUM_AGAIN
from .all_reduce import METRIC as ALL_REDUCE
from .all_reduce import SHM as SHM_SUM
from .all_reduce import SIZES
from .figures import REPORTED, Row, make_figure, summarize
from .launch import BROADCASTS, CPU, METADATA, ONE_WAY, Figures, Key
from .methods import FLOOR, GROUP, PICKLE, RAW, RAW_AGAIN, SHM, SPINNING, steady_frame
from .workloads import make_workload

Median = Callable[[Key], float]

TWO = "two-broadcasts"


def make_rows(launches: Sequence[Figures]) -> list[Row]:
    """One row per workload, method, ranks, mode and metric, over all launches."""
    pooled = _pool(launches)
    return [{**key._asdict(), **summarize(values)} for key, values in pooled.items()]


def make_ratios(launches: Sequence[Figures]) -> list[Row]:
    """The figures to reach, and a few beside them that say how they came about."""
    medians = [_medians(_pool(launches)), *(_medians(launch) for launch in launches)]
    ratios = []
    for name, (target, value) in _RATIOS.items():
        first, *others = [value(median) for median in medians]
        ratios.append(make_figure(name, target, first, others))
    return ratios


def _pool(launches: Sequence[Figures]) -> Figures:
    pooled: Figures = {}
    for figures in launches:
        for key, values in figures.items():
            pooled.setdefault(key, []).extend(values)
    return pooled


def _medians(figures: Figures) -> Median:
    return lambda key: statistics.median(figures[key])


def one_way(method: str, mode: str = "tight", workload: str = "W2", ranks: int = 2) -> Key:
    """The row of one-way times."""
    return Key(workload, method, ranks, mode, ONE_WAY)


def all_reduces(size: str, method: str, ranks: int) -> Key:
    """The row of all-reduces of that size."""
    return Key(size, method, ranks, "tight", ALL_REDUCE)


def _all_reduces(size: str, ranks: int) -> Callable[[Median], float]:
    gloo, shm = (all_reduces(size, method, ranks) for method in (GLOO_SUM, SHM_SUM))
    return lambda median: median(gloo) / median(shm)


def _ratio(
    over: str, under: str, mode: str = "tight", workload: str = "W2", ranks: int = 2
) -> Callable[[Median], float]:
    where = (mode, workload, ranks)
    return lambda median: median(one_way(over, *where)) / median(one_way(under, *where))


def _value(key: Key) -> Callable[[Median], float]:
    return lambda median: median(key)


def _broadcasts_share(workload: str) -> Callable[[Median], float]:
    """Percent of the logarithm of the gain; each of the two orders of taking the steps half."""

    def percent(median: Median) -> float:
        fat_many, fat_one, compact_many, compact_one = (
            math.log(median(one_way(f"ablation-{cell}", workload=workload)))
            for cell in ("fat-many", "fat-one", "compact-many", "compact-one")
        )
        by_broadcasts = (fat_many - fat_one + compact_many - compact_one) / 2
        return 100 * by_broadcasts / (fat_many - compact_one)

    return percent


def _metadata_bytes_per_tensor(median: Median) -> float:
    """What each of 8 further tensors [8, 2] adds to the block message."""
    base = make_workload("W1")
    more = {f"further_{i}": torch.zeros(8, 2, dtype=torch.int64) for i in range(8)}
    return (steady_frame({**base, **more})[1] - steady_frame(base)[1]) / len(more)


_RATIOS: dict[str, tuple[str, Callable[[Median], float]]] = {
    "shm_vs_two_broadcast_W2": (">= 150", _ratio(TWO, SHM)),
    "gloo_vs_two_broadcast_W2": (">= 10", _ratio(TWO, GROUP)),
    "gloo_vs_raw_W2": ("<= 1.3", _ratio(GROUP, RAW)),
    "shm_one_way_us_W2": (REPORTED, _value(one_way(SHM))),
    "shm_vs_floor_W2": ("<= 5", _ratio(SHM, FLOOR)),
    "shm_vs_pickle_numpy_shm_W2": (">= 3", _ratio(PICKLE, SHM)),
    "idle_wait_cpu_percent": ("< 1", _value(Key("W2", SHM, 2, "idle", CPU))),
    "paced_wait_cpu_percent": ("<= 15", _value(Key("W2", SHM, 2, "paced", CPU))),
    "paced_one_way_vs_spinning": ("<= 1.5", _ratio(SHM, SPINNING, "paced")),
    "metadata_bytes_block_message": ("<= 40", _value(Key("W1", SHM, 2, "steady", METADATA))),
    "metadata_bytes_per_tensor": ("<= 3", _metadata_bytes_per_tensor),
    "broadcasts_per_step": ("= 1", _value(Key("W2", GROUP, 2, "steady", BROADCASTS))),
    "shm_allreduce_vs_gloo_16KiB": (">= 4", _all_reduces("16 KiB", 2)),
    **{
        f"shm_allreduce_vs_gloo_{size.replace(' ', '')}": (REPORTED, _all_reduces(size, 2))
        for size in SIZES
        if size != "16 KiB"
    },
    "shm_allreduce_vs_gloo_16KiB_4_ranks": (REPORTED, _all_reduces("16 KiB", 4)),
    "shm_allreduce_us_16KiB": (REPORTED, _value(all_reduces("16 KiB", SHM_SUM, 2))),
    "gloo_again_vs_gloo_allreduce_16KiB": (
        REPORTED,
        lambda median: (
            median(all_reduces("16 KiB", GLOO_SUM_AGAIN, 2))
            / median(all_reduces("16 KiB", GLOO_SUM, 2))
        ),
    ),
    # What a difference has to exceed to be one: the same method twice.
    "raw_again_vs_raw_W2": (REPORTED, _ratio(RAW_AGAIN, RAW)),
    # Every method finding the caches full of the others.
    "shm_vs_two_broadcast_W2_alternating": (REPORTED, _ratio(TWO, SHM, "alternating")),
    "gloo_vs_two_broadcast_W2_alternating": (REPORTED, _ratio(TWO, GROUP, "alternating")),
    "gloo_vs_raw_W2_alternating": (REPORTED, _ratio(GROUP, RAW, "alternating")),
    "shm_vs_floor_W2_alternating": (REPORTED, _ratio(SHM, FLOOR, "alternating")),
    "shm_vs_pickle_numpy_shm_W2_alternating": (REPORTED, _ratio(PICKLE, SHM, "alternating")),
    "shm_vs_two_broadcast_W2_4_ranks": (REPORTED, _ratio(TWO, SHM, ranks=4)),
    "gloo_vs_two_broadcast_W2_4_ranks": (REPORTED, _ratio(TWO, GROUP, ranks=4)),
    **{
        f"ablation_{what}_{workload}": (
            REPORTED,
            _ratio("ablation-fat-many", f"ablation-{cell}", workload=workload),
        )
        for workload in ("W1", "W2")
        for what, cell in (
            ("fewer_bytes", "compact-many"),
            ("fewer_broadcasts", "fat-one"),
            ("both", "compact-one"),
        )
    },
    **{
        f"ablation_broadcasts_percent_{workload}": (
            REPORTED,
            _broadcasts_share(workload),
        )
        for workload in ("W1", "W2")
    },
}
