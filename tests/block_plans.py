"""Random steps of block moves as a driver may plan them, and a plain cache to hold them against.

For any mover: give `check_random_plans` a `KVCache` that has it.
"""

import random
from typing import Any

import numpy as np
import torch

from onecast.runtime.block_ops import BlockOps
from onecast.runtime.kv_cache import KVCache

Pairs = list[tuple[int, int]]


class PlainCache:
    """Block number -> bytes, for both pools; moves are dict assignments from what was before."""

    def __init__(self, cache: KVCache) -> None:
        self.device = dict(enumerate(pool_bytes(cache.device_pool)))
        self.host = dict(enumerate(pool_bytes(cache.host_pool)))

    def apply(self, ops: BlockOps) -> None:
        for pairs, source, target in (
            (ops.swap_out, self.device, self.host),
            (ops.swap_in, self.host, self.device),
            (ops.copy, self.device, self.device),
        ):
            target.update({b: source[a] for a, b in pairs})

    def check(self, cache: KVCache) -> None:
        assert dict(enumerate(pool_bytes(cache.device_pool))) == self.device
        assert dict(enumerate(pool_bytes(cache.host_pool))) == self.host


def pool_bytes(pool: torch.Tensor) -> list[bytes]:
    return [block.cpu().contiguous().view(torch.uint8).numpy().tobytes() for block in pool]


def fill_pools(cache: KVCache, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for pool in (cache.device_pool, cache.host_pool):
        noise = torch.randint(0, 256, (pool.nbytes,), dtype=torch.uint8, generator=generator)
        pool.copy_(noise.view(pool.dtype).view(pool.shape))


def random_plan(rng: random.Random, num_blocks: int, num_host_blocks: int) -> BlockOps:
    """Moves that keep the rules of `block_ops.py`: scattered blocks, runs of them, or none."""
    device, host = list(range(num_blocks)), list(range(num_host_blocks))
    # Free blocks left in order give runs; shuffled ones do not.
    for blocks in (device, host):
        if rng.random() < 0.6:
            rng.shuffle(blocks)
        else:
            turn = rng.randrange(len(blocks))
            blocks[:] = blocks[turn:] + blocks[:turn]

    def some(blocks: list[int], most: int) -> list[int]:
        taken = rng.choice((0, 1, rng.randrange(most + 1)))
        return [blocks.pop(0) for _ in range(min(taken, len(blocks)))]

    filled_host = some(host, num_host_blocks // 2)
    read_host = some(host, min(num_blocks, num_host_blocks) // 2)
    filled_by_swap = device[: len(read_host)]
    del device[: len(read_host)]
    filled_by_copy = some(device, num_blocks // 3)
    first = rng.randrange(num_blocks)  # what is swapped out may be filled again in the same step
    swapped_out = [(first + i) % num_blocks for i in range(num_blocks)]
    if rng.random() < 0.6:
        rng.shuffle(swapped_out)
    ops = BlockOps(
        swap_out=list(zip(swapped_out, filled_host, strict=False)),
        swap_in=list(zip(read_host, filled_by_swap, strict=True)),
        # A block may be copied to several: forks of one sequence.
        copy=[
            (rng.choice(device) if rng.random() < 0.3 else device[i % len(device)], target)
            for i, target in enumerate(filled_by_copy)
        ],
    )
    for pairs in (ops.swap_out, ops.swap_in, ops.copy):
        if rng.random() < 0.5:
            rng.shuffle(pairs)
    ops.validate(num_blocks, num_host_blocks)
    return ops


def as_frame(pairs: Pairs, kind: str, device: torch.device) -> Any:
    """Pairs in one of the ways in which they may come."""
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    if kind == "read-only":
        return np.frombuffer(array.tobytes(), np.int64).reshape(-1, 2)
    if kind == "tensor":
        return torch.from_numpy(array).to(device)
    return array if kind == "array" else pairs


def check_random_plans(cache: KVCache, steps: int, seed: int) -> None:
    """Blocks are byte-equal to those of a plain cache after mixed moves and forwards.

    A forward is a write to some device blocks behind the moves. A step waits for no more than it
    must: the newest swap of the blocks that it copies or writes.
    """
    fill_pools(cache, seed)
    model, rng = PlainCache(cache), random.Random(seed)
    swapped = [-1] * cache.num_blocks  # the step in which each device block was last swapped
    for step in range(steps):
        ops = random_plan(rng, cache.num_blocks, cache.num_host_blocks)
        written = rng.sample(range(cache.num_blocks), rng.randrange(4))
        for block in [a for a, _ in ops.swap_out] + [b for _, b in ops.swap_in]:
            swapped[block] = step
        used = [*written, *(block for pair in ops.copy for block in pair)]
        kind = rng.choice(("tensor", "read-only", "array", "list"))
        frame: dict[str, Any] = {
            name: as_frame(getattr(ops, name), kind, cache.device)
            for name in ("swap_out", "swap_in", "copy")
        }
        frame["step"] = step
        frame["swaps_awaited"] = max((swapped[block] for block in used), default=-1)
        cache.apply(frame)
        model.apply(ops)
        for block in written:
            content = rng.randbytes(len(model.device[block]))
            row = torch.frombuffer(bytearray(content), dtype=cache.spec.dtype)
            cache.device_pool[block].copy_(row.view(cache.device_pool.shape[1:]))
            model.device[block] = content
        if step % 97 == 0 or step == steps - 1:
            cache.apply({"swap_out": [], "swap_in": [], "copy": [], "step": step})  # waits for all
            model.check(cache)
