"""What a report of the end-to-end benchmark was measured on: hardware, versions, the model.

Owns how those are found out. Knows nothing of what was measured.
"""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from onecast.runtime.gpu_memory import total_gpu_bytes
from onecast.runtime.kv_cache import CacheSpec, KVCache
from onecast.runtime.memory import available_host_bytes
from onecast.runtime.model_config import ModelConfig
from onecast.runtime.model_runner import compute_dtype
from onecast.runtime.weights import check_checkpoint, weights_dtype

from .e2e_run import BLOCK_SIZE
from .figures import Row
from .nccl import nccl_refusal
from .synthetic import count_parameters


def describe_hardware() -> Row:
    """CPU, cores that this process may use, memory; GPUs only where torch finds any."""
    return {
        "cpu": _cpu(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
    }


def describe_versions() -> dict[str, str]:
    return {
        "onecast": _own_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "kernel": platform.release(),
    }


def _own_version() -> str:
    try:
        return version("onecast")
    except PackageNotFoundError:
        return "a checkout, not installed"


def describe_model(path: Path, name: str, synthetic: str | None, device: str) -> Row:
    """What the model is, and in which dtype it is computed there."""
    config = ModelConfig.from_dir(path)
    return {
        "name": name,
        "path": str(path),
        "synthetic": synthetic,
        "parameters": count_parameters(config),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "dtype": str(_dtype(path, config, device)).removeprefix("torch."),
        "device": device,
    }


def check_model(path: Path, device: str, tp: int, context: int, num_blocks: int) -> None:
    """ValueError, in one line: the model is none, or cannot run so here; see `check_config`."""
    config = ModelConfig.from_dir(path)
    check_config(config, _dtype(path, config, device), device, tp, context, num_blocks)


def check_config(
    config: ModelConfig, dtype: torch.dtype, device: str, tp: int, context: int, num_blocks: int
) -> None:
    """ValueError, in one line: a model of that shape, computed in `dtype`, cannot run so here.

    `context`: tokens of the longest sequence. `num_blocks` of 16 tokens are each rank's cache.
    """
    config.check_tensor_parallel(tp)
    if context > config.max_position_embeddings:
        raise ValueError(
            f"--drawn: sequences of {context} tokens exceed the model's context of "
            f"{config.max_position_embeddings}"
        )
    ranks = tp  # that share what is counted
    if device == "cuda":
        refusal = nccl_refusal(tp)
        if refusal is not None:
            raise ValueError(f"--device cuda, --tp {tp}: {refusal}")
        ranks = -(-tp // torch.cuda.device_count())
    spec = CacheSpec(config.num_layers, config.kv_heads_per_rank(tp), config.head_dim, dtype)
    weights = count_parameters(config) * dtype.itemsize // tp
    blocks = num_blocks * KVCache.bytes_per_block(spec, BLOCK_SIZE)
    needed = ranks * (weights + blocks)
    where = "a GPU here" if device == "cuda" else "this machine"
    available = max(total_gpu_bytes(), default=needed)
    if device == "cpu":
        available = available_host_bytes()
    if needed > available:
        raise ValueError(
            f"--model, --synthetic, --tp {tp}: {weights:,} bytes of {dtype} weights and "
            f"{blocks:,} of KV cache on each of {ranks} ranks need {needed:,} bytes of memory; "
            f"{where} has {available:,}"
        )


def _dtype(path: Path, config: ModelConfig, device: str) -> torch.dtype:
    tensors = check_checkpoint(path, config)
    return compute_dtype("auto", config, torch.device(device)) or weights_dtype(tensors)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[str]:
    """Names, by `nvidia-smi`: torch would make a CUDA context."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.splitlines()
