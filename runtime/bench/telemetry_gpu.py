"""What telemetry tells of a GPU, and what asking costs: real all_reduces over NCCL.

Owns those measurements and their checks: that every operation got a device time, that the times
agree with events somebody waits for, that every replay of a CUDA graph is counted and its manifest
holds what was captured. Run by `onecast gpu-check`, as a process of its own; `--device cpu` takes
the same path over Gloo, as far as there is one without a GPU.

Two ranks where they can meet over NCCL, one otherwise.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from onecast.comm.testing import run_ranks
from onecast.telemetry import CollectiveInstrumentor
from onecast.telemetry.cuda_graphs import ManifestReader
from onecast.telemetry.gpu_recording import GpuRecording
from onecast.telemetry.ring import BEGIN, DEVICE, END, GRAPH, META, SEQUENCE, RingWriter
from onecast.telemetry.ring_reader import RingReader, Rows
from onecast.telemetry.run_directory import ring_path

from .figures import summarize
from .gpu_part import Asked, Results, Row, run_part
from .nccl import nccl_refusal

SIZES = (16 << 10, 16 << 20)
NOTHING, RECORDED, TIMED = "issue, nothing", "issue, recorded", "issue, recorded and timed"
REFERENCE, DEVICE_TIME = "device, events waited for", "device, recorded"
ASYNCHRONOUS, REPLAY = "device, recorded, async_op", "replay of a graph, launch"

_BLOCK = 20  # operations
_CAPTURED = 8
_MOST_STEPS = 200  # ranks that share a GPU take turns, of milliseconds each

Times = dict[tuple[str, str], list[float]]  # us, by size and method


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the rows; returns the exit status."""
    return run_part("onecast.runtime.bench.telemetry_gpu", __doc__, _measure_part, argv)


def _measure_part(asked: Asked, results: Results) -> None:
    results.add(rows=measure(asked.device, min(asked.steps, _MOST_STEPS), asked.timeout_s))


def measure(device: str, steps: int, timeout_s: float) -> list[Row]:
    """One row per size and method: us, of all ranks together."""
    ranks = ranks_of(device)
    results: list[Times] = run_ranks(_measure, ranks, device, steps, timeout_s=timeout_s)
    return pool_rows(results, ranks)


def ranks_of(device: str) -> int:
    return 2 if device == "cpu" or nccl_refusal(2) is None else 1


def pool_rows(results: Sequence[Times], ranks: int) -> list[Row]:
    """A row of each size and method, of what all ranks measured."""
    pooled: Times = {}
    for times in results:
        for key, values in times.items():
            pooled.setdefault(key, []).extend(values)
    return [
        {
            "workload": size,
            "method": method,
            "ranks": ranks,
            "mode": "telemetry",
            "metric": "us",
            **summarize(values),
        }
        for (size, method), values in pooled.items()
    ]


# ---- on a rank


def _measure(rank: int, device: str, steps: int) -> Times:
    with open_bench(rank, device) as bench:
        times: Times = {}
        for nbytes in SIZES:
            times |= bench.issue(nbytes, steps)
        if device == "cuda":
            for nbytes in SIZES:
                times |= bench.device_times(nbytes, steps)
            times |= bench.graph(steps)
        return times


@contextlib.contextmanager
def open_bench(rank: int, device: str) -> Iterator["Bench"]:
    """A ring of this rank's own, and a group that sums on that device; a collective call."""
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    group = dist.new_group(backend="nccl") if place.type == "cuda" else dist.group.WORLD
    with tempfile.TemporaryDirectory() as folder:
        yield Bench(rank, folder, place, group)


class Bench:
    """Real all_reduces with and without instrumentation, and the records that they leave."""

    def __init__(self, rank: int, folder: str, device: torch.device, group: Any) -> None:
        self.device = device
        self.group = group
        path = ring_path(folder, rank)
        self._ring = RingWriter(path, capacity=1 << 16, rank=rank)
        self._reader = RingReader(path)

    def _tensor(self, nbytes: int) -> torch.Tensor:
        tensor = torch.ones(nbytes // 4, device=self.device)
        for _ in range(3):  # NCCL connects at the first
            dist.all_reduce(tensor, group=self.group)
        self.synchronize()
        return tensor

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rows(self, kind: int) -> Rows:
        """The records of that kind since the last call."""
        time.sleep(0.001)  # what ended in this very moment is handed out later
        rows = self._reader.drain().rows
        chosen: Rows = rows[(rows[:, META] & 0xF) == kind]
        return chosen

    def issue(self, nbytes: int, steps: int) -> Times:
        """us of the host per call: methods take turns, block by block."""
        tensor = self._tensor(nbytes)
        times: Times = {(size_of(nbytes), name): [] for name in (NOTHING, RECORDED, TIMED)}
        for number in range(-1, -(-steps // _BLOCK)):
            for name in (NOTHING, RECORDED, TIMED):
                stop = self.instrument(name)
                try:
                    dist.barrier()
                    block = []
                    for _ in range(_BLOCK):
                        begin = time.perf_counter_ns()
                        dist.all_reduce(tensor, group=self.group)
                        block.append((time.perf_counter_ns() - begin) / 1e3)
                    self.synchronize()
                finally:
                    stop()
                if number >= 0:
                    times[size_of(nbytes), name] += block
        self.rows(DEVICE)
        return times

    def instrument(self, name: str) -> Callable[[], None]:
        """What ends it."""
        if name == NOTHING:
            return lambda: None
        instrumentor = CollectiveInstrumentor()
        if name == RECORDED:
            instrumentor.instrument(self._ring)
            return instrumentor.uninstrument
        recording = GpuRecording(self._ring)
        instrumentor.instrument(
            self._ring, device_timer=recording.timer, capture_log=recording.captures
        )

        def stop() -> None:
            instrumentor.uninstrument()
            recording.close()

        return stop

    def device_times(self, nbytes: int, steps: int) -> Times:
        """us on the device: by events that are waited for, and as recorded, both ways to call."""
        tensor = self._tensor(nbytes)
        size = size_of(nbytes)
        found: Times = {(size, REFERENCE): []}
        for _ in range(steps):
            make: Any = torch.cuda.Event
            begin, end = make(enable_timing=True), make(enable_timing=True)
            begin.record()
            dist.all_reduce(tensor, group=self.group)
            end.record()
            end.synchronize()
            found[size, REFERENCE].append(begin.elapsed_time(end) * 1e3)
        for method, asynchronous in ((DEVICE_TIME, False), (ASYNCHRONOUS, True)):
            stop = self.instrument(TIMED)
            try:
                for _ in range(steps):
                    work = dist.all_reduce(tensor, group=self.group, async_op=asynchronous)
                    if work is not None:
                        work.wait()
                    self.synchronize()
            finally:
                stop()
            rows = self.rows(DEVICE)
            if not asynchronous and len(rows) != steps:
                raise RuntimeError(f"{steps} operations of {size}, {len(rows)} device times")
            # Without compute in between, an asynchronous one may be over before it is waited for.
            if len(rows):
                found[size, method] = ((rows[:, END] - rows[:, BEGIN]) / 1e3).tolist()
        return found

    def graph(self, steps: int) -> Times:
        """us that the host takes to launch a graph of 8 all_reduces; all replays are counted."""
        tensor = self._tensor(SIZES[0])
        stop = self.instrument(TIMED)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(_CAPTURED):
                    dist.all_reduce(tensor, group=self.group)
            for _ in range(steps):
                graph.replay()
                self.synchronize()
        finally:
            stop()
        rows = self.rows(GRAPH)
        if len(rows) != steps or set(rows[:, SEQUENCE].tolist()) != {0}:
            raise RuntimeError(f"{steps} replays, {len(rows)} records of manifest 0")
        manifest = ManifestReader(self._ring.path.with_suffix(".graphs")).get(0)
        held = () if manifest is None else manifest.collectives
        if [(one.op, one.nbytes) for one in held] != [("all_reduce", SIZES[0])] * _CAPTURED:
            raise RuntimeError(f"{_CAPTURED} all_reduces were captured, the manifest has {held}")
        return {(size_of(SIZES[0]), REPLAY): ((rows[:, END] - rows[:, BEGIN]) / 1e3).tolist()}


def size_of(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


if __name__ == "__main__":
    sys.exit(main())
