"""What recording one collective costs: real `dist.all_reduce` calls over Gloo, one rank.

Owns that launch. Blocks with and without the instrumentation take turns, so that a slow spell of
the machine meets both; a pair of neighbours gives one difference of medians, the launch the median
of those. Nobody reads the ring meanwhile: that would be the sidecar's cost.

Gloo works in a thread of its own; where it wakes up on another core, a call takes anything from 12
to 120 us, and a difference of one drowns in it. So all threads share one core here.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from onecast.comm.testing import run_ranks
from onecast.telemetry import CollectiveInstrumentor
from onecast.telemetry.ring import RingWriter

from .telemetry_toggle import Toggle

_BYTES = 16 << 10


class RecordPlan(NamedTuple):
    pairs: int  # of blocks
    calls: int  # a block


def measure_record(plan: RecordPlan) -> dict[str, list[float]]:
    """ns added per collective, by pair of blocks; and ns of a collective without."""
    (figures,) = run_ranks(_measure, 1, plan, timeout_s=300.0)
    found: dict[str, list[float]] = figures
    return found


def _measure(rank: int, plan: RecordPlan) -> dict[str, list[float]]:
    tensor = torch.ones(_BYTES // 2, dtype=torch.bfloat16)
    dist.all_reduce(tensor)  # all threads are there now
    core = max(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})
    toggle, instrumentor = Toggle(), CollectiveInstrumentor()
    added, without = [], []
    with tempfile.TemporaryDirectory() as folder:
        ring = RingWriter(Path(folder, "rank-0.ring"), capacity=65536, rank=rank)
        instrumentor.instrument(ring)
        try:
            toggle.instrumented()
            for on in (True, False) * 3:
                toggle.switch(on)
                _block(tensor, plan.calls)
            for pair in range(plan.pairs):
                medians = {}
                for on in (True, False) if pair % 2 else (False, True):
                    toggle.switch(on)
                    medians[on] = _block(tensor, plan.calls)
                added.append(medians[True] - medians[False])
                without.append(medians[False])
        finally:
            toggle.switch(True)
            instrumentor.uninstrument()
            ring.close()
    return {"record_ns": added, "all_reduce_ns": without}


def _block(tensor: torch.Tensor, calls: int) -> float:
    """Median ns of a call."""
    all_reduce, now = dist.all_reduce, time.perf_counter_ns
    times = []
    for _ in range(calls):
        begin = now()
        all_reduce(tensor)
        times.append(now() - begin)
    return statistics.median(times)
