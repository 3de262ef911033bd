"""`onecast bench nodes`: messages and bytes per step by rank and node count, beside their model.

Owns the command and what is measured. Nodes are pretended: ranks of this host that do not look at
one another's shared memory, which is what makes nodes of them for a channel. What they then send is
what they would send over a network, and the kernel counts it, connection by connection; how long it
takes is not, and is not measured. The formulas are in `nodes_model`.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from onecast.comm import open_channel, peers
from onecast.comm.ladder import rung
from onecast.comm.testing import run_ranks

from .figures import Row, describe_machine, make_figure
from .nodes_model import Layout, Traffic, all_reduce, frame, gather
from .nodes_report import print_report
from .shared_page import Gate
from .sockets import Ports, bytes_sent
from .terminal import deliver, make_parser
from .workloads import make_workload

LAYOUTS = [Layout(*pair) for pair in ((1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1))]
_QUICK = [Layout(2, 1), Layout(2, 2)]
BEYOND = [Layout(nodes, 8) for nodes in (2, 4, 8, 16, 64)]  # nobody has so many here: model only
REDUCED = 256 << 10  # bytes: 16 sequences of a hidden size of 4096 in float32
GATHERED = 64 << 10
_SETTLE_S = 0.05  # for the last bytes to be counted
_STEPS = 20

Counted = dict[Ports, int]


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write JSON if asked; returns the exit status."""
    parser = make_parser("nodes", __doc__, "two layouts, up to 4 ranks")
    options = parser.parse_args(argv)
    report = measure(_QUICK if options.quick else LAYOUTS, steps=_STEPS)
    return deliver(report, options.json, print_report)


def measure(layouts: Sequence[Layout], steps: int, timeout_s: float = 300.0) -> Row:
    """The whole report: a row for each layout and operation, measured and modelled."""
    load = os.getloadavg()[0]
    ranks = max(layout.ranks for layout in layouts)
    print(f"{len(layouts)} layouts of up to {ranks} ranks", file=sys.stderr, flush=True)
    told = run_ranks(_count, ranks, layouts, steps, timeout_s=timeout_s)
    capacity = rung(told[0]["frame_bytes"])
    rows = []
    for number, layout in enumerate(layouts):
        for name, model in _models(layout, capacity).items():
            counted = [one["counted"].get((number, name), {}) for one in told]
            matrix = _matrix(counted[: layout.ranks], steps)
            rows.append(_row(layout, name, model, matrix))
    beyond = [
        _row(layout, name, model, None)
        for layout in BEYOND
        for name, model in _models(layout, capacity).items()
    ]
    worst = max(
        (abs(row["measured_vs_model"] - 1) for row in rows if row["model_bytes"]), default=0
    )
    return {
        "bench": "nodes",
        "machine": describe_machine(load, "Gloo", "pretended nodes"),
        "frame_bytes": told[0]["frame_bytes"],
        "broadcast_bytes": capacity,
        "reduced_bytes": REDUCED,
        "gathered_bytes": GATHERED,
        "rows": rows,
        "beyond": beyond,
        "ratios": [make_figure("measured_vs_model_worst", "<= 0.02", worst, [worst])],
    }


def _models(layout: Layout, capacity: int) -> dict[str, Traffic]:
    return {
        "frame, two-level": frame(layout, "two-level", capacity),
        "frame, process-group": frame(layout, "process-group", capacity),
        "all-reduce": all_reduce(layout, REDUCED),
        "gather": gather(layout, GATHERED),
    }


def _row(
    layout: Layout, name: str, model: Traffic, measured: list[list[float]] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "operation": name,
        "nodes": layout.nodes,
        "ranks_per_node": layout.per_node,
        "messages": model.num_messages(),
        "source_messages": sum(model.messages[0]),
        "model_bytes": model.total(),
        "model_between_nodes": model.between_nodes(),
        "model_bytes_by_rank": model.by_rank() if measured is not None else None,
    }
    if measured is not None:
        seen = Traffic(layout)
        seen.bytes = measured
        row["bytes"] = seen.total()
        row["between_nodes"] = seen.between_nodes()
        row["bytes_by_rank"] = seen.by_rank()
        row["measured_vs_model"] = seen.total() / model.total() if model.total() else float("nan")
    return row


def _matrix(counted: Sequence[Counted], steps: int) -> list[list[float]]:
    """Bytes per step from rank to rank: the ends of a connection have the same two ports."""
    owner = {ports: rank for rank, one in enumerate(counted) for ports in one}
    matrix = [[0.0 for _ in counted] for _ in counted]
    for rank, one in enumerate(counted):
        for (own, other), nbytes in one.items():
            if nbytes and (other, own) in owner:  # else it leads to the rendezvous
                matrix[rank][owner[other, own]] += nbytes / steps
    return matrix


def _count(rank: int, layouts: Sequence[Layout], steps: int) -> dict[str, Any]:
    """On one rank: what it sent, by layout, operation and connection."""
    gate = Gate()
    mapping = make_workload("W2")
    counted: dict[tuple[int, str], Counted] = {}
    frame_bytes = 0
    pretended = peers._host_key
    for number, layout in enumerate(layouts):
        # There is no other way to be a node: a host is what shares memory and process numbers.
        peers._host_key = partial(layout.node_of, rank)
        group = dist.new_group(range(layout.ranks))
        for name in ("two-level", "process-group"):
            channel = None
            if rank < layout.ranks:
                assert group is not None
                channel = open_channel(group, transport=name, timeout_s=60)

            def step(channel: Any = channel) -> None:
                nonlocal frame_bytes
                if rank == 0:
                    frame_bytes = channel.publish(mapping).nbytes
                else:
                    channel.receive(timeout_s=60).release()

            sent = _measured(gate, step, steps, takes_part=channel is not None)
            counted[number, f"frame, {name}"] = sent
            if channel is not None:
                channel.close()
        tensor, part = torch.zeros(REDUCED // 4), torch.zeros(GATHERED // 4)
        parts = [torch.empty_like(part) for _ in range(layout.ranks)] if rank == 0 else None
        operations: dict[str, Callable[[], object]] = {
            "all-reduce": lambda: dist.all_reduce(tensor, group=group),  # noqa: B023
            "gather": lambda: dist.gather(part, parts, dst=0, group=group),  # noqa: B023
        }
        for name, operation in operations.items():
            takes_part = rank < layout.ranks
            counted[number, name] = _measured(gate, operation, steps, takes_part)
        if group is not None and rank < layout.ranks:
            dist.destroy_process_group(group)
    peers._host_key = pretended
    return {"counted": counted, "frame_bytes": frame_bytes}


def _measured(gate: Gate, step: Callable[[], object], steps: int, takes_part: bool) -> Counted:
    """What `steps` of it send; the first few open connections and teach layouts, uncounted."""
    if takes_part:
        for _ in range(3):
            step()
    gate.meet()
    time.sleep(_SETTLE_S)
    before = bytes_sent()
    gate.meet()
    if takes_part:
        for _ in range(steps):
            step()
    time.sleep(_SETTLE_S)
    gate.meet()  # nobody closes anything before all have counted
    after = bytes_sent()
    gate.meet()
    return {ports: total - before.get(ports, 0) for ports, total in after.items()}
