"""One launch of `onecast bench blocks`: a KV cache moves blocks, others as many bytes.

Owns the pools, where each method finds its bytes, and the rounds. Knows nothing of medians.

    onecast         `KVCache.swap_out`, `swap_in`, `copy` with the pairs as a frame brings them
    memcpy          one memmove of as many bytes
    Tensor.copy_    one torch copy of as many bytes
    per layer, Tensor.copy_   a layer-major cache: keys and values of each layer lie apart, so one
                              copy per block and layer for each of the two
    per layer, numpy          the same with the cheapest such loop that Python has, one row of an
                              array assigned to another

All work on the same two pools, which are far larger than the caches and were written before. Each
method of a round draws its own places, so that none finds in the cache what another has moved; its
arguments are made before the clock runs. All copies run on one core.
"""

import ctypes
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from onecast.comm.testing import run_ranks
from onecast.runtime.kv_cache import CacheSpec, KVCache
from onecast.runtime.memory import available_host_bytes

BLOCK_SIZE = 16  # tokens

ONECAST, MEMCPY, COPY = "onecast", "memcpy", "Tensor.copy_"
PER_LAYER, PER_LAYER_NUMPY = "per layer, Tensor.copy_", "per layer, numpy"
SWAPS = ("swap_out", "swap_in")
OPS = (*SWAPS, "copy")
PATTERNS = SCATTERED, CONTIGUOUS = ("scattered", "contiguous")


class Model(NamedTuple):
    """Whose blocks they are."""

    name: str
    spec: CacheSpec  # of one rank

    @property
    def block_bytes(self) -> int:
        return KVCache.bytes_per_block(self.spec, BLOCK_SIZE)


class Headline(NamedTuple):
    """The figures with a target are of scattered blocks of this model, so many at once."""

    model: str
    blocks: int


class Plan(NamedTuple):
    models: tuple[Model, ...]
    counts: tuple[int, ...]  # of blocks moved at once
    pool_bytes: int  # at least, of each of the two
    cell_s: float  # what one number of blocks gets, in one kind of move
    least_rounds: int
    launches: int
    headline: Headline


class Cell(NamedTuple):
    """What the methods are compared in."""

    model: str
    block_bytes: int
    op: str
    pattern: str
    blocks: int


Times = dict[str, list[int]]  # ns by method; the values at one index are of one round


def launch(plan: Plan) -> dict[Cell, Times]:
    """Start a process and measure every cell that memory has room for."""
    (found,) = run_ranks(_measure, 1, plan, timeout_s=900.0)
    times: dict[Cell, Times] = found
    return times


def methods_of(op: str, pattern: str) -> tuple[str, ...]:
    """Layer-major moves are measured where they matter: scattered blocks to and from the host."""
    if op in SWAPS and pattern == SCATTERED:
        return ONECAST, MEMCPY, COPY, PER_LAYER, PER_LAYER_NUMPY
    return ONECAST, MEMCPY, COPY


def _measure(rank: int, plan: Plan) -> dict[Cell, Times]:
    chance = random.Random(rank)
    found: dict[Cell, Times] = {}
    for model in plan.models:
        counts = [n for n in plan.counts if _pool_blocks(model, n, 0) is not None]
        num_blocks = _pool_blocks(model, max(counts, default=1), plan.pool_bytes)
        if num_blocks is None:
            continue
        pools = Pools(model.spec, num_blocks)
        for count in counts:
            for pattern in PATTERNS:
                for op in OPS:
                    cell = Cell(model.name, model.block_bytes, op, pattern, count)
                    found[cell] = _rounds(pools, cell, plan, chance)
    return found


def _pool_blocks(model: Model, count: int, pool_bytes: int) -> int | None:
    """Blocks a pool needs, so that places can be drawn; None where memory has no room for two."""
    blocks = max(2 * count + count // 2, pool_bytes // model.block_bytes)
    return blocks if 2 * blocks * model.block_bytes <= available_host_bytes() // 2 else None


def _rounds(pools: "Pools", cell: Cell, plan: Plan, chance: random.Random) -> Times:
    names = methods_of(cell.op, cell.pattern)
    times: Times = {name: [] for name in names}
    clock = time.perf_counter
    end = clock() + plan.cell_s
    done = -1  # the first round only warms up
    while done < plan.least_rounds or clock() < end:
        for name in chance.sample(names, len(names)):
            move = pools.prepare(name, cell.op, cell.pattern, cell.blocks, chance)
            begin = time.perf_counter_ns()
            move()
            elapsed = time.perf_counter_ns() - begin
            if done >= 0:
                times[name].append(elapsed)
        done += 1
    return times


class Side:
    """One pool in all the ways in which the methods see it."""

    def __init__(self, pool: Tensor, num_pieces: int) -> None:
        self.num_blocks = pool.shape[0]
        self.flat = pool.view(-1).view(torch.uint8)
        self.address = self.flat.data_ptr()
        # As a layer-major cache has them: `num_pieces` arrays [num_blocks, bytes].
        self.tensors = list(self.flat.view(num_pieces, self.num_blocks, -1))
        self.arrays: list[np.ndarray[Any, Any]] = [tensor.numpy() for tensor in self.tensors]


class Pools:
    """A KV cache on the CPU, and the same memory for the other methods."""

    def __init__(self, spec: CacheSpec, num_blocks: int) -> None:
        self._cache = cache = KVCache(
            spec, num_blocks=num_blocks, num_host_blocks=num_blocks, block_size=BLOCK_SIZE,
            device="cpu",
        )  # fmt: skip
        self._num_blocks = num_blocks
        self._block_bytes = KVCache.bytes_per_block(spec, BLOCK_SIZE)
        pieces = 2 * spec.num_layers
        device, host = Side(cache.device_pool, pieces), Side(cache.host_pool, pieces)
        self._sides = {
            "swap_out": (device, host),
            "swap_in": (host, device),
            "copy": (device, device),
        }
        for number, side in enumerate((device, host)):
            side.flat.fill_(number + 1)  # what was never written is one page of zeros

    def sides(self, op: str) -> tuple[Side, Side]:
        """Where a kind of move reads and where it writes."""
        return self._sides[op]

    def prepare(
        self, method: str, op: str, pattern: str, count: int, chance: random.Random
    ) -> Callable[[], object]:
        """What moves `count` blocks between places that it draws."""
        source, destination = self.sides(op)
        if method in (MEMCPY, COPY):
            nbytes = count * self._block_bytes
            start, target = (first * self._block_bytes for first in self._runs(count, chance))
            if method == MEMCPY:
                arguments = (destination.address + target, source.address + start, nbytes)
                return lambda: ctypes.memmove(*arguments)
            into = destination.flat[target : target + nbytes]
            out_of = source.flat[start : start + nbytes]
            return lambda: into.copy_(out_of)
        places = self.places(pattern, count, chance)
        if method == ONECAST:
            move, pairs = getattr(self._cache, op), torch.tensor(places)
            return lambda: move(pairs)
        if method == PER_LAYER:
            return lambda: _copy_pieces(source.tensors, destination.tensors, places)
        assert method == PER_LAYER_NUMPY, method
        return lambda: _assign_rows(source.arrays, destination.arrays, places)

    def places(self, pattern: str, count: int, chance: random.Random) -> list[tuple[int, int]]:
        """Pairs of blocks, none of them twice."""
        if pattern == CONTIGUOUS:
            start, target = self._runs(count, chance)
            return [(start + i, target + i) for i in range(count)]
        drawn = chance.sample(range(self._num_blocks), 2 * count)
        return list(zip(drawn[:count], drawn[count:], strict=True))

    def _runs(self, count: int, chance: random.Random) -> list[int]:
        """The first blocks of two runs that do not meet, even in one pool: one in each half."""
        half = self._num_blocks // 2
        starts = [chance.randrange(half - count + 1), half + chance.randrange(half - count + 1)]
        return chance.sample(starts, 2)


def _copy_pieces(
    source: Sequence[Tensor], destination: Sequence[Tensor], places: Sequence[tuple[int, int]]
) -> None:
    for out_of, into in zip(source, destination, strict=True):
        for a, b in places:
            into[b].copy_(out_of[a])


def _assign_rows(
    source: Sequence[np.ndarray[Any, Any]],
    destination: Sequence[np.ndarray[Any, Any]],
    places: Sequence[tuple[int, int]],
) -> None:
    for out_of, into in zip(source, destination, strict=True):
        for a, b in places:
            into[b] = out_of[a]
