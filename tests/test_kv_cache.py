"""Blocks arrive byte for byte, in the order of a step, whatever the pools hold."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

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


def make_cache(device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int) -> KVCache:
    spec = CacheSpec(SPEC.num_layers, SPEC.num_kv_heads, SPEC.head_dim, dtype)
    sizes = {"num_blocks": 13, "num_host_blocks": 7, "block_size": 4, **sizes}
    return KVCache(spec, device=device, **sizes)


def pairs_of(pairs: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64).view(len(pairs), 2)


def block_bytes(pool: torch.Tensor) -> list[bytes]:
    return [block.cpu().contiguous().view(torch.uint8).numpy().tobytes() for block in pool]


def fill(cache: KVCache, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for pool in (cache.device_pool, cache.host_pool):
        noise = torch.randint(0, 256, (pool.nbytes,), dtype=torch.uint8, generator=generator)
        pool.copy_(noise.view(pool.dtype).view(pool.shape))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_steps_leave_what_a_plain_model_of_the_pools_holds(
    device: str, dtype: torch.dtype
) -> None:
    cache = make_cache(device, dtype)
    fill(cache, 0)
    on_device, on_host = block_bytes(cache.device_pool), block_bytes(cache.host_pool)
    rng = random.Random(1)

    def some(first: int, second: int) -> list[tuple[int, int]]:
        return [(rng.randrange(first), rng.randrange(second)) for _ in range(rng.randrange(4))]

    for step in range(2000):
        swap_out, swap_in, copy = some(13, 7), some(7, 13), some(13, 13)
        cache.apply(
            {
                "swap_out": pairs_of(swap_out),
                "swap_in": pairs_of(swap_in),
                "copy": pairs_of(copy),
                "step": step,
            }
        )
        for source, destination in swap_out:
            on_host[destination] = on_device[source]
        for source, destination in swap_in:
            on_device[destination] = on_host[source]
        for source, destination in copy:
            on_device[destination] = on_device[source]
        if step % 100 == 0 or step == 1999:
            assert block_bytes(cache.device_pool) == on_device
            assert block_bytes(cache.host_pool) == on_host


def test_a_block_swapped_out_makes_room_for_one_swapped_in_and_copied_in_the_same_step() -> None:
    cache = make_cache()
    fill(cache, 1)
    device, host = block_bytes(cache.device_pool), block_bytes(cache.host_pool)
    cache.apply(
        {
            "swap_out": pairs_of([(2, 0)]),
            "swap_in": pairs_of([(1, 2)]),
            "copy": pairs_of([(2, 3), (3, 4)]),
        }
    )
    assert block_bytes(cache.host_pool)[0] == device[2]
    assert block_bytes(cache.device_pool)[2:5] == [host[1]] * 3


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


def test_blocks_that_were_never_written_hold_zeros() -> None:
    cache = make_cache(num_blocks=500)
    assert not cache.device_pool.any() and not cache.host_pool.any()


def test_no_host_blocks_are_needed_where_nothing_is_swapped() -> None:
    cache = make_cache(num_host_blocks=0)
    nothing = pairs_of([])
    cache.apply({"swap_out": nothing, "swap_in": nothing, "copy": pairs_of([(0, 1)])})


@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: cache.swap_out(pairs_of([(0, 7)])),
        lambda cache: cache.swap_in(pairs_of([(7, 0)])),
        lambda cache: cache.copy(pairs_of([(0, 13)])),
        lambda cache: cache.copy(pairs_of([(-1, 0)])),
    ],
)
def test_a_block_outside_its_pool_is_an_error_and_not_another_block(
    operation: Callable[[KVCache], Any],
) -> None:
    cache = make_cache()
    fill(cache, 2)
    before = block_bytes(cache.device_pool), block_bytes(cache.host_pool)
    with pytest.raises(AssertionError, match=r"block (7 of 7|13 of 13|-1 of 13)"):
        operation(cache)
    assert (block_bytes(cache.device_pool), block_bytes(cache.host_pool)) == before


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
    from onecast.runtime import kv_cache

    zeros = torch.zeros

    def refuse(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("the limit on locked memory is reached")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(kv_cache.torch, "zeros", refuse)
    with pytest.warns(RuntimeWarning, match=r"cannot lock 320 bytes .* slower: the limit on"):
        pool = kv_cache._host_zeros((2, 5, 8), torch.float32, pinned=True)
    assert pool.shape == (2, 5, 8) and not pool.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kv_cache._host_zeros((0, 5, 8), torch.float32, pinned=True)


def test_pairs_may_come_as_read_only_views_of_a_frame() -> None:
    cache = make_cache()
    fill(cache, 3)
    frame = np.frombuffer(np.array([2, 5, 6, 1], np.int64).tobytes(), np.int64).reshape(2, 2)
    expected = block_bytes(cache.device_pool)
    expected[5], expected[1] = expected[2], expected[6]
    cache.copy(frame)
    assert block_bytes(cache.device_pool) == expected
