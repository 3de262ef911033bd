"""A mapping taken apart: structure, dimensions, tensors and plain values.

Owns what may travel and the path that names what may not. Knows nothing of bytes, nor of the
numbers that structures get.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from . import dtypes, values
from .errors import UnsupportedTypeError
from .layout import MAX_DEPTH, MAX_RANK, Node, is_container

Source = torch.Tensor | np.ndarray[Any, Any]

# Kinds of sources: arrays among them; tensors of any device and strides; tensors known to be on the
# CPU, contiguous and without conjugate or negative bits, so that their bytes are their content.
MIXED, TENSORS, PLAIN_TENSORS = range(3)

_MOST_GUARDS = 4  # a mode that comes and goes (inference mode) needs others; more are not worth it

_TENSOR_DTYPES = dtypes.TENSOR_DTYPES
_FROM_NUMPY = dtypes.FROM_NUMPY
_SCALARS = values.SCALARS
_STRIDED = torch.strided


class Parts:
    """A mapping taken apart: its structure, and in the structure's order the rest."""

    __slots__ = ("dims", "kind", "root", "sources", "values")

    root: tuple[Any, ...]  # key, node, key, node ...

    def __init__(self, mapping: Mapping[Any, Any]) -> None:
        """Raises UnsupportedTypeError, with the path of what cannot travel."""
        self.dims: list[int] = []
        self.sources: list[Source] = []
        self.values: list[Any] = []
        self.kind = TENSORS
        root: list[Any] = []
        for key, value in mapping.items():
            if type(key) is not str:
                _check_key(key, "")
            kind = type(value)
            root.append(key)
            # The three commonest kinds stand here and not behind a call: this loop is the hot path.
            if (
                kind is torch.Tensor
                and (dtype := value.dtype) in _TENSOR_DTYPES
                and value.layout is _STRIDED
                and not value.requires_grad
                and value.dim() <= MAX_RANK
            ):
                shape = value.shape
                root.append((dtype, len(shape)))
                self.dims += shape
                self.sources.append(value)
            elif kind is np.ndarray and (array_dtype := _FROM_NUMPY.get(value.dtype)) is not None:
                shape = value.shape
                root.append((array_dtype, len(shape)))
                self.dims += shape
                self.sources.append(value)
                self.kind = MIXED
            elif kind in _SCALARS:
                root.append(None)
                self.values.append(value)
            else:
                root.append(self._node(value, str(key), 1))
        self.root = tuple(root)

    def _node(self, value: Any, path: str, depth: int) -> Node:
        kind = type(value)
        if kind in _SCALARS:
            self.values.append(value)
            return None
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            return self._tensor(value, path)
        if kind is np.ndarray:
            return self._array(value, path)
        if kind is list or kind is tuple:
            return self._sequence(value, kind, path, depth)
        if kind is dict:
            return self._dict(value, path, depth)
        try:
            self.values.append(values.portable_leaf(value))
        except TypeError:
            name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
            raise UnsupportedTypeError(f"{path}: object of type {name}") from None
        return None

    def _tensor(self, value: torch.Tensor, path: str) -> Node:
        if value.is_quantized:
            raise UnsupportedTypeError(f"{path}: quantised tensor of dtype {value.dtype}")
        if value.dtype not in _TENSOR_DTYPES:
            raise UnsupportedTypeError(f"{path}: tensor of dtype {value.dtype}")
        if value.layout is not _STRIDED:
            raise UnsupportedTypeError(f"{path}: tensor of layout {value.layout}")
        if value.dim() > MAX_RANK:
            raise UnsupportedTypeError(f"{path}: tensor of rank {value.dim()}, beyond {MAX_RANK}")
        self.dims += value.shape
        self.sources.append(value.detach())
        return (value.dtype, value.dim())

    def _array(self, value: "np.ndarray[Any, Any]", path: str) -> Node:
        dtype = _FROM_NUMPY.get(value.dtype)
        if dtype is None:
            raise UnsupportedTypeError(f"{path}: numpy array of dtype {value.dtype.str!r}")
        self.dims += value.shape
        self.sources.append(value)
        self.kind = MIXED
        return (dtype, value.ndim)

    def _sequence(self, value: Any, kind: type, path: str, depth: int) -> Node:
        if _SCALARS.issuperset(map(type, value)):  # token ids and the like, at C speed
            self.values.append(value if kind is list else values.portable_tuple(list(value)))
            return None
        _check_depth(path, depth)
        first = len(self.values)
        nodes = [self._node(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        if any(node is not None for node in nodes):
            return (kind.__name__, *nodes)
        items = self.values[first:]
        self.values[first:] = [items if kind is list else values.portable_tuple(items)]
        return None

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> Node:
        _check_depth(path, depth)
        first = len(self.values)
        node: list[Any] = ["dict"]
        for key, item in value.items():
            if type(key) is not str:
                _check_key(key, path)
            node += (key, self._node(item, f"{path}.{key}", depth + 1))
        if any(child is not None for child in node[2::2]):
            return tuple(node)
        self.values[first:] = [dict(zip(value, self.values[first:], strict=True))]
        return None


class Expected:
    """What the next mapping most likely looks like: keys, kinds and shapes of the one before."""

    __slots__ = (
        "_dtypes",
        "_guards",
        "_guards_made",
        "_keys",
        "_pick_plain",
        "_pick_sources",
        "_shapes",
        "_types",
        "dims",
    )

    def __init__(
        self,
        keys: list[str],
        dtypes_: list[torch.dtype | None],
        shapes: list[tuple[int, ...]],
        dims: list[int],
    ) -> None:
        self._keys = keys
        self._dtypes = dtypes_
        self._shapes = shapes
        self.dims = dims
        self._guards: Any = None
        self._guards_made = 0
        self._types: list[type] = []
        places = range(len(keys))
        self._pick_sources = _picker([at for at in places if dtypes_[at] is not None])
        self._pick_plain = _picker([at for at in places if dtypes_[at] is None])

    @classmethod
    def of(cls, parts: Parts) -> "Expected | None":
        """None if `parts` has containers with tensors, or keys other than str."""
        keys = list(parts.root[0::2])
        nodes = parts.root[1::2]
        if any(is_container(node) for node in nodes) or {*map(type, keys)} - {str}:
            return None
        sources = iter(parts.sources)
        shapes = [() if node is None else tuple(next(sources).shape) for node in nodes]
        return cls(keys, [node and node[0] for node in nodes], shapes, parts.dims)

    def match(
        self, mapping: Mapping[Any, Any]
    ) -> tuple[Sequence[Source], Sequence[Any], int] | None:
        """Sources, values and the kind of the sources; None: look closer."""
        # keys(): to go through what is no mapping, a large tensor perhaps, could take hours.
        if [*mapping.keys()] != self._keys:
            return None
        guards = self._guards
        if guards is not None:
            items = [*mapping.values()]
            if [*map(type, items)] == self._types:
                tensors = self._pick_sources(items)
                if guards.check(*tensors):
                    return tensors, self._pick_plain(items), PLAIN_TENSORS
        sources: list[Source] = []
        plain: list[Any] = []
        kind_of_sources = TENSORS
        # The lengths are equal, as the keys are; strict=True would cost a call.
        for value, dtype, shape in zip(mapping.values(), self._dtypes, self._shapes):  # noqa: B905
            kind = type(value)
            if dtype is None:
                if kind not in _SCALARS:
                    return None
                plain.append(value)
            elif kind is torch.Tensor:
                if (
                    value.dtype is not dtype
                    or value.shape != shape
                    or value.layout is not _STRIDED
                    or value.requires_grad
                ):
                    return None
                sources.append(value)
            elif kind is np.ndarray:
                if _FROM_NUMPY.get(value.dtype) is not dtype or value.shape != shape:
                    return None
                kind_of_sources = MIXED
                sources.append(value)
            else:
                return None
        if kind_of_sources == TENSORS and self._guards_made < _MOST_GUARDS:
            self._guards_made += 1
            self._guards = make_guards(sources)
            self._types = [*map(type, mapping.values())]
        return sources, plain, kind_of_sources


def make_guards(tensors: Sequence[Source]) -> Any:
    """What tells in one call, for all tensors, whether others are just like them; None: nothing.

    Asking each tensor for dtype, shape, strides, device and requires_grad from Python takes longer
    than to copy it. torch.compile's guards ask all of that from C++, in half a microsecond for a
    decode step. They are no public interface: where they are missing or have changed we ask in
    Python.
    """
    if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):  # type: ignore[union-attr]
        return None
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guards if guards.check(*tensors) is True else None
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return None


def _picker(places: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """A function that takes the items at these places out of a list."""
    if len(places) > 1:
        return operator.itemgetter(*places)  # at C speed
    return lambda items: [items[at] for at in places]


def _check_key(key: Any, path: str) -> None:
    where = path or "the mapping"
    if type(key) not in (str, int):
        raise UnsupportedTypeError(f"{where}: key {key!r} of type {type(key).__qualname__}")
    if type(key) is int and not -(1 << 63) <= key < 1 << 63:
        raise UnsupportedTypeError(f"{where}: key {key} beyond 64 bits")


def _check_depth(path: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise UnsupportedTypeError(f"{path[:200]}: nested deeper than {MAX_DEPTH}")
