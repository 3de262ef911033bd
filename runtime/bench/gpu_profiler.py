"""How long collectives take on a GPU by telemetry's records, and by torch's own profiler.

Owns that comparison, operation by operation: real all_gathers over NCCL, recorded and profiled at
once. Run by `onecast gpu-check`, as a process of its own; `--device cpu` takes the same path over
Gloo, where the times are the host's.

    stream   [spin] [begin] [NCCL's kernel] [end]     the host gets ahead while the GPU spins, so
                     <------ recorded ------>         that its own pace is in neither time
                             <- profiled -->

All_gathers, for those of a rank alone copy too; an all_reduce of one rank does nothing at all.
"""

import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from onecast.comm.testing import run_ranks
from onecast.telemetry.ring import BEGIN, COLLECTIVE, DEVICE, END, SEQUENCE

from .figures import REPORTED, make_figure
from .gpu_part import Asked, Results, run_part
from .telemetry_gpu import RECORDED as ON_HOST
from .telemetry_gpu import TIMED, Bench, Times, open_bench, pool_rows, ranks_of, size_of

SIZES = {"cuda": (16 << 10, 16 << 20, 256 << 20), "cpu": (16 << 10, 1 << 20)}  # gathered bytes
RECORDED, PROFILED = "recorded", "torch.profiler"
ERROR, _TARGET = "device_time_error", "<= 0.1"  # of the largest size: a kernel's edges cost µs

_MOST_STEPS = 100
_SPIN_CYCLES = 400_000  # about a fifth of a millisecond
# What NCCL puts on a stream: a kernel, or a copy where a rank is alone. Annotations, which a
# profiler shows on the GPU's lanes too, are called "nccl:all_gather" and the like.
_ON_GPU = ("ncclDevKernel", "ncclKernel", "Memcpy DtoD")
_ON_CPU = ("gloo:",)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write rows and figure; returns the exit status."""
    return run_part("onecast.runtime.bench.gpu_profiler", __doc__, _measure_part, argv)


def _measure_part(asked: Asked, results: Results) -> None:
    ranks = ranks_of(asked.device)
    steps = min(asked.steps, _MOST_STEPS)
    found: list[Times] = run_ranks(_measure, ranks, asked.device, steps, timeout_s=asked.timeout_s)
    if not all(found):
        results.add(skipped=["torch.profiler shows nothing of what runs on this GPU"])
        return
    largest = size_of(max(SIZES[asked.device]))
    errors = [
        abs(recorded - profiled) / profiled
        for times in found
        for recorded, profiled in zip(
            times[largest, RECORDED], times[largest, PROFILED], strict=True
        )
    ]
    target = _TARGET if asked.device == "cuda" else REPORTED
    error = statistics.median(errors)
    results.add(rows=pool_rows(found, ranks), ratios=[make_figure(ERROR, target, error, errors)])


# ---- on a rank


def _measure(rank: int, device: str, steps: int) -> Times:
    """us of each size by both; nothing where the profiler sees nothing."""
    times: Times = {}
    with open_bench(rank, device) as bench:
        for nbytes in SIZES[device]:
            seen, recorded = _gather(bench, nbytes, steps, on_gpu=device == "cuda")
            if not seen and device == "cuda":
                return {}
            if len(seen) != steps or len(recorded) != steps:
                raise RuntimeError(
                    f"{steps} all_gathers of {size_of(nbytes)}: {len(recorded)} were recorded, "
                    f"the profiler saw {dict(Counter(name for name, _ in seen))}"
                )
            times[size_of(nbytes), RECORDED] = recorded
            times[size_of(nbytes), PROFILED] = [us for _, us in seen]
    return times


def _gather(
    bench: Bench, nbytes: int, steps: int, *, on_gpu: bool
) -> tuple[list[tuple[str, float]], list[float]]:
    """What the profiler saw of so many all_gathers, and the us that were recorded of each."""
    gathered = torch.empty(nbytes // 4, device=bench.device)
    own = torch.ones(nbytes // 4 // dist.get_world_size(), device=bench.device)
    gather = _all_gather()
    for _ in range(3):  # NCCL connects at the first
        gather(gathered, own, group=bench.group)
    bench.synchronize()
    stop = bench.instrument(TIMED if on_gpu else ON_HOST)
    try:
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with profile(activities=[activity], acc_events=True) as profiler:
            for _ in range(steps):
                if on_gpu:
                    torch.cuda._sleep(_SPIN_CYCLES)  # type: ignore[no-untyped-call]
                gather(gathered, own, group=bench.group)
                bench.synchronize()
    finally:
        stop()
    rows = bench.rows(DEVICE if on_gpu else COLLECTIVE)
    rows = rows[rows[:, SEQUENCE].argsort()]  # device times come in any order
    recorded: list[float] = ((rows[:, END] - rows[:, BEGIN]) / 1e3).tolist()
    return collectives_of(profiler.events() or (), on_gpu), recorded


def _all_gather() -> Callable[..., Any]:
    """By the name that this torch does not warn of."""
    found: Callable[..., Any] = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )
    return found


def collectives_of(events: Iterable[Any], on_gpu: bool) -> list[tuple[str, float]]:
    """Name and us of each collective among a profiler's events, in the order of their begins."""
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    names = _ON_GPU if on_gpu else _ON_CPU
    found = [one for one in events if one.device_type == device and one.name.startswith(names)]
    found.sort(key=lambda one: one.time_range.start)
    return [(one.name, one.time_range.elapsed_us()) for one in found]


if __name__ == "__main__":
    sys.exit(main())
