"""The structure of a mapping, learned once and then named by a number.

Owns the split of a mapping into structure (keys, containers that hold tensors, dtypes, ranks),
dimensions, tensors and plain values, and the way back. Knows nothing of bytes or numbers on the
wire. A structure is a tree of nodes, hashable, compared by value:

    None                              a plain value (a container without tensors is one value)
    (dtype, rank)                     a tensor
    ("list" | "tuple", node ...)      a container that holds a tensor somewhere
    ("dict", key, node, key, node ...)

and travels, the first time, as msgpack of nil, [dtype name, rank], [0, nodes], [1, nodes] or
[keys, nodes] in the same places.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from . import dtypes, values
from .errors import FrameError, UnsupportedTypeError

MAX_DEPTH = 32  # containers inside containers; also what ends a list that contains itself
MAX_RANK = 64  # torch's own limit for most operations

Node = Any  # as drawn above; a recursive type alias would be truer and is no help here
Source = torch.Tensor | np.ndarray[Any, Any]

_TENSOR_DTYPES = dtypes.TENSOR_DTYPES
_FROM_NUMPY = dtypes.FROM_NUMPY
_SCALARS = values.SCALARS
_STRIDED = torch.strided


class Parts:
    """A mapping taken apart: its structure, and in the structure's order the rest."""

    __slots__ = ("dims", "has_arrays", "root", "sources", "values")

    root: tuple[Any, ...]  # key, node, key, node ...

    def __init__(self, mapping: Mapping[Any, Any]) -> None:
        """Raises UnsupportedTypeError, with the path of what cannot travel."""
        self.dims: list[int] = []
        self.sources: list[Source] = []
        self.values: list[Any] = []
        self.has_arrays = False
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
                self.has_arrays = True
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
        self.has_arrays = True
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

    __slots__ = ("_dtypes", "_keys", "_shapes", "dims")

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

    def match(self, mapping: Mapping[Any, Any]) -> tuple[list[Source], list[Any], bool] | None:
        """Sources, values and whether an array is among the sources; None: look closer."""
        if [*mapping] != self._keys:
            return None
        sources: list[Source] = []
        plain: list[Any] = []
        has_arrays = False
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
                has_arrays = True
                sources.append(value)
            else:
                return None
        return sources, plain, has_arrays


class Layout:
    """One structure under its number, and how a mapping is put together again."""

    def __init__(self, number: int, root: tuple[Any, ...]) -> None:
        self.number = number
        self.root = root
        self.keys = root[0::2]
        self.tensors: tuple[tuple[torch.dtype, int], ...] = tuple(_tensors(("dict", *root)))
        self.num_dims = sum(rank for _, rank in self.tensors)
        self.num_values = _num_values(("dict", *root))
        self.start = 0  # of the tensors of the last frame, see frame.Encoder
        self.last_used = 0  # the sender's clock, by which the least recently used is replaced
        nodes = root[1::2]
        self.is_flat = not any(map(is_container, nodes))
        # Of a flat layout: which keys have plain values.
        self.value_keys = [k for k, node in zip(self.keys, nodes, strict=True) if node is None]

    def build(self, views: Sequence[torch.Tensor], plain: Sequence[Any]) -> dict[Any, Any]:
        """The mapping, of tensors and values in the structure's order."""
        built: dict[Any, Any] = _build(("dict", *self.root), iter(views), iter(plain))
        return built

    def tensor_paths(self) -> Iterator[str]:
        """How errors name the tensors, in their order."""
        return _paths(("dict", *self.root), "")

    def definition(self) -> list[Any]:
        """What travels, for msgpack."""
        packed: list[Any] = _pack_node(("dict", *self.root))
        return packed

    @classmethod
    def from_definition(cls, number: int, packed: Any) -> "Layout":
        """Raises FrameError for anything but what `definition` returns."""
        root = _unpack_node(packed, 0)
        if root is None or root[0] != "dict":
            raise FrameError("the definition of a layout is no dict")
        return cls(number, root[1:])


def _check_key(key: Any, path: str) -> None:
    where = path or "the mapping"
    if type(key) not in (str, int):
        raise UnsupportedTypeError(f"{where}: key {key!r} of type {type(key).__qualname__}")
    if type(key) is int and not -(1 << 63) <= key < 1 << 63:
        raise UnsupportedTypeError(f"{where}: key {key} beyond 64 bits")


def _check_depth(path: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise UnsupportedTypeError(f"{path[:200]}: nested deeper than {MAX_DEPTH}")


def is_container(node: Node) -> bool:
    return node is not None and type(node[0]) is str


def _children(node: Node) -> tuple[Any, ...]:
    if not is_container(node):
        return ()
    children: tuple[Any, ...] = node[2::2] if node[0] == "dict" else node[1:]
    return children


def _tensors(node: Node) -> Iterator[tuple[torch.dtype, int]]:
    if node is not None and not is_container(node):
        yield node
    for child in _children(node):
        yield from _tensors(child)


def _paths(node: Node, path: str) -> Iterator[str]:
    if not is_container(node):
        if node is not None:
            yield path
        return
    keys = node[1::2] if node[0] == "dict" else range(len(node) - 1)
    for key, child in zip(keys, _children(node), strict=True):
        inner = f"[{key}]" if node[0] != "dict" else f".{key}" if path else str(key)
        yield from _paths(child, path + inner)


def _num_values(node: Node) -> int:
    return 1 if node is None else sum(map(_num_values, _children(node)))


def _build(node: Node, views: Iterator[torch.Tensor], plain: Iterator[Any]) -> Any:
    if node is None:
        return next(plain)
    if node[0] == "dict":
        return {node[i]: _build(node[i + 1], views, plain) for i in range(1, len(node), 2)}
    if node[0] == "list":
        return [_build(child, views, plain) for child in node[1:]]
    if node[0] == "tuple":
        return tuple([_build(child, views, plain) for child in node[1:]])
    return next(views)


def _pack_node(node: Node) -> Any:
    if node is None:
        return None
    if node[0] == "dict":
        return [list(node[1::2]), [_pack_node(child) for child in node[2::2]]]
    if node[0] == "list" or node[0] == "tuple":
        return [int(node[0] == "tuple"), [_pack_node(child) for child in node[1:]]]
    return [dtypes.TENSOR_DTYPES[node[0]], node[1]]


def _unpack_node(packed: Any, depth: int) -> Node:
    if packed is None:
        return None
    if depth > MAX_DEPTH:
        raise FrameError(f"the definition of a layout is nested deeper than {MAX_DEPTH}")
    if type(packed) is not list or len(packed) != 2:
        raise FrameError("the definition of a layout has a node that is no pair")
    what, rest = packed
    if type(what) is str:
        dtype = dtypes.TENSOR_DTYPES_BY_NAME.get(what)
        if dtype is None or type(rest) is not int or not 0 <= rest <= MAX_RANK:
            raise FrameError(
                f"the definition of a layout has no tensor {what[:50]!r}, {rest!r:.50}"
            )
        return (dtype, rest)
    if type(rest) is not list:
        raise FrameError("the definition of a layout has a container without children")
    children = [_unpack_node(child, depth + 1) for child in rest]
    if type(what) is int and what in (0, 1):
        return ("tuple" if what else "list", *children)
    if type(what) is not list or not all(type(key) in (str, int) for key in what):
        raise FrameError("the definition of a layout has keys that are neither str nor int")
    if len(what) != len(children) or len(set(what)) != len(what):
        raise FrameError("the definition of a layout has keys without children, or one twice")
    return ("dict", *(item for pair in zip(what, children, strict=True) for item in pair))
