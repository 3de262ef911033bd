"""What the node knows right now, as plain data for people's eyes: `/live.json`.

Owns the choice of what is shown and its bound in size, `MAX_BYTES` as JSON. Knows neither HTTP nor
the page. It holds names of operations, groups, phases, dtypes and error types, numbers, and nothing
else that users made: no request, no prompt. Names are as the program gave them; whoever shows
them escapes them.

    {format, now_ms, engine_id, world_size, local_world_size,
     ranks:      [{rank, up, step, phase}]          phase: the innermost one it is in, or null
     steps:      {count, p50_s, p99_s, seconds, exposed_s, hist}   count: of one rank; rest: all
     kept:       [step, ...] as `live_steps` draws them, oldest first; only the latest with detail
     latency:    [{op, group, size, clock, count, p50_s, p99_s, seconds, bus_bytes, transfer_s,
                   hist}]
     latency_left_out
     stragglers: [{rank, joined, last, waited_s}]
     in_flight:  [{rank, op, group, group_size, sequence, bytes, step, age_s}]   oldest first
     hangs:      [{kind, text, op, group, sequence, age_s}]
     health:     {dropped: [{signal, reason, count}], restarts, unrecorded: [{rank, group, count}],
                  unjoined: [{reason, count}], errors: [{op, group, rank, type, count}]}}

`hist` is [number of the first bucket, counts...]: bucket i of `histograms.DURATIONS`, so that who
reads twice can tell what happened in between.
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from .labels import group_label, name_at
from .live_kept import KeptViews
from .live_totals import latency_view, steps_view, stragglers_view
from .ring import (
    BEGIN,
    COLLECTIVE,
    END,
    META,
    NBYTES,
    PHASE,
    SEQUENCE,
    STEP,
    meta_group,
    meta_group_size,
    meta_kind,
    meta_name,
)
from .ring_reader import RingReader, Rows

if TYPE_CHECKING:
    from .node import Node

FORMAT = 1
MAX_BYTES = 300_000  # as JSON; a step that does not fit goes without its detail
_MAX_IN_FLIGHT = 128
_MAX_LISTED = 32  # hangs, errors, and what went unrecorded


_views: "WeakKeyDictionary[Node, KeptViews]" = WeakKeyDictionary()  # a cache: nothing else


def live_view(node: "Node") -> dict[str, Any]:
    """Everything of `node` that the live view shows, as above. Any thread may call."""
    with node.lock:
        names = {rank: list(reader.names) for rank, reader in node.readers.items()}
        kept = [one for one in node.tracing.kept if names.keys() >= set(one.ranks)]
        now_ns = time.perf_counter_ns()
        view = {
            "format": FORMAT,
            "now_ms": time.time_ns() // 1_000_000,
            "engine_id": node.engine_id,
            **_ranks(node.readers, node.pending, names),
            "steps": steps_view(node.totals),
            **latency_view(node.totals),
            "stragglers": stragglers_view(node.totals),
            "in_flight": _in_flight(node.pending, names, now_ns),
            "hangs": [
                {
                    "kind": hang.kind,
                    "text": hang.text,
                    "op": hang.op,
                    "group": hang.group,
                    "sequence": hang.sequence,
                    "age_s": round(hang.age_s, 1),
                }
                for hang in list(node.hangs)[:_MAX_LISTED]
            ],
            "health": _health(node, names),
        }
        views = _views.setdefault(node, KeptViews())  # under the lock: once per node
        offset = next((reader.clock_offset_ns for reader in node.readers.values()), 0)
    view["kept"] = views.of(kept, names, offset, MAX_BYTES - len(json.dumps(view)))
    return view


def _ranks(
    readers: Mapping[int, RingReader],
    pending: Mapping[int, Rows],
    names: Mapping[int, Sequence[str]],
) -> dict[str, Any]:
    ranks = []
    for rank, reader in sorted(readers.items()):
        phases = [
            row
            for row in pending.get(rank, np.empty((0, 8), np.int64)).tolist()
            if meta_kind(row[META]) == PHASE and not row[END]
        ]
        phase = max(phases, key=lambda row: int(row[BEGIN]), default=None)
        ranks.append(
            {
                "rank": rank,
                "up": reader.alive and not reader.closed,
                "step": reader.step,
                "phase": None if phase is None else name_at(names[rank], meta_name(phase[META])),
            }
        )
    sizes = [(reader.world_size, reader.local_world_size) for reader in readers.values()]
    world, local = max(sizes, default=(0, 0))
    return {"world_size": world, "local_world_size": local, "ranks": ranks}


def _in_flight(
    pending: Mapping[int, Rows], names: Mapping[int, Sequence[str]], now_ns: int
) -> list[dict[str, Any]]:
    found = []
    for rank, rows in pending.items():
        table = names.get(rank, ())
        for row in rows.tolist():
            meta = row[META]
            if meta_kind(meta) == COLLECTIVE and not row[END]:
                found.append(
                    {
                        "rank": rank,
                        "op": name_at(table, meta_name(meta)),
                        "group": group_label(name_at(table, meta_group(meta))),
                        "group_size": meta_group_size(meta),
                        "sequence": row[SEQUENCE],
                        "bytes": row[NBYTES],
                        "step": row[STEP],
                        "age_s": max(0, now_ns - row[BEGIN]) * 1e-9,
                    }
                )
    return sorted(found, key=lambda one: -one["age_s"])[:_MAX_IN_FLIGHT]


def _health(node: "Node", names: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    unrecorded: dict[tuple[int, str], int] = defaultdict(int)
    for rank, reader in node.readers.items():
        for entry, count in enumerate(reader.coverage[: len(names[rank])]):
            if count and "\t" in names[rank][entry]:
                unrecorded[rank, group_label(names[rank][entry])] += count
    errors = sorted(node.totals.errors.items(), key=lambda one: -one[1])
    return {
        "dropped": [
            {"signal": signal, "reason": reason, "count": count}
            for (signal, reason), count in sorted(node.dropped.items())
            if count
        ],
        "restarts": node.restarts,
        "unrecorded": [
            {"rank": rank, "group": group, "count": count}
            for (rank, group), count in sorted(unrecorded.items())
        ][:_MAX_LISTED],
        "unjoined": [
            {"reason": reason, "count": count}
            for reason, count in sorted(node.totals.unjoined.items())
            if count
        ],
        "errors": [
            {"op": key.op, "group": key.group, "rank": key.rank, "type": kind, "count": count}
            for (key, kind), count in errors[:_MAX_LISTED]
        ],
    }
