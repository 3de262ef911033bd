"""The structure of a mapping, learned once and then named by a number.

Owns the tree that describes a structure, how it travels the first time, and how a mapping is put
together again from its tensors and plain values. A tree is made of nodes, hashable, compared by
value:

    None                              a plain value (a container without tensors is one value)
    (dtype, rank)                     a tensor
    ("list" | "tuple", node ...)      a container that holds a tensor somewhere
    ("dict", key, node, key, node ...)

and travels as msgpack of nil, [dtype name, rank], [0, nodes], [1, nodes] or [keys, nodes] in the
same places.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import dtypes
from .errors import FrameError

MAX_DEPTH = 32  # containers inside containers; also what ends a list that contains itself
MAX_RANK = 64  # torch's own limit for most operations

Node = Any  # as drawn above; a recursive type alias would be truer and is no help here


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


def is_container(node: Node) -> bool:
    return node is not None and type(node[0]) is str


def brief(value: Any) -> str:
    """A foreign value in an error's text: repr itself fails at deep nesting and at long ints."""
    try:
        return f"{value!r:.50}"
    except (ValueError, RecursionError, MemoryError):
        return f"an object of type {type(value).__name__}"


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
                f"the definition of a layout has no tensor {what[:50]!r}, {brief(rest)}"
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
