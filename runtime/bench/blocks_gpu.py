"""How fast the blocks of a KV cache move to and from a GPU, within it, and unseen beside a forward.

Owns what is compared, the rows and the figures. Run by `onecast gpu-check`, as a process of its
own; `--device cpu` takes the same path without a GPU, over small blocks that memory copies move.

    onecast               the cache's mover, as an engine calls it
    copies, kernel        the same held to one of its two ways
    one copy              as many bytes in one piece: page-locked memory and the GPU, or within it
    per layer             a layer-major cache: keys and values of each layer of each block apart
    hidden                swaps out and in beside a load of matrix products, see `blocks_hidden`

A swap is timed from the call until its blocks are there; a copy within the GPU on the GPU's clock.
The methods take turns, each time with other blocks.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from onecast.runtime.block_mover import BlockMover, Pairs
from onecast.runtime.cuda_mover import CudaMover
from onecast.runtime.host_mover import HostMover
from onecast.runtime.kv_cache import CacheSpec, KVCache
from onecast.runtime.swap_choice import COPIES, WAYS

from .blocks_hidden import hidden_shares
from .figures import REPORTED, Row, make_figure, p99, summarize
from .gpu_part import Asked, Results, run_part

ONECAST, ONE_COPY, PER_LAYER = "onecast", "one copy", "per layer"
OUT, IN, COPY = OPS = ("out", "in", "copy")
SCATTERED, CONTIGUOUS = PATTERNS = ("scattered", "contiguous")
HEADLINE = (64, SCATTERED)  # what the figures are of
# name: target
FIGURES = {
    "swap_gpu_vs_pinned": ">= 0.9",
    "copy_gpu_vs_device_copy": ">= 0.8",
    "swap_hidden_share": ">= 0.9",
    "swap_gpu_vs_per_layer_copies": REPORTED,
}

_BLOCK_SIZE = 16
_UNTIMED = 2
_CELL_S = 0.25  # of rounds
_SLEEP_CYCLES = 1_000_000  # about half a millisecond, in which the host gets ahead


class Size(NamedTuple):
    """Whose blocks they are, and how many move at once."""

    spec: CacheSpec
    counts: tuple[int, ...]


ON_GPU = Size(CacheSpec(32, 4, 128, torch.bfloat16), (1, 4, 16, 64, 256))  # Llama-3-8B, TP 2: 1 MiB
ON_CPU = Size(CacheSpec(4, 2, 32, torch.float32), (1, 16, 64))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write rows and figures; returns the exit status."""
    return run_part("onecast.runtime.bench.blocks_gpu", __doc__, _measure_part, argv)


def _measure_part(asked: Asked, results: Results) -> None:
    results.add(**measure(asked.device, asked.steps))


def measure(device: str, steps: int) -> dict[str, list[Row]]:
    """`rows` and `ratios`; on a CPU the ratios have no targets, and the rows say so."""
    size = ON_GPU if device == "cuda" else ON_CPU
    bench = _Bench(size, device)
    rows, rates = [], {}
    for count in size.counts:
        for pattern in PATTERNS:
            for op in OPS:
                found = bench.rates(op, pattern, count, steps)
                rates[op, pattern, count] = found
                what = f"{op}, {count} {pattern}"
                rows += [bench.row(what, name, "GB/s", values) for name, values in found.items()]
    hidden = {}
    for count in (one for one in size.counts if one >= 16):  # with less the load has no length
        for pattern in PATTERNS:
            found = hidden_shares(bench.movers, bench.swaps(pattern, count), bench.device, steps)
            hidden[pattern, count] = found
            what = f"beside a forward, {count} {pattern}"
            rows += [bench.row(what, name, "% hidden", values) for name, values in found.items()]
    bench.close()
    return {"rows": rows, "ratios": _figures(rates, hidden, on_gpu=device == "cuda")}


def _figures(
    rates: dict[tuple[str, str, int], dict[str, list[float]]],
    hidden: dict[tuple[str, int], dict[str, list[float]]],
    *,
    on_gpu: bool,
) -> list[Row]:
    count, pattern = HEADLINE

    def ratio(ops: tuple[str, ...], other: str) -> float:
        cells = [rates[op, pattern, count] for op in ops]
        return min(_median(cell[ONECAST]) / _median(cell[other]) for cell in cells)

    values = {
        "swap_gpu_vs_pinned": ratio((OUT, IN), ONE_COPY),
        "copy_gpu_vs_device_copy": ratio((COPY,), ONE_COPY),
        "swap_hidden_share": _median(hidden[pattern, count][ONECAST]) / 100,
        "swap_gpu_vs_per_layer_copies": ratio((OUT, IN), PER_LAYER),
    }
    targets = FIGURES if on_gpu else dict.fromkeys(FIGURES, REPORTED)
    return [make_figure(name, targets[name], value, [value]) for name, value in values.items()]


def _median(values: Sequence[float]) -> float:
    median: float = summarize(values)["median"]
    return median


class _Bench:
    """Two pools, and all that moves between them."""

    def __init__(self, size: Size, device: str) -> None:
        self.device = torch.device(device)
        self._gpu = self.device.type == "cuda"
        self._chance = random.Random(0)
        self._num_blocks = blocks = 2 * max(size.counts) + 8
        self._block_bytes = KVCache.bytes_per_block(size.spec, _BLOCK_SIZE)
        self._pieces = 2 * size.spec.num_layers
        self.movers: dict[str, BlockMover] = {}
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}
        self._cache = KVCache(
            size.spec,
            num_blocks=blocks,
            num_host_blocks=blocks,
            block_size=_BLOCK_SIZE,
            device=self.device,
            make_mover=self._make_movers,
        )

    def _make_movers(self, device_rows: Tensor, host_rows: Tensor) -> BlockMover:
        """All of them, over the cache's two pools; that of the cache is returned."""
        if self._gpu:
            self.movers[ONECAST] = CudaMover(device_rows, host_rows)
            for way in WAYS if host_rows.is_pinned() else (COPIES,):
                self.movers[way] = CudaMover(device_rows, host_rows, way)
        else:
            self.movers[ONECAST] = HostMover(device_rows, host_rows)
        numbers = torch.randint(0, 256, device_rows.shape, dtype=torch.uint8)
        device_rows.copy_(numbers)
        host_rows.copy_(numbers.flip(1))
        self._rows = {OUT: (device_rows, host_rows), IN: (host_rows, device_rows)}
        self._rows[COPY] = (device_rows, device_rows)
        return self.movers[ONECAST]

    def close(self) -> None:
        for mover in self.movers.values():
            mover.close()

    def row(self, workload: str, method: str, metric: str, values: list[float]) -> Row:
        """More is better: p99 is the value that a hundredth stays below."""
        found = summarize(values) | {"p99": -p99([-value for value in values])}
        where = workload if self._gpu else f"{workload} (CPU)"
        return {
            "workload": where,
            "method": method,
            "ranks": 1,
            "mode": "blocks",
            "metric": metric,
            **found,
        }

    def pairs(self, pattern: str, count: int) -> Pairs:
        """Blocks drawn anew, none of them twice."""
        half = self._num_blocks // 2
        if pattern == CONTIGUOUS:
            first = self._chance.sample((0, half), 2)
            starts = [start + self._chance.randrange(half - count + 1) for start in first]
            return np.array(starts, np.int64) + np.arange(count, dtype=np.int64)[:, None]
        drawn = self._chance.sample(range(self._num_blocks), 2 * count)
        return np.array(drawn, np.int64).reshape(count, 2)

    def swaps(self, pattern: str, count: int) -> Callable[[], tuple[Pairs, Pairs]]:
        """What goes out and what comes in beside a forward: half of `count` each, nothing twice."""

        def draw() -> tuple[Pairs, Pairs]:
            pairs = self.pairs(pattern, count)
            return pairs[: count // 2], np.ascontiguousarray(pairs[count // 2 :, ::-1])

        return draw

    def rates(self, op: str, pattern: str, count: int, steps: int) -> dict[str, list[float]]:
        """GB/s of each method."""
        methods: dict[str, Callable[[Pairs], object]] = {
            name: self._mover_call(op, mover)
            for name, mover in self.movers.items()
            if op != COPY or name == ONECAST
        }
        source, destination = self._rows[op]
        methods[ONE_COPY] = lambda pairs: destination[: len(pairs)].copy_(
            source[self._num_blocks - len(pairs) :], non_blocking=True
        )
        methods[PER_LAYER] = lambda pairs: self._per_layer(op, pairs)
        rates: dict[str, list[float]] = {name: [] for name in methods}
        elapsed = self._on_gpu_clock if self._gpu and op == COPY else self._until_there
        end = time.perf_counter() + _CELL_S
        done = -_UNTIMED
        while done < steps and (done < 3 or time.perf_counter() < end):
            for name, call in methods.items():
                pairs = self.pairs(pattern, count)
                seconds = elapsed(call, pairs)
                if done < 0 and name != ONE_COPY:
                    self._check(op, pairs, name)
                elif done >= 0:
                    rates[name].append(count * self._block_bytes / seconds / 1e9)
            done += 1
        return rates

    def _mover_call(self, op: str, mover: BlockMover) -> Callable[[Pairs], object]:
        if op == COPY:
            return mover.copy
        move = mover.swap_out if op == OUT else mover.swap_in

        def swap(pairs: Pairs) -> None:
            step = time.monotonic_ns()  # it only has to rise
            move(step, pairs)
            mover.wait(step)

        return swap

    def _per_layer(self, op: str, pairs: Pairs) -> None:
        pools = self._rows[op]
        source, destination = (rows.view(self._num_blocks, self._pieces, -1) for rows in pools)
        for piece in range(self._pieces):
            for a, b in pairs.tolist():
                destination[b, piece].copy_(source[a, piece], non_blocking=True)

    def _until_there(self, call: Callable[[Pairs], object], pairs: Pairs) -> float:
        self._synchronize()
        begin = time.perf_counter()
        call(pairs)
        self._synchronize()
        return time.perf_counter() - begin

    def _on_gpu_clock(self, call: Callable[[Pairs], object], pairs: Pairs) -> float:
        make: Any = torch.cuda.Event
        begin, end = make(enable_timing=True), make(enable_timing=True)
        torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        call(pairs)
        end.record()
        end.synchronize()
        seconds: float = begin.elapsed_time(end) / 1e3
        return seconds

    def _synchronize(self) -> None:
        if self._gpu:
            torch.cuda.current_stream(self.device).synchronize()

    def _check(self, op: str, pairs: Pairs, name: str) -> None:
        source, destination = self._rows[op]
        for a, b in pairs[:: max(1, len(pairs) // 4)].tolist():
            if not torch.equal(source[a].cpu(), destination[b].cpu()):
                raise RuntimeError(f"{name}: {op} ({a}, {b}) did not arrive")


if __name__ == "__main__":
    sys.exit(main())
