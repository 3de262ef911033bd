"""Whether weights and KV cache can fit the GPUs of this host, asked before any rank starts.

Owns that one question, and how `nvidia-smi` answers it: torch would make a CUDA context, which a
launcher must not hold. What is free once the weights are loaded is the rank's own, later check.
"""

import shutil
import subprocess
from collections.abc import Iterable

import torch

from .config import EngineConfig
from .weights import StoredTensor

_TIMEOUT_S = 10  # of nvidia-smi, which takes long where no GPU is kept initialised
_QUERY = ("--query-gpu=memory.total", "--format=csv,noheader,nounits")


def check_gpu_memory(
    config: EngineConfig,
    *,
    tensors: Iterable[StoredTensor],
    dtype: torch.dtype,
    bytes_per_block: int,
    tp: int,
    ranks_per_gpu: int,
) -> None:
    """ValueError: weights and blocks need more memory than a GPU has, whatever is free of it.

    `tensors` are the checkpoint's, `dtype` what they are computed in; each of `tp` ranks holds its
    share at least. Without `--num-blocks` there is one block at least. Of unlike GPUs the largest
    counts: no run is refused that might work. Says nothing where `nvidia-smi` gives no answer.
    """
    totals = total_gpu_bytes()
    if not totals:
        return
    available = max(totals)
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    weights = numbers * dtype.itemsize // tp
    num_blocks = config.num_blocks or 1
    needed = ranks_per_gpu * (weights + num_blocks * bytes_per_block)
    if needed <= available:
        return
    ranks = "" if ranks_per_gpu == 1 else f" for each of {ranks_per_gpu} ranks"
    option = "--model, --tp" if config.num_blocks is None else "--num-blocks"
    blocks = "1 block" if num_blocks == 1 else f"{num_blocks:,} blocks"
    raise ValueError(
        f"{option}: {weights:,} bytes of weights and {blocks} of {bytes_per_block:,} bytes"
        f"{ranks} need {needed:,} bytes of GPU memory; a GPU here has {available:,}"
    )


def total_gpu_bytes() -> list[int]:
    """Memory of each GPU, free or not; empty where `nvidia-smi` is missing or does not tell."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        answer = subprocess.run(
            [command, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []  # a driver that does not work shows when torch looks for GPUs
    lines = [line.strip() for line in answer.stdout.splitlines()]
    # Some GPUs share the host's memory and have none to tell: "[N/A]".
    return [int(line) << 20 for line in lines if line.isdecimal()]
