"""Figures of several launches: rows, ratios with their targets, and both as tables.

Owns the names of the ratios. A ratio is of medians over all launches; its spread is from the lowest
to the highest launch.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .launch import (
    ANY_READER,
    BROADCASTS,
    BYTES,
    CPU,
    METADATA,
    ONE_WAY,
    SENDER,
    Figures,
    Key,
)
from .methods import FLOOR, GROUP, PICKLE, RAW, RAW_AGAIN, SHM, SPINNING, steady_frame
from .workloads import make_workload

Row = dict[str, Any]
Median = Callable[[Key], float]

TWO = "two-broadcasts"
REPORTED = "reported"


def make_rows(launches: Sequence[Figures]) -> list[Row]:
    """One row per workload, method, ranks, mode and metric, over all launches."""
    pooled = _pool(launches)
    return [
        {
            **key._asdict(),
            "median": statistics.median(values),
            "p99": _p99(values),
            "n": len(values),
        }
        for key, values in pooled.items()
    ]


def make_ratios(launches: Sequence[Figures]) -> list[Row]:
    """The figures to reach, and a few beside them that say how they came about."""
    medians = [_medians(_pool(launches)), *(_medians(launch) for launch in launches)]
    ratios = []
    for name, (target, value) in _RATIOS.items():
        first, *others = [value(median) for median in medians]
        holds = None if target == REPORTED else _holds(first, target)
        spread = [min(others), max(others)]
        ratios.append(
            {"name": name, "value": first, "target": target, "holds": holds, "spread": spread}
        )
    return ratios


def _pool(launches: Sequence[Figures]) -> Figures:
    pooled: Figures = {}
    for figures in launches:
        for key, values in figures.items():
            pooled.setdefault(key, []).extend(values)
    return pooled


def _medians(figures: Figures) -> Median:
    return lambda key: statistics.median(figures[key])


def _p99(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)]


def _holds(value: float, target: str) -> bool:
    relation, number = target.split()
    figure = float(number)
    return {
        ">=": value >= figure,
        "<=": value <= figure,
        "<": value < figure,
        "=": value == figure,
    }[relation]


def _one_way(method: str, mode: str = "tight", workload: str = "W2") -> Key:
    return Key(workload, method, 2, mode, ONE_WAY)


def _ratio(over: str, under: str, mode: str = "tight", workload: str = "W2") -> Any:
    return lambda median: (
        median(_one_way(over, mode, workload)) / median(_one_way(under, mode, workload))
    )


def _value(key: Key) -> Any:
    return lambda median: median(key)


def _metadata_bytes_per_tensor(median: Median) -> float:
    """What each of 8 further tensors [8, 2] adds to the block message."""
    base = make_workload("W1")
    more = {f"further_{i}": torch.zeros(8, 2, dtype=torch.int64) for i in range(8)}
    return (steady_frame({**base, **more})[1] - steady_frame(base)[1]) / len(more)


_RATIOS: dict[str, tuple[str, Callable[[Median], float]]] = {
    "shm_vs_two_broadcast_W2": (">= 150", _ratio(TWO, SHM)),
    "gloo_vs_two_broadcast_W2": (">= 10", _ratio(TWO, GROUP)),
    "gloo_vs_raw_W2": ("<= 1.3", _ratio(GROUP, RAW)),
    "shm_one_way_us_W2": (REPORTED, _value(_one_way(SHM))),
    "shm_vs_floor_W2": ("<= 5", _ratio(SHM, FLOOR)),
    "shm_vs_pickle_numpy_shm_W2": (">= 3", _ratio(PICKLE, SHM)),
    "idle_wait_cpu_percent": ("< 1", _value(Key("W2", SHM, 2, "idle", CPU))),
    "paced_wait_cpu_percent": ("<= 15", _value(Key("W2", SHM, 2, "paced", CPU))),
    "paced_one_way_vs_spinning": ("<= 1.5", _ratio(SHM, SPINNING, "paced")),
    "metadata_bytes_block_message": ("<= 40", _value(Key("W1", SHM, 2, "steady", METADATA))),
    "metadata_bytes_per_tensor": ("<= 3", _metadata_bytes_per_tensor),
    "broadcasts_per_step": ("= 1", _value(Key("W2", GROUP, 2, "steady", BROADCASTS))),
    # What a difference has to exceed to be one: the same method twice.
    "raw_again_vs_raw_W2": (REPORTED, _ratio(RAW_AGAIN, RAW)),
    # Every method finding the caches full of the others.
    "shm_vs_two_broadcast_W2_alternating": (REPORTED, _ratio(TWO, SHM, "alternating")),
    "gloo_vs_two_broadcast_W2_alternating": (REPORTED, _ratio(TWO, GROUP, "alternating")),
    "gloo_vs_raw_W2_alternating": (REPORTED, _ratio(GROUP, RAW, "alternating")),
    "shm_vs_floor_W2_alternating": (REPORTED, _ratio(SHM, FLOOR, "alternating")),
    "shm_vs_pickle_numpy_shm_W2_alternating": (REPORTED, _ratio(PICKLE, SHM, "alternating")),
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
}


def print_report(report: Row) -> None:
    """Tables of a few hundred lines at most, to whatever width the terminal has."""
    console = Console()
    by_key = {Key(*(row[field] for field in Key._fields)): row for row in report["rows"]}
    tables = dict.fromkeys((key.ranks, key.mode) for key in by_key if key.metric == ONE_WAY)
    for ranks, mode in tables:
        console.print(_table(by_key, ranks, mode))
    idle = {key.method: row for key, row in by_key.items() if key.mode == "idle"}
    text = ", ".join(f"{method} {row['median']:.2f}%" for method, row in idle.items())
    console.print(f"A receiver for which nothing comes takes of a core: {text}\n")
    console.print(_ablation_table(by_key))
    values = {ratio["name"]: ratio["value"] for ratio in report["ratios"]}
    for workload in ("W1", "W2"):
        both, broadcasts, fewer_bytes = (
            values[f"ablation_{what}_{workload}"]
            for what in ("both", "fewer_broadcasts", "fewer_bytes")
        )
        console.print(
            f"{workload}: together {both:.2f}x; fewer broadcasts alone {broadcasts:.2f}x, "
            f"fewer bytes alone {fewer_bytes:.2f}x"
        )
    console.print(_ratio_table(report["ratios"]))
    console.print(report["machine"])


def _table(rows: dict[Key, Row], ranks: int, mode: str) -> Table:
    table = Table(title=f"{mode}, {ranks} ranks: median (p99)")
    table.add_column("workload")
    table.add_column("method", no_wrap=True)
    metrics = [
        metric
        for metric in (ONE_WAY, ANY_READER, SENDER, CPU)
        if any(key[2:] == (ranks, mode, metric) for key in rows)
    ]
    for column in (*metrics, BYTES, BROADCASTS, "n"):
        table.add_column(column, justify="right")
    for key, row in rows.items():
        if key[2:] != (ranks, mode, ONE_WAY):
            continue
        cells = []
        for metric in metrics:
            cell = rows.get(key._replace(metric=metric))
            cells.append(f"{cell['median']:.1f} ({cell['p99']:.1f})" if cell is not None else "")
        for metric in (BYTES, BROADCASTS):
            cells.append(f"{rows[key._replace(mode='steady', metric=metric)]['median']:g}")
        table.add_row(key.workload, key.method, *cells, str(row["n"]))
    return table


def _ablation_table(rows: dict[Key, Row]) -> Table:
    table = Table(title="Fewer bytes or fewer broadcasts? One way us, tight, 2 ranks, Gloo")
    table.add_column("workload")
    table.add_column("metadata")
    for column in ("many broadcasts", "one broadcast", "bytes (metadata)"):
        table.add_column(column, justify="right")
    for workload in ("W1", "W2"):
        for metadata in ("fat", "compact"):
            cells = []
            for carriage in ("many", "one"):
                method = f"ablation-{metadata}-{carriage}"
                cells.append(f"{rows[_one_way(method, workload=workload)]['median']:.1f}")
            steady = [
                rows[Key(workload, f"ablation-{metadata}-many", 2, "steady", metric)]["median"]
                for metric in (BYTES, METADATA)
            ]
            table.add_row(workload, metadata, *cells, f"{steady[0]:g} ({steady[1]:g})")
    return table


def _ratio_table(ratios: Sequence[Row]) -> Table:
    table = Table(title="Figures")
    for column in ("name", "value", "spread over launches", "target", "holds"):
        table.add_column(column, no_wrap=column == "name")
    for ratio in ratios:
        low, high = ratio["spread"]
        holds = {True: "yes", False: "no", None: ""}[ratio["holds"]]
        spread = f"{low:.2f} .. {high:.2f}"
        table.add_row(ratio["name"], f"{ratio['value']:.2f}", spread, ratio["target"], holds)
    return table
