"""Random plans leave the same bytes whatever moves the blocks: Triton's kernel, a GPU's copies.

On the CPU the kernel is run by Triton's interpreter, in a process of its own: whether a kernel is
interpreted is settled when it is made. The plain mover of the CPU is in `test_kv_cache.py`.
"""

import os
import random
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from block_plans import check_random_plans, random_plan

from onecast.runtime.block_ops import BlockOps
from onecast.runtime.kv_cache import CacheSpec, KVCache


def make_cache(
    device: str, make_mover: Any = None, dtype: torch.dtype = torch.bfloat16, head_dim: int = 8
) -> KVCache:
    spec = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=head_dim, dtype=dtype)
    return KVCache(
        spec, num_blocks=40, num_host_blocks=24, block_size=4, device=device, make_mover=make_mover
    )


class InterpretedMover:
    """Every move by the kernel, over pools in the CPU's memory; over when a call returns."""

    def __init__(self, device_rows: torch.Tensor, host_rows: torch.Tensor) -> None:
        from onecast.runtime import kernels

        self._kernels = kernels
        self._device, self._host = kernels.as_words(device_rows), kernels.as_words(host_rows)

    def _move(self, source: torch.Tensor, destination: torch.Tensor, pairs: Any) -> None:
        self._kernels.move_rows(source, destination, torch.from_numpy(pairs.copy()), 3)

    def swap_out(self, step: int, pairs: Any) -> None:
        self._move(self._device, self._host, pairs)

    def swap_in(self, step: int, pairs: Any) -> None:
        self._move(self._host, self._device, pairs)

    def copy(self, pairs: Any) -> None:
        self._move(self._device, self._device, pairs)

    def wait(self, step: int) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


def interpret(steps: int) -> None:
    """In a process whose kernels are interpreted."""
    check_random_plans(make_cache("cpu", InterpretedMover), steps, seed=0)
    # Blocks of several of the kernel's tiles, one of which is not full: many times as slow.
    check_random_plans(make_cache("cpu", InterpretedMover, head_dim=1100), steps // 10, seed=1)


@pytest.mark.parametrize("steps", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_random_plans_through_the_kernel_in_the_interpreter(steps: int) -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(steps)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["copies", "kernel"])
@pytest.mark.parametrize("head_dim", [8, 1100])
def test_random_plans_on_a_gpu_each_way(way: str, head_dim: int) -> None:
    from onecast.runtime.cuda_mover import CudaMover

    if way == "kernel":
        pytest.importorskip("triton")
    for seed in range(4):
        cache = make_cache("cuda", partial(CudaMover, way=way), head_dim=head_dim)
        check_random_plans(cache, 1000, seed)
        cache.close()


@pytest.mark.parametrize(("num_blocks", "num_host_blocks"), [(13, 7), (40, 24), (4, 30), (30, 2)])
def test_random_plans_hold_every_kind_of_move_alone_and_together(
    num_blocks: int, num_host_blocks: int
) -> None:
    """Or the tests that are made of them would show little."""
    rng = random.Random(num_blocks)
    plans = [random_plan(rng, num_blocks, num_host_blocks) for _ in range(500)]
    kinds = ("swap_out", "swap_in", "copy")
    seen = {tuple(bool(getattr(plan, kind)) for kind in kinds) for plan in plans}
    assert len(seen) == 2 ** len(kinds)
    assert any(overtaken(plan) for plan in plans)


def overtaken(plan: BlockOps) -> bool:
    """A block is swapped out and filled anew in the same step."""
    out = np.array([source for source, _ in plan.swap_out])
    return bool(np.isin(out, [block for _, block in plan.swap_in + plan.copy]).any())


if __name__ == "__main__":
    interpret(int(sys.argv[1]))
