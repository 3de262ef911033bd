"""Plain values as msgpack, without pickle.

Owns how one value that is no tensor becomes bytes and comes back equal, in type too. Knows nothing
of frames. msgpack has no tuple, no integer beyond 64 bits and no torch type; these are extensions:

    code  payload
    1     a large int    two's complement, little-endian, as few bytes as hold it
    2     a tuple        the msgpack array of its items
    3     a torch.dtype  its name, "int64"
    4     a torch.device "cuda:1"
"""

from typing import Any

import msgspec
import torch

from .dtypes import DTYPES_BY_NAME
from .errors import FrameError, UnsupportedTypeError

SCALARS = frozenset({type(None), bool, int, float, str, bytes})

_INT, _TUPLE, _DTYPE, _DEVICE = 1, 2, 3, 4

_encode = msgspec.msgpack.Encoder().encode

_MALFORMED = (
    msgspec.MsgspecError,
    ValueError,  # not UTF-8
    TypeError,  # an unhashable key
    OverflowError,  # a timestamp
    RuntimeError,  # no such device, and (as RecursionError) too deep
    MemoryError,  # arrays inside arrays, each of a length that is not there
    Warning,  # a device that torch is to drop, where warnings are errors
)


def pack(items: Any) -> bytes:
    """msgpack of what `portable` returned: lists and dicts of scalars and extensions.

    Raises UnicodeEncodeError for a str with lone surrogates.
    """
    try:
        return _encode(items)
    except (
        OverflowError
    ):  # an int beyond 64 bits; looking at each beforehand would cost every frame
        return _encode(_widen(items))


def portable_leaf(value: Any) -> Any:
    """A value that is neither scalar nor container, as msgspec takes it; raises TypeError."""
    if isinstance(value, torch.dtype):
        return msgspec.msgpack.Ext(_DTYPE, str(value).removeprefix("torch.").encode())
    if isinstance(value, torch.device):
        return msgspec.msgpack.Ext(_DEVICE, str(value).encode())
    raise TypeError


def portable_tuple(items: list[Any]) -> msgspec.msgpack.Ext:
    """A tuple of portable items."""
    return msgspec.msgpack.Ext(_TUPLE, pack(items))


def unpack(data: memoryview | bytes) -> Any:
    """The inverse of `pack`; raises FrameError for what is malformed.

    What is well-formed and yet nothing that `pack` writes, a date or a key that is a float, is
    passed on as it is: to look at every item would cost every frame.
    """
    try:
        return _decode(data)
    except _MALFORMED as error:
        raise FrameError(f"metadata is malformed: {error}") from error


def check_text(value: Any, path: str) -> None:
    """Raise UnsupportedTypeError naming the first str in `value` that UTF-8 cannot express."""
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UnsupportedTypeError(f"{path}: str with lone surrogates: {error}") from error
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_text(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, f"key {key!a} of {path or 'the mapping'}")
            check_text(item, f"{path}.{key}" if path else str(key))


def _widen(value: Any) -> Any:
    """`value` with each int beyond 64 bits as an extension."""
    if type(value) is int and not -(1 << 63) <= value < 1 << 64:
        size = value.bit_length() // 8 + 1
        return msgspec.msgpack.Ext(_INT, value.to_bytes(size, "little", signed=True))
    if type(value) is list:
        return [_widen(item) for item in value]
    if type(value) is dict:
        return {key: _widen(item) for key, item in value.items()}
    return value


def _extension(code: int, data: memoryview) -> Any:
    if code == _TUPLE:
        items = _decode(data)
        if type(items) is not list:
            raise ValueError("a tuple that is no array")
        return tuple(items)
    if code == _INT:
        return int.from_bytes(data, "little", signed=True)
    if code == _DTYPE:
        name = bytes(data).decode()
        if name not in DTYPES_BY_NAME:
            raise ValueError(f"no dtype of this torch: {name[:50]!r}")
        return DTYPES_BY_NAME[name]
    if code == _DEVICE:
        return torch.device(bytes(data).decode())
    raise ValueError(f"unknown extension {code}")


_decode = msgspec.msgpack.Decoder(ext_hook=_extension).decode
