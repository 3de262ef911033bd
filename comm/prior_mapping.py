"""A mapping divided into metadata to pickle and tensors to broadcast, and put together again.

Owns what a pickled mapping looks like: a list of keys and values in which a mark, its dtype and
size, stands in the place of each tensor. Knows nothing of how either travels. This module and
`prior_art` alone unpickle what another rank has sent.
"""

import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from .dtypes import FROM_NUMPY, TENSOR_DTYPES
from .errors import FrameError, UnsupportedTypeError
from .values import SCALARS

# Every backend broadcasts these; the others go as bytes.
_BROADCAST_DTYPES = frozenset(
    {
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.float32,
        torch.float64,
    }
)

Structure = list[tuple[Any, Any]]


class TensorMark(NamedTuple):
    """Stands for a tensor in pickled metadata."""

    dtype: torch.dtype
    size: torch.Size


def divide(
    mapping: Mapping[Any, Any], device: torch.device
) -> tuple[Structure, bytes, list[torch.Tensor]]:
    """The structure of `mapping`, the same pickled, and its tensors in order, on `device`.

    Numpy arrays become tensors. Raises UnsupportedTypeError for what cannot be pickled or
    broadcast, ValueError for what is no mapping.
    """
    if not isinstance(mapping, Mapping):
        kind = type(mapping).__name__
        raise ValueError(f"a channel carries a mapping, not an object of type {kind}")
    tensors: list[torch.Tensor] = []
    structure = [(key, _mark(value, str(key), tensors)) for key, value in mapping.items()]
    tensors = [tensor.to(device) for tensor in tensors]
    try:
        pickled = pickle.dumps(structure)
    except Exception as error:  # whatever the objects' own methods raise
        raise UnsupportedTypeError(f"{_blame(structure)}: {error}") from error
    return structure, pickled, tensors


def load(pickled: memoryview) -> Structure | None:
    """What `divide` or GOODBYE pickled; raises FrameError."""
    try:
        structure: Structure | None = pickle.loads(pickled)
    except Exception as error:  # bytes that are no pickle can raise anything
        raise FrameError(f"metadata that cannot be unpickled: {error!r}") from error
    return structure


GOODBYE = pickle.dumps(None)  # closes a channel


def unite(structure: Structure, tensor: Callable[[TensorMark], torch.Tensor]) -> dict[Any, Any]:
    """The mapping of `structure`; `tensor` is asked for each of its tensors, in order."""
    return {key: _unmark(value, tensor) for key, value in structure}


def wire(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as every backend broadcasts it."""
    if tensor.dtype in _BROADCAST_DTYPES:
        return tensor
    return tensor.reshape(-1).view(torch.uint8)


def _mark(value: Any, path: str, tensors: list[torch.Tensor]) -> Any:
    """`value` with a mark for every tensor, which `tensors` gets."""
    kind = type(value)
    if kind in SCALARS:
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(_contiguous(value, path))
        return TensorMark(value.dtype, value.size())
    if kind is np.ndarray:
        if value.dtype not in FROM_NUMPY:
            raise UnsupportedTypeError(f"{path}: numpy array of dtype {value.dtype.str!r}")
        sound = value.flags.c_contiguous and value.flags.writeable
        tensors.append(torch.from_numpy(value if sound else value.copy()))
        return TensorMark(tensors[-1].dtype, tensors[-1].size())
    if kind is list or kind is tuple:
        if SCALARS.issuperset(map(type, value)):
            return value
        return kind([_mark(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)])
    if kind is dict:
        return {key: _mark(item, f"{path}.{key}", tensors) for key, item in value.items()}
    return value


def _unmark(value: Any, tensor: Callable[[TensorMark], torch.Tensor]) -> Any:
    kind = type(value)
    if kind is TensorMark:
        return tensor(value)
    if kind is list or kind is tuple:
        if SCALARS.issuperset(map(type, value)):
            return value
        return kind([_unmark(item, tensor) for item in value])
    if kind is dict:
        return {key: _unmark(item, tensor) for key, item in value.items()}
    return value


def _contiguous(value: torch.Tensor, path: str) -> torch.Tensor:
    if value.dtype not in TENSOR_DTYPES:
        raise UnsupportedTypeError(f"{path}: tensor of dtype {value.dtype}")
    if value.layout is not torch.strided or value.is_nested:
        raise UnsupportedTypeError(f"{path}: tensor of layout {value.layout}, or nested")
    if value.is_meta:
        raise UnsupportedTypeError(f"{path}: tensor on the meta device, without content")
    value = value.detach()
    if value.is_contiguous() and not (value.is_conj() or value.is_neg()):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)


def _blame(structure: Structure) -> str:
    """The key whose value pickle refuses, and the type of that."""
    for key, value in structure:
        try:
            pickle.dumps((key, value))
        except Exception:  # whatever the value's own methods raise
            return f"{key}: object of type {type(value).__qualname__} that pickle refuses"
    return "the mapping"
