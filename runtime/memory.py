"""How many KV-cache blocks a rank gets: what was asked for, or what memory allows.

Owns that decision and what memory the host has; whether the pools fit is the KV cache's own check.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from .config import EngineConfig
from .step_arrays import StepArrays

CUDA_SHARE = 0.90  # of the free device memory, once the weights are there
HOST_SHARE = 0.25  # of the memory available to all ranks of the host


def block_counts(
    config: EngineConfig,
    *,
    bytes_per_block: int,
    max_model_len: int,
    device: torch.device,
    local_world_size: int,
) -> tuple[int, int]:
    """Return `(num_blocks, num_host_blocks)`, the same on every rank of the default group.

    Without `--num-blocks` there is room for `--max-batch-size` sequences of the greatest length,
    or for as much of that as memory allows; without `--num-host-blocks` as many on the host.
    """
    host_bytes = int(available_host_bytes() * HOST_SHARE) // local_world_size
    num_blocks, num_host_blocks = config.num_blocks, config.num_host_blocks
    if num_blocks is None:
        device_bytes = host_bytes
        if device.type == "cuda":
            device_bytes = int(torch.cuda.mem_get_info(device)[0] * CUDA_SHARE)
        wanted = config.max_batch_size * -(-max_model_len // config.block_size)
        num_blocks = _agreed(max(1, min(wanted, device_bytes // bytes_per_block)), device)
    if num_host_blocks is None:
        num_host_blocks = _agreed(min(num_blocks, host_bytes // bytes_per_block), device)
    return num_blocks, num_host_blocks


def check_host_memory(config: EngineConfig, *, bytes_per_block: int, local_ranks: int) -> None:
    """ValueError: the blocks that were asked for need more host memory than there is.

    All ranks of this host together: each for itself would find enough.
    """
    num_blocks = config.num_host_blocks or 0
    options = "--num-blocks, --num-host-blocks"
    if config.device == "cpu":
        num_blocks += config.num_blocks or 1
        options += "" if config.num_blocks else ", --block-size"
    needed, available = local_ranks * num_blocks * bytes_per_block, available_host_bytes()
    if needed > available:
        raise ValueError(
            f"{options}: {num_blocks:,} blocks of {bytes_per_block:,} bytes "
            f"on {local_ranks} ranks need {needed:,} bytes of memory; {available:,} are available"
        )


def check_step_memory(config: EngineConfig, *, max_model_len: int) -> None:
    """ValueError: the arrays that a driver keeps for the largest step need more than there is."""
    sequences = min(config.max_batch_size, config.max_batch_tokens)
    max_blocks = -(-max_model_len // config.block_size)
    needed = StepArrays.nbytes(config.max_batch_tokens, sequences, max_blocks)
    available = available_host_bytes()
    if needed > available:
        raise ValueError(
            f"--max-batch-tokens, --max-batch-size, --block-size: a step of "
            f"{config.max_batch_tokens:,} tokens, or {sequences:,} sequences of {max_blocks:,} "
            f"blocks, needs {needed:,} bytes of memory; {available:,} are available"
        )


def available_host_bytes() -> int:
    """Memory the kernel says is available, within the container's limit where there is one.

    Of the container's use, files the kernel can drop at once do not count, as for the kubelet.
    """
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    cgroup = Path("/sys/fs/cgroup")
    if not (cgroup / "memory.max").exists():
        return available
    limit = (cgroup / "memory.max").read_text().strip()
    if limit == "max":
        return available
    statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    used = int((cgroup / "memory.current").read_text()) - int(statistics["inactive_file"])
    return min(available, max(0, int(limit) - used))


def _agreed(count: int, device: torch.device) -> int:
    """The least of all ranks' counts: one driver plans the blocks of all of them."""
    if dist.get_world_size() == 1:
        return count
    tensor = torch.tensor([count], dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor.item())
