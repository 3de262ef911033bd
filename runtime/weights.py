"""Where a checkpoint's tensors lie, and reading just the slices a rank needs.

Owns the safetensors files of a Hugging Face directory: single or sharded, checked by their headers
before anything is read. Knows the names and shapes of the Llama family's tensors, not what is
computed with them.

A safetensors file (https://huggingface.co/docs/safetensors):

    0        8                    8 + n                                      end of file
    | u64 n  | JSON header        | tensor bytes, one tensor after another |
             {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .model_config import ModelConfig

_HEADER_SIZE = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, as its file's header describes it."""

    file: Path
    dtype: str  # safetensors' name: "F32", "BF16" ...
    shape: tuple[int, ...]


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor the model reads; matrices are `[out, in]` features."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = (
        ("self_attn.q_proj", query, hidden, config.qkv_bias),
        ("self_attn.k_proj", key_value, hidden, config.qkv_bias),
        ("self_attn.v_proj", key_value, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, query, config.output_bias),
        ("mlp.gate_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.up_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, intermediate, config.mlp_bias),
    )
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns, bias in linears:
            yield f"{prefix}{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}{name}.bias", (rows,)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        if config.qk_norm:
            yield f"{prefix}self_attn.q_norm.weight", (config.head_dim,)
            yield f"{prefix}self_attn.k_norm.weight", (config.head_dim,)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def check_checkpoint(path: str | Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Return every tensor the model reads, from the headers alone.

    Raises ValueError naming file, tensor, found and expected: for a missing or truncated file, a
    missing tensor, a wrong shape or a type that is not floating point.
    """
    directory = Path(path)
    found = _find_tensors(directory)
    checked = {}
    for name, shape in expected_shapes(config):
        tensor = found.get(name)
        if tensor is None:
            where = _INDEX_FILE if (directory / _INDEX_FILE).exists() else _SINGLE_FILE
            raise ValueError(f"{directory / where}: tensor {name} {list(shape)} is missing")
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, "
                f"config.json expects {list(shape)}"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{tensor.file}: tensor {name} has type {tensor.dtype}; "
                f"supported: {', '.join(_DTYPES)}"
            )
        checked[name] = tensor
    return checked


def weights_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The checkpoint's own dtype: that of the embedding, where they differ."""
    return _DTYPES[tensors["model.embed_tokens.weight"].dtype]


class Weights:
    """The tensors of one checkpoint, read by rows or columns into one dtype and device.

    A context manager: the files are mapped on first use and closed at the end.
    """

    def __init__(
        self,
        path: str | Path,
        config: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` None keeps the checkpoint's (that of the embedding, where they differ)."""
        self._tensors = check_checkpoint(path, config)
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()
        self.device = device
        self.dtype = dtype or weights_dtype(self._tensors)
        self.bytes_read = 0  # of the checkpoint, so far

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def whole(self, name: str) -> Tensor:
        """The tensor as it is."""
        return self._read(name, (slice(None),) * len(self._tensors[name].shape))

    def rows(self, name: str, start: int, stop: int, *, pad_to: int = 0) -> Tensor:
        """Rows (of a bias: elements) `start` to `stop`, zeros below up to `pad_to` rows."""
        tensor = self._read(name, (slice(start, stop),))
        missing = pad_to - tensor.shape[0]
        if missing > 0:
            tensor = torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])))
        return tensor

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` of a matrix, contiguous."""
        return self._read(name, (slice(None), slice(start, stop)))

    def _read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        file = self._tensors[name].file
        handle = self._files.get(file)
        if handle is None:
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
            self._files[file] = handle
        tensor: Tensor = handle.get_slice(name)[index]
        self.bytes_read += tensor.nbytes
        return tensor.to(self.device, self.dtype).contiguous()


def _find_tensors(directory: Path) -> dict[str, StoredTensor]:
    index = directory / _INDEX_FILE
    single = directory / _SINGLE_FILE
    if single.exists() or not index.exists():
        if not single.exists():
            raise ValueError(f"{directory} has neither {_SINGLE_FILE} nor {_INDEX_FILE}")
        return _read_header(single)
    tensors: dict[str, StoredTensor] = {}
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name, file_name in _weight_map(index).items():
        if file_name not in headers:
            file = directory / file_name
            if not file.exists():
                raise ValueError(f"{index} names {file_name}, which does not exist")
            headers[file_name] = _read_header(file)
        if name not in headers[file_name]:
            raise ValueError(f"{directory / file_name}: tensor {name} of {_INDEX_FILE} is missing")
        tensors[name] = headers[file_name][name]
    return tensors


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        values = json.loads(index.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{index} is not JSON: {error}") from None
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise ValueError(f"{index}: weight_map is not an object of tensor and file names")
    return weight_map


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, once its size agrees with what its header promises."""
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(_HEADER_SIZE.size)
        header_bytes = _HEADER_SIZE.unpack(start)[0] if len(start) == _HEADER_SIZE.size else 0
        data_start = _HEADER_SIZE.size + header_bytes
        if data_start > size:
            raise ValueError(
                f"{file} is truncated: {size} bytes, its header alone ends at {data_start}"
            )
        if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            raise ValueError(f"{file} is not a safetensors file: {size} bytes, no header")
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw)
        tensors, ends = _parse_header(file, header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{file} is not a safetensors file: its header is not valid") from None
    expected = data_start + max(ends, default=0)
    if size < expected:
        raise ValueError(f"{file} is truncated: {size} bytes, its header expects {expected}")
    if size > expected:
        raise ValueError(f"{file} is too long: {size} bytes, its header expects {expected}")
    return tensors


def _parse_header(
    file: Path, header: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], list[int]]:
    tensors: dict[str, StoredTensor] = {}
    ends: list[int] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(int(size) for size in entry["shape"])
        dtype = str(entry["dtype"])
        if dtype in _DTYPES and end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise ValueError(f"{name}: {end - begin} bytes")
        tensors[name] = StoredTensor(file, dtype, shape)
        ends.append(int(end))
    return tensors, ends
