"""What is checked before a run begins, so that a wrong option costs a second and harms no file.

Owns the checks of files, model, GPUs and port, which the launcher does before any process starts
and every rank under torchrun before it joins the others. Changes nothing but missing directories.
"""

import os
import socket
import stat
from pathlib import Path

import torch

from .batch_file import count_lines
from .config import EngineConfig, RunConfig, several_ranks_per_gpu
from .gpu_memory import check_gpu_memory
from .kv_cache import CacheSpec, KVCache
from .memory import check_host_memory, check_step_memory
from .model_config import ModelConfig
from .model_runner import compute_dtype
from .tokenizer import Tokenizer
from .weights import check_checkpoint, weights_dtype

_TRACE_START = b'{"traceEvents":'


def check(config: EngineConfig, tp: int, local_ranks: int, *, with_files: bool = True) -> None:
    """ValueError, in one line with the value and the limit, for a run that cannot work.

    `tp` ranks in all, `local_ranks` of them on this host; `with_files` where input is read and
    results are written, on rank 0's.
    """
    model = ModelConfig.from_dir(config.model)
    model.check_tensor_parallel(tp)
    tensors = check_checkpoint(config.model, model)
    Tokenizer(config.model)
    max_model_len = config.context_limit(model.max_position_embeddings)
    _check_files(config, with_files)
    _check_gpus(config, local_ranks)
    device = torch.device(config.device)
    dtype = compute_dtype(config.dtype, model, device) or weights_dtype(tensors)
    spec = CacheSpec(model.num_layers, model.kv_heads_per_rank(tp), model.head_dim, dtype)
    bytes_per_block = KVCache.bytes_per_block(spec, config.block_size)
    check_host_memory(config, bytes_per_block=bytes_per_block, local_ranks=local_ranks)
    check_step_memory(config, max_model_len=max_model_len)
    if config.device == "cuda":
        check_gpu_memory(
            config,
            tensors=tensors.values(),
            dtype=dtype,
            bytes_per_block=bytes_per_block,
            tp=tp,
            ranks_per_gpu=-(-local_ranks // torch.cuda.device_count()),
        )


def check_port(host: str, port: int, prefix: str = "metrics-") -> None:
    """ValueError: the address that --`prefix`host and --`prefix`port name cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"--{prefix}host, --{prefix}port: cannot listen on {host}, port {port}: "
                f"{error.strerror}"
            ) from None


def _check_files(config: EngineConfig, with_files: bool) -> None:
    named: dict[str, Path] = {}
    if with_files and isinstance(config, RunConfig):
        _check_batch(config)
        named = {"--input": config.input, "--output": config.output}
    if config.trace is not None:
        _check_target("--trace", config.trace)
        if _size(config.trace):
            with config.trace.open("rb") as file:
                if file.read(len(_TRACE_START)) != _TRACE_START:
                    raise ValueError(f"--trace: {config.trace} is there and is no trace file")
        named["--trace"] = config.trace
    seen: dict[Path, str] = {}
    for option, path in named.items():
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            raise ValueError(f"{option}: {path} is the file of {other}")


def _check_batch(config: RunConfig) -> None:
    if config.input.exists() and not config.input.is_file():
        raise ValueError(f"--input: {config.input} is not a regular file; ranks read it again")
    count_lines(config.input)
    _check_target("--output", config.output)
    if _size(config.output) and not (config.resume or config.overwrite):
        raise ValueError(
            f"--output: {config.output} holds results already: --resume finishes that run, "
            "--overwrite starts anew"
        )


def _check_target(option: str, path: Path) -> None:
    """A file that can be written: its directory is made here, it is a regular file or new."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = path.stat().st_mode if path.exists() else None
    except OSError as error:
        raise ValueError(f"{option}: {path}: {error.strerror} ({error.filename})") from None
    if mode is None:
        if path.is_symlink():
            raise ValueError(f"{option}: {path} is a link to a file that does not exist")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise ValueError(f"{option}: no file can be made in {path.parent}")
    elif not stat.S_ISREG(mode):
        raise ValueError(f"{option}: {path} is not a regular file")
    elif not os.access(path, os.W_OK):
        raise ValueError(f"{option}: {path} cannot be written")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_gpus(config: EngineConfig, local_ranks: int) -> None:
    if config.device != "cuda":
        return
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError("--device cuda: this machine has no GPU that torch can use")
    if count < local_ranks and not several_ranks_per_gpu():
        raise ValueError(
            f"--tp: {local_ranks} ranks need {local_ranks} GPUs; this machine has {count}"
        )
