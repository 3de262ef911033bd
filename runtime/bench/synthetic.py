"""Checkpoints with random weights of real shapes, so that speed needs no download.

Owns the shapes, the writing of a Hugging Face directory, and where it is kept: made once, found
there ever after. What such a model says means nothing; what it takes to say it is what the model of
that shape takes.

    small   4.2 million parameters
    1b      Llama 3.2 1B
    8b      Llama 3 8B
"""

import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from onecast.runtime.model_config import ModelConfig
from onecast.runtime.weights import expected_shapes

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
}

_SHARD_BYTES = 1 << 30
_DRAWN = 1 << 22  # random numbers are drawn in single precision, so many at a time
_DTYPE = torch.bfloat16


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/onecast`, or `~/.cache/onecast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onecast"


def synthetic_model(
    name: str, cache: Path, check: Callable[[ModelConfig], None] | None = None
) -> Path:
    """The directory of that checkpoint in `cache`, written there if it is not.

    Complete or not there at all, whoever is interrupted, and whoever else writes it at the same
    time. `check` is called before anything is written, and may raise ValueError. ValueError for a
    name that is none, and where the disk does not hold it; OSError.
    """
    if name not in SHAPES:
        raise ValueError(f"--synthetic: {name!r} is none of {', '.join(SHAPES)}")
    values = {**_LLAMA, **SHAPES[name]}
    text = json.dumps(values, indent=2) + "\n"
    # Another shape or another way of drawing is another directory.
    target = cache / f"synthetic-{name}-{zlib.crc32(f'1 {text}'.encode()):08x}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{target.name}-") as folder:
        unfinished = Path(folder, "checkpoint")
        unfinished.mkdir()
        (unfinished / "config.json").write_text(text)
        config = ModelConfig.from_dir(unfinished)
        if check is not None:
            check(config)
        nbytes = _DTYPE.itemsize * count_parameters(config)
        free = shutil.disk_usage(cache).free
        if nbytes > free:
            raise ValueError(
                f"--cache: {cache}: the weights of {name!r} are {nbytes:,} bytes; {free:,} are free"
            )
        print(f"writing {nbytes:,} bytes of random weights to {target}", file=sys.stderr)
        _write_tokenizer(unfinished)
        _write_weights(unfinished, config)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():
                raise  # else somebody was quicker
    return target


def count_parameters(config: ModelConfig) -> int:
    return sum(torch.Size(shape).numel() for _, shape in expected_shapes(config))


def _write_tokenizer(directory: Path) -> None:
    """`<s>`, `</s>`, then one token per byte; the ids above those have no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _write_weights(directory: Path, config: ModelConfig) -> None:
    """In shards, of which one at a time is in memory."""
    shards = list(_shards(config))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        tensors = {name: _draw(name, shape) for name, shape in names.items()}
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # also of a disk that is full by now
            raise OSError(f"--cache: {directory.parent.parent}: {error}") from error
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        nbytes = _DTYPE.itemsize * count_parameters(config)
        index = {"metadata": {"total_size": nbytes}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(config: ModelConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    nbytes = 0
    for name, shape in expected_shapes(config):
        size = _DTYPE.itemsize * torch.Size(shape).numel()
        if shard and nbytes + size > _SHARD_BYTES:
            yield shard
            shard, nbytes = {}, 0
        shard[name] = shape
        nbytes += size
    yield shard


def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that keep the size of what they are multiplied with, the same in every run."""
    tensor = torch.ones(shape, dtype=_DTYPE)
    if len(shape) == 1:  # a norm
        return tensor
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    flat, std = tensor.view(-1), shape[1] ** -0.5
    for start in range(0, flat.numel(), _DRAWN):
        part = flat[start : start + _DRAWN]
        part.copy_(torch.randn(part.numel(), generator=generator).mul_(std))
    return tensor
