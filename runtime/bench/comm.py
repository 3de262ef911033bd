"""`onecast bench comm`: how long a step's mapping takes from one rank to another.

Owns the workloads, the methods, the pacing and the report. Knows nothing of the runtime.

Two real ranks on this host, over Gloo. One way: from the moment the source begins to send until the
receiver holds the mapping; `perf_counter_ns` reads one clock for all processes of a host. The
receiver is waiting when the source begins: a barrier on a second group, then a pause, stand before
every timed exchange. The methods take turns, so that a slow spell of the machine meets all of them,
in two ways: "back-to-back", blocks of exchanges of one method, where code and data are still in the
caches, and "alternating", a turn each exchange, where every method finds the caches full of the
others. One method runs twice: the two should agree, and by how much they do not is what a
difference has to exceed.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from onecast.comm import Channel, open_channel
from onecast.comm.frame import Encoder
from onecast.comm.prior_art import two_broadcasts
from onecast.comm.testing import run_ranks

METHODS = ("two-broadcasts", "process-group", "raw", "raw-again")
WORKLOADS = ("W1", "W2")
MODES = ("back-to-back", "alternating")

_PAUSE_NS = 300_000  # after the barrier: the receiver is in its wait by then
_WARMUP = 20  # exchanges per method: layouts are learned, capacities settled
_BLOCK = 25  # timed exchanges of a method in a row, back to back
_BLOCK_WARMUP = 5  # untimed ones before them

Row = dict[str, Any]
Key = tuple[str, str, str]  # workload, method, mode


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write JSON if asked; returns the exit status."""
    parser = argparse.ArgumentParser(prog="onecast bench comm", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    parser.add_argument("--quick", action="store_true", help="one launch of few steps")
    parser.add_argument("--steps", type=int, help="timed exchanges per method and launch")
    options = parser.parse_args(argv)
    steps = options.steps if options.steps is not None else (100 if options.quick else 1000)
    if steps < 1:
        parser.error(f"--steps is {steps}, at least 1 is needed")
    report = measure(steps, launches=1 if options.quick else 3)
    _print(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure(steps: int, launches: int) -> dict[str, Any]:
    """The whole report: rows of what was measured, ratios against the figures to reach."""
    one_way: dict[Key, list[float]] = {}
    sender: dict[Key, list[float]] = {}
    for _ in range(launches):
        source, receiver = run_ranks(_measure_rank, 2, steps, timeout_s=600)
        for key, exchanges in source["times_ns"].items():
            arrivals = receiver["times_ns"][key]
            for (begin, end), (_, arrival) in zip(exchanges, arrivals, strict=True):
                one_way.setdefault(key, []).append((arrival - begin) / 1e3)
                sender.setdefault(key, []).append((end - begin) / 1e3)
    sizes: dict[str, dict[str, float]] = source["sizes"]
    rows = [_row(key, "one-way us", times) for key, times in one_way.items()]
    rows += [_row(key, "sender us", times) for key, times in sender.items()]
    for workload, figures in sizes.items():
        for metric, value in figures.items():
            rows.append(_row((workload, "process-group", "steady"), metric, [value]))
    ratios = []
    for mode, suffix in zip(MODES, ("", "_alternating"), strict=True):
        two, fused, raw, raw_again = (
            statistics.median(one_way["W2", method, mode]) for method in METHODS
        )
        ratios += [
            _ratio(f"gloo_vs_two_broadcast_W2{suffix}", two / fused, ">=", 10),
            _ratio(f"gloo_vs_raw_W2{suffix}", fused / raw, "<=", 1.3),
            _ratio(f"raw_again_vs_raw_W2{suffix}", raw_again / raw, "<=", 1.15),
        ]
    broadcasts = max(figures["broadcasts per step"] for figures in sizes.values())
    ratios += [
        _ratio("metadata_bytes_block_message", sizes["W1"]["metadata bytes"], "<=", 40),
        _ratio("metadata_bytes_per_tensor", _metadata_bytes_per_tensor(), "<=", 3),
        _ratio("broadcasts_per_step", broadcasts, "<=", 1),
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    return {"bench": "comm", "machine": machine, "rows": rows, "ratios": ratios}


def workload(name: str) -> dict[str, Any]:
    """W1: the block message of a step. W2: a decode step of 64 sequences with block operations."""
    blocks = {
        "swap_in": torch.arange(16).reshape(8, 2),
        "swap_out": torch.arange(16).reshape(8, 2),
        "copy": torch.arange(8).reshape(4, 2),
    }
    if name == "W1":
        return blocks
    return {
        "step": 1,
        "num_prefill_tokens": 0,
        "num_decode_tokens": 64,
        "is_prompt": False,
        **blocks,
        "input_ids": torch.arange(64),
        "positions": torch.arange(64),
        "slot_mapping": torch.arange(64),
        "seq_lens": torch.arange(64, dtype=torch.int32),
        "block_tables": torch.arange(64 * 64, dtype=torch.int32).reshape(64, 64),
    }


def _measure_rank(rank: int, steps: int) -> dict[str, Any]:
    """One rank: every workload, the methods in turn; (begin, end) of each exchange in ns."""
    times_ns: dict[Key, list[tuple[int, int]]] = {}
    sizes: dict[str, dict[str, float]] = {}
    gate = dist.new_group()
    for name in WORKLOADS:
        mapping = workload(name)
        channel = open_channel()
        sizes[name] = _frame_sizes(channel, rank, mapping)
        methods = _methods(channel, rank, mapping, int(sizes[name]["frame bytes"]))
        frames, broadcasts = channel.sequence, channel.broadcasts
        for step, (mode, method, timed) in enumerate(_turns(steps)):
            if name == "W2":
                mapping["step"] = step
            exchange = methods[method]
            dist.barrier(gate)
            if rank == 0:
                _pause(_PAUSE_NS)
            begin = time.perf_counter_ns()
            exchange()
            end = time.perf_counter_ns()
            if timed:
                times_ns.setdefault((name, method, mode), []).append((begin, end))
        count = (channel.broadcasts - broadcasts) / (channel.sequence - frames)
        sizes[name]["broadcasts per step"] = count
        channel.close()
    return {"times_ns": times_ns, "sizes": sizes}


def _turns(steps: int) -> Iterator[tuple[str, str, bool]]:
    """Mode, method and whether it is timed, of each exchange; `steps` timed ones of each."""
    for first in range(0, steps, _BLOCK):
        for method in METHODS:
            for turn in range(-_BLOCK_WARMUP, min(_BLOCK, steps - first)):
                yield "back-to-back", method, turn >= 0
    chance = random.Random(0)  # the same on both ranks; a fixed order would favour a successor
    for turn in range(-_WARMUP, steps):
        for method in chance.sample(METHODS, len(METHODS)):
            yield "alternating", method, turn >= 0


def _methods(
    channel: Channel, rank: int, mapping: dict[str, Any], frame_bytes: int
) -> dict[str, Callable[[], object]]:
    """What each method does on this rank, send or receive; keys in the order of METHODS."""
    raw = torch.zeros(frame_bytes, dtype=torch.uint8)

    def receive() -> object:
        with channel.receive() as frame:
            return frame.mapping

    def broadcast() -> object:
        return dist.broadcast(raw, src=0)

    calls: tuple[Callable[[], object], ...] = (
        lambda: two_broadcasts(mapping if rank == 0 else None),
        (lambda: channel.publish(mapping)) if rank == 0 else receive,
        broadcast,
        broadcast,
    )
    return dict(zip(METHODS, calls, strict=True))


def _frame_sizes(channel: Channel, rank: int, mapping: dict[str, Any]) -> dict[str, float]:
    """Bytes of a frame in steady state, the layout known."""
    for _ in range(2):
        frame = channel.publish(mapping) if rank == 0 else channel.receive()
    return {"frame bytes": frame.nbytes, "metadata bytes": frame.metadata_bytes}


def _metadata_bytes_per_tensor() -> float:
    """What each of 8 tensors [8, 2] adds to the block message."""

    def steady(mapping: dict[str, Any]) -> int:
        encoder = Encoder()
        encoder.commit(encoder.plan(mapping))
        return encoder.plan(mapping).metadata_bytes

    base = workload("W1")
    more = {f"further_{i}": torch.zeros(8, 2, dtype=torch.int64) for i in range(8)}
    return (steady({**base, **more}) - steady(base)) / len(more)


def _pause(nanoseconds: int) -> None:
    until = time.perf_counter_ns() + nanoseconds
    while time.perf_counter_ns() < until:
        pass


def _row(key: Key, metric: str, values: Sequence[float]) -> Row:
    workload, method, mode = key
    ordered = sorted(values)
    return {
        "workload": workload,
        "method": method,
        "ranks": 2,
        "mode": mode,
        "metric": metric,
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)],
        "n": len(ordered),
    }


def _ratio(name: str, value: float, relation: str, figure: float) -> Row:
    holds = value >= figure if relation == ">=" else value <= figure
    return {"name": name, "value": value, "target": f"{relation} {figure:g}", "holds": holds}


def _print(report: dict[str, Any]) -> None:
    console = Console()
    rows = Table(title=f"One step's mapping, 2 ranks, Gloo ({report['machine']})")
    for column in ("workload", "method", "mode", "metric"):
        rows.add_column(column)
    for column in ("median", "p99", "n"):
        rows.add_column(column, justify="right")
    for row in report["rows"]:
        numbers = (f"{row['median']:.1f}", f"{row['p99']:.1f}", str(row["n"]))
        rows.add_row(row["workload"], row["method"], row["mode"], row["metric"], *numbers)
    ratios = Table(title="Figures")
    for column in ("name", "value", "target", "holds"):
        ratios.add_column(column)
    for ratio in report["ratios"]:
        holds = "yes" if ratio["holds"] else "no"
        ratios.add_row(ratio["name"], f"{ratio['value']:.2f}", ratio["target"], holds)
    console.print(rows)
    console.print(ratios)
