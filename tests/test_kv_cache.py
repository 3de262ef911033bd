"""Blocks arrive byte for byte, in the order of a step, whatever the pools hold."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_plans import check_random_plans, fill_pools, pool_bytes

from onecast.runtime import pool_memory
from onecast.runtime.kv_cache import CacheSpec, KVCache

SPEC = CacheSpec(num_layers=3, num_kv_heads=2, head_dim=4, dtype=torch.float32)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


def make_cache(
    device: str = "cpu", dtype: torch.dtype = torch.float32, make_mover: Any = None, **sizes: int
) -> KVCache:
    spec = CacheSpec(SPEC.num_layers, SPEC.num_kv_heads, SPEC.head_dim, dtype)
    sizes = {"num_blocks": 13, "num_host_blocks": 7, "block_size": 4, **sizes}
    return KVCache(spec, device=device, make_mover=make_mover, **sizes)


class RecordingMover:
    """A mover that moves nothing and tells what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def made_of(self, device_rows: torch.Tensor, host_rows: torch.Tensor) -> "RecordingMover":
        self.calls.append((device_rows.dtype, device_rows.shape, host_rows.shape))
        return self

    def swap_out(self, step: int, pairs: Any) -> None:
        self.calls.append(("swap_out", step, pairs.tolist()))

    def swap_in(self, step: int, pairs: Any) -> None:
        self.calls.append(("swap_in", step, pairs.tolist()))

    def copy(self, pairs: Any) -> None:
        self.calls.append(("copy", pairs.tolist()))

    def wait(self, step: int) -> None:
        self.calls.append(("wait", step))

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "num_blocks", "num_host_blocks"),
    [(torch.float32, 13, 7), (torch.bfloat16, 40, 24), (torch.float16, 300, 300)],
)
def test_random_plans_leave_what_a_plain_cache_holds(
    device: str, dtype: torch.dtype, num_blocks: int, num_host_blocks: int
) -> None:
    cache = make_cache(device, dtype, num_blocks=num_blocks, num_host_blocks=num_host_blocks)
    check_random_plans(cache, steps=300 if num_blocks > 100 else 3000, seed=num_blocks)
    cache.close()


@pytest.mark.parametrize("device", DEVICES)
def test_random_plans_of_large_blocks_leave_what_a_plain_cache_holds(device: str) -> None:
    spec = CacheSpec(num_layers=32, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    cache = KVCache(spec, num_blocks=64, num_host_blocks=48, block_size=16, device=device)
    check_random_plans(cache, steps=200, seed=1)
    cache.close()


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_swapped_out_makes_room_for_one_swapped_in_and_copied_in_the_same_step(
    device: str,
) -> None:
    cache = make_cache(device)
    fill_pools(cache, 1)
    on_device, on_host = pool_bytes(cache.device_pool), pool_bytes(cache.host_pool)
    cache.apply(
        {"step": 0, "swap_out": [(2, 0), (5, 4)], "swap_in": [(1, 2)], "copy": [(3, 5), (3, 4)]}
    )
    assert pool_bytes(cache.device_pool)[2:6] == [on_host[1]] + [on_device[3]] * 3
    assert pool_bytes(cache.host_pool)[0] == on_device[2]
    assert pool_bytes(cache.host_pool)[4] == on_device[5]


def test_a_step_swaps_out_then_in_waits_for_what_it_uses_then_copies() -> None:
    mover, phases = RecordingMover(), []

    @contextmanager
    def phase(name: str) -> Any:
        phases.append(f"{name} begins")
        yield
        phases.append(f"{name} ends")

    cache = make_cache(make_mover=mover.made_of)
    nothing = np.empty((0, 2), np.int64)
    moves = {"swap_out": [(1, 0)], "swap_in": [(2, 3), (4, 5)], "copy": [(6, 7)]}
    still = dict.fromkeys(moves, nothing)
    cache.apply({"step": 8, "swaps_awaited": 7, **moves}, phase)
    cache.apply({"step": 9, "swaps_awaited": -1, **still}, phase)
    cache.apply({"step": 10, **still}, phase)
    cache.swap_out([(3, 3)])
    cache.swap_in([(2, 2)])
    cache.copy([(0, 1), (4, 3)])
    for move in (cache.swap_out, cache.swap_in, cache.copy):
        move(nothing)
    cache.close()
    assert mover.calls == [
        (torch.uint8, (13, 768), (7, 768)),
        ("swap_out", 8, [[1, 0]]),
        ("swap_in", 8, [[2, 3], [4, 5]]),
        ("wait", 7),
        ("copy", [[6, 7]]),
        ("wait", -1),
        ("wait", 10),
        ("swap_out", 10, [[3, 3]]),
        ("wait", 10),
        ("swap_in", 10, [[2, 2]]),
        ("wait", 10),
        ("wait", 10),
        ("copy", [[0, 1], [4, 3]]),
        "close",
    ]
    kinds = ("kv.swap_out", "kv.swap_in", "kv.copy")
    assert phases == [f"{kind} {end}" for kind in kinds for end in ("begins", "ends")]


def test_one_block_of_all_layers_is_contiguous_and_layers_are_views_of_it() -> None:
    cache = make_cache()
    assert cache.device_pool.shape == (13, 3, 2, 4, 2, 4)
    assert cache.host_pool.shape == (7, 3, 2, 4, 2, 4)
    assert cache.device_pool[5].is_contiguous()
    assert cache.device_pool[5].nbytes == KVCache.bytes_per_block(SPEC, 4) == 3 * 2 * 4 * 2 * 4 * 4
    for layer, (keys, values) in enumerate(cache.layers):
        keys[5, 1] = layer + 1.0
        values[5, 1] = -layer - 1.0
    assert cache.device_pool[5, :, 0, 1, 0, 0].tolist() == [1, 2, 3]
    assert cache.device_pool[5, :, 1, 1, 0, 0].tolist() == [-1, -2, -3]


@pytest.mark.parametrize("num_blocks", [500, 50_000])  # of one page each, and of large pages
def test_blocks_that_were_never_written_hold_zeros_and_have_their_memory(num_blocks: int) -> None:
    before = resident_bytes()
    cache = make_cache(num_blocks=num_blocks)
    if num_blocks == 50_000:  # or the first steps would stop at page faults
        assert resident_bytes() - before > 0.9 * cache.device_pool.nbytes
    assert not cache.device_pool.any() and not cache.host_pool.any()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_no_host_blocks_are_needed_where_nothing_is_swapped() -> None:
    cache = make_cache(num_host_blocks=0)
    fill_pools(cache, 4)
    cache.apply({"step": 0, "swap_out": [], "swap_in": np.empty((0, 2)), "copy": [(0, 1)]})
    assert torch.equal(cache.device_pool[0], cache.device_pool[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "pairs", "message"),
    [
        ("swap_out", [(0, 6), (0, 7)], r"swap_out \(0, 7\): block 7 of 7 to fill"),
        ("swap_out", [(0, 6), (13, 5)], r"swap_out \(13, 5\): block 13 of 13 to read"),
        ("swap_in", [(6, 1), (7, 0)], r"swap_in \(7, 0\): block 7 of 7 to read"),
        ("swap_in", [(-1, 0)], r"swap_in \(-1, 0\): block -1 of 7 to read"),
        ("copy", [(1, 2), (0, 13)], r"copy \(0, 13\): block 13 of 13 to fill"),
        ("copy", [(1, 2), (-1, 0)], r"copy \(-1, 0\): block -1 of 13 to read"),
        ("copy", [(i % 13, -(2**63) if i == 90 else 0) for i in range(99)], "block -9223372036"),
    ],
)
def test_a_block_outside_its_pool_is_an_error_before_anything_moves(
    device: str, kind: str, pairs: list[tuple[int, int]], message: str
) -> None:
    cache = make_cache(device)
    fill_pools(cache, 2)
    before = pool_bytes(cache.device_pool), pool_bytes(cache.host_pool)
    step = {"step": 0, "swap_out": [(4, 4)], "swap_in": [(1, 1)], "copy": [(2, 3)], kind: pairs}
    moves: list[Callable[[], None]] = [
        lambda: getattr(cache, kind)(pairs),
        lambda: getattr(cache, kind)(torch.tensor(pairs, device=device)),
        lambda: cache.apply(step),
    ]
    for move in moves:
        with pytest.raises(AssertionError, match=message):
            move()
    assert (pool_bytes(cache.device_pool), pool_bytes(cache.host_pool)) == before


@pytest.mark.parametrize(
    "wrong", [torch.tensor(3), np.array(3), torch.zeros(2, 2, dtype=torch.bfloat16)]
)
def test_what_is_no_list_of_pairs_is_refused_by_every_move(wrong: Any) -> None:
    cache = make_cache()
    for move in (cache.swap_out, cache.swap_in, cache.copy):
        with pytest.raises(ValueError, match=r"they must be integers \[n, 2\]"):
            move(wrong)


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim"])
def test_a_cache_of_nothing_is_refused_by_name(name: str) -> None:
    numbers = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} 0 of a KV cache is less than 1"):
        CacheSpec(**numbers, dtype=torch.float32)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_blocks": 0}, "num_blocks 0 is less than 1"),
        ({"num_host_blocks": -1}, "num_host_blocks -1 is less than 0"),
        ({"block_size": 0}, "block_size 0 is less than 1"),
    ],
)
def test_sizes_below_their_limit_are_refused_by_name(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(**sizes)


def test_pools_larger_than_memory_are_refused_with_both_sizes() -> None:
    needed = 10**10 * KVCache.bytes_per_block(SPEC, 4)
    with pytest.raises(ValueError, match=rf"needs {needed:,} bytes of cpu memory; [\d,]+ are"):
        make_cache(num_blocks=6 * 10**9, num_host_blocks=4 * 10**9)


def test_host_memory_that_cannot_be_locked_is_used_unlocked_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zeros = torch.zeros

    def refuse(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("the limit on locked memory is reached")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(pool_memory.torch, "zeros", refuse)
    cpu = torch.device("cpu")
    for blocks in (2, 200_000):  # of a page, and of large pages
        size = blocks * 5 * 8 * 4
        with pytest.warns(RuntimeWarning, match=rf"lock {size:,} bytes .* slower: the limit on"):
            pool = pool_memory.zeros((blocks, 5, 8), torch.float32, cpu, locked=True)
        assert pool.shape == (blocks, 5, 8) and not pool.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool_memory.zeros((0, 5, 8), torch.float32, cpu, locked=True)


@pytest.mark.parametrize("device", DEVICES)
def test_pairs_may_come_as_read_only_views_of_a_frame(device: str) -> None:
    cache = make_cache(device)
    fill_pools(cache, 3)
    frame = np.frombuffer(np.array([2, 5, 6, 1], np.int64).tobytes(), np.int64).reshape(2, 2)
    expected = pool_bytes(cache.device_pool)
    expected[5], expected[1] = expected[2], expected[6]
    cache.copy(frame)
    assert pool_bytes(cache.device_pool) == expected
