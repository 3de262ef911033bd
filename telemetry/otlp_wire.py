"""Protobuf bytes without protobuf objects: fields, and templates whose holes numpy fills.

Owns the wire format as OTLP needs it. Knows nothing of spans.

A field is a tag (number << 3 | wire type) and its value: a varint (0), 8 bytes (1), a length and
so many bytes (2), or 4 bytes (5). A varint holds 7 bits a byte, the lowest first; the highest bit
of each byte but the last is set. Nothing forbids to write one longer than it need be:

    1          01
    1, padded  81 80 80 80 80 80 80 00        always 8 bytes, for 56 bits

So messages that differ only in their numbers have one length, every number its own place, and a
thousand of them are one template, repeated, with columns stored into it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

PADDED_BYTES = 8
_MASK64 = (1 << 64) - 1


class Hole(NamedTuple):
    name: str
    offset: int
    format: str  # of numpy: "<u8" a fixed64 or a padded varint, ">u8" an id, "u1" a bool


class Piece(NamedTuple):
    """Bytes of a message, with holes."""

    body: bytes
    holes: tuple[Hole, ...] = ()

    def __add__(self, other: object) -> "Piece":
        assert isinstance(other, Piece)
        shift = len(self.body)
        moved = (hole._replace(offset=hole.offset + shift) for hole in other.holes)
        return Piece(self.body + other.body, (*self.holes, *moved))


def varint(value: int) -> bytes:
    """A whole number; a negative one as its 64 bits."""
    value &= _MASK64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def block(number: int, body: bytes) -> bytes:
    """A field of bytes, a text or a message."""
    return tag(number, 2) + varint(len(body)) + body


def block_head(number: int, length: int) -> bytes:
    """What stands before the body of such a field."""
    return tag(number, 2) + varint(length)


def piece_block(number: int, piece: Piece) -> Piece:
    return Piece(block_head(number, len(piece.body))) + piece


def fixed64(number: int, value: int) -> bytes:
    return tag(number, 1) + value.to_bytes(8, "little")


def fixed32(number: int, value: int) -> bytes:
    return tag(number, 5) + value.to_bytes(4, "little")


def hole(name: str, format: str, nbytes: int) -> Piece:
    return Piece(bytes(nbytes), (Hole(name, 0, format),))


def any_value(value: str | bool | int) -> bytes:
    """OTLP's AnyValue."""
    if isinstance(value, str):
        return block(1, value.encode("utf-8", "replace"))
    if isinstance(value, bool):
        return tag(2, 0) + varint(value)
    return tag(3, 0) + varint(value)


def key_value(number: int, key: str, value: Piece) -> Piece:
    """An attribute as field `number`; `value` is its AnyValue."""
    return piece_block(number, Piece(block(1, key.encode())) + piece_block(2, value))


def padded_varints(values: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Numbers of 0 to 2**56 - 1 as padded varints; stored little-endian they are their bytes."""
    bits = values.astype(np.uint64)
    for mask, shift in _SPREAD:  # seven bits into each byte, by halves
        bits = (bits & ~mask) | ((bits & mask) << shift)
    return bits | _CONTINUED


def _word(value: int) -> np.uint64:
    return np.uint64(value)


_SPREAD = (
    (_word(0x00FF_FFFF_F000_0000), _word(4)),
    (_word(0x0FFF_C000_0FFF_C000), _word(2)),
    (_word(0x3F80_3F80_3F80_3F80), _word(1)),
)
_CONTINUED = _word(0x0080_8080_8080_8080)


class Template:
    """A message of a fixed length, to be written many times."""

    def __init__(self, piece: Piece) -> None:
        self.nbytes = len(piece.body)
        self.names = [one.name for one in piece.holes]
        self._body = piece.body
        self._dtype = np.dtype(
            {
                "names": self.names,
                "formats": [one.format for one in piece.holes],
                "offsets": [one.offset for one in piece.holes],
                "itemsize": self.nbytes,
            }
        )

    def fill(self, columns: Mapping[str, npt.NDArray[Any]], number: int) -> bytearray:
        """`number` messages one after the other, each with its row of the columns."""
        out = bytearray(self._body * number)
        view = np.frombuffer(out, self._dtype)
        for name in self.names:
            view[name] = columns[name]
        return out
