"""Frames that lie: mutations that know what a frame is made of. A helper of the fuzz tests.

Owns how a case (see fuzz_frames) is taken apart and put together, random frames, and what can be
changed about one: a header field, a byte, a stretch of metadata, a node of the msgpack tree. It
writes frames by its own means and not by the encoder's, which would refuse most of them.
"""

import random
import struct
from typing import Any, NamedTuple

import msgspec
from msgspec.msgpack import Ext

from onecast.comm.dtypes import TENSOR_DTYPES, TENSOR_DTYPES_BY_NAME
from onecast.comm.header import HEADER_BYTES, VERSION, aligned

_HOW = struct.Struct("<BI")
_FIELDS = struct.Struct("<IBBHQIIII")
_MAX_CONTENT = 4096
_SOUND = 0x80

ITEM_BYTES = {name: dtype.itemsize for dtype, name in TENSOR_DTYPES.items()}

# The octets that msgpack begins things with, and those at the edges of its ranges.
OCTETS = bytes(
    [0, 1, 2, 0x7F, 0x80, 0x81, 0x8F, 0x90, 0x91, 0x92, 0x9F, 0xA0, 0xA1, 0xBF, *range(0xC0, 0xE1)]
) + bytes([0xFF])
NUMBERS = [
    *(0, 1, 2, 3, 5, 8, 31, 32, 33, 63, 64, 65, 127, 128, 192, 255, 256, 1000, 4095, 4096, 4097),
    *(1 << 31, (1 << 32) - 64, (1 << 32) - 1),
]
DIMENSIONS = [
    *(0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 100, 1000, -1, -8, 1 << 31, 1 << 32, 1 << 62, 1 << 61),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), True, 2.0, 0.0, float("nan"), None, "8"),
    *([], [2], {}, b"", Ext(1, (1 << 70).to_bytes(10, "little")), Ext(1, b"\x01"), Ext(1, b"")),
    *(Ext(1, b"\x7f" * 2000), Ext(2, b"\x91\x02"), Ext(3, b"int64")),
]
VALUES = [
    *(None, True, False, 0, 1, -1, 127, 1 << 40, -(1 << 63), (1 << 64) - 1, 0.0, 1.5, float("inf")),
    *("", "x", "größer", "\0", "a" * 40, b"", b"\xff", [], {}, [1, 2, 3], {"a": 1}, [[[]]]),
    *(Ext(1, (1 << 80).to_bytes(11, "little")), Ext(1, b""), Ext(1, b"\x7f" * 2000)),
    *(Ext(2, b"\x90"), Ext(2, b"\x92\x01\xc0"), Ext(2, b"\x92\x01"), Ext(2, b"\x80"), Ext(2, b"")),
    *(Ext(2, b"\x91\xc7\x03\x02\x91\x01\x02"), Ext(2, b"\x91\xc7\x02\x02\x91\x01")),
    *(Ext(3, b"int64"), Ext(3, b"float8_e4m3fn"), Ext(3, b"qint8"), Ext(3, b"foo"), Ext(3, b"")),
    *(Ext(3, b"\xff"), Ext(4, b"cuda:1"), Ext(4, b"cpu"), Ext(4, b"meta"), Ext(4, b"cuda:-1")),
    *(Ext(4, b""), Ext(4, b"\xff\0"), Ext(4, b"mkldnn"), Ext(4, b"cuda:99999999999")),
    *(Ext(0, b""), Ext(5, b"x"), Ext(99, b""), Ext(-2, b""), Ext(127, b"\0" * 16)),
]
# As they are: msgspec cannot write these.
RAW_PIECES = [
    *(b"\xd6\xff\0\0\0\1", b"\xd7\xff" + b"\xff" * 8, b"\xc7\x0c\xff" + b"\xff" * 12, b"\xc1"),
    *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff"),
    *(b"\xc9\xff\xff\xff\xff\x02", b"\x81\x90\x01", b"\x82\x01\x01\x01\x02", b"\xa1\xff"),
    *(b"\x81\xca\0\0\0\0\x01", b"\x81\xd4\x01\x05\x01", b"\x81\xc0\xc0", b"\x91" * 40),
    *(b"\xdc\xff\xff", b"\xde\xff\xff", b"\xc7\xff\x02", b"\xc8\xff\xff\x01", b"\xd9\xff"),
]
KEYS = ["a", "b", "", "größer", 0, 7, -1, -(1 << 63), (1 << 64) - 1]
ODD_KEYS = [None, True, 1.5, b"a", [], Ext(1, b"\x7f" * 9), Ext(1, b"\x01"), Ext(2, b"\x90")]
ODD_NODES = [
    *(
        7,
        [],
        [0],
        [2, []],
        [None, []],
        ["a"],
        [[], [None]],
        [["a"], []],
        [["a", "a"], [None, None]],
    ),
    *(["int65", 1], ["int64", -1], ["int64", 65], ["int64", True], ["qint8", 1], ["int64", None]),
    *(["int64", []], ["int64", Ext(1, b"\x7f" * 2000)], ["foo" * 30, "bar" * 30], [True, []]),
    *([0, None], [1, {}], [{}, []], [-1, []], [1 << 63, []], ["int64", 64], ["int64", 1.0], {}),
]

_pack = msgspec.msgpack.encode
_unpack = msgspec.msgpack.decode


class Frame(NamedTuple):
    how: int
    content: bytes

    @property
    def is_sound(self) -> bool:
        return self.how >= _SOUND


def split(case: bytes) -> list[Frame]:
    frames = []
    at = 0
    while at + _HOW.size <= len(case):
        how, length = _HOW.unpack_from(case, at)
        at += _HOW.size
        frames.append(Frame(how, case[at : at + length]))
        at += length
    return frames


def join(frames: list[Frame]) -> bytes:
    return b"".join(_HOW.pack(frame.how, len(frame.content)) + frame.content for frame in frames)


def tensors_end(definition: Any, dims: list[Any], start: int) -> int | None:
    """Where a frame ends whose tensors are these; None if they are none."""
    end = start
    first = 0
    pending = [definition]
    while pending:
        node = pending.pop()
        if type(node) is not list or len(node) != 2:
            if node is None:
                continue
            return None
        what, rest = node
        if type(what) is str:
            if what not in ITEM_BYTES or type(rest) is not int or not 0 <= rest <= 64:
                return None
            shape = dims[first : first + rest]
            first += rest
            count = 1
            for dim in shape:
                if type(dim) is not int or not 0 <= dim < 4096:
                    return None
                count *= dim
            if count:
                end = start + count * ITEM_BYTES[what]
                start = aligned(end)
        elif type(rest) is list:
            pending += reversed(rest)
        else:
            return None
    return end if end < 1 << 32 else None


def count_items(definition: Any) -> tuple[int, int]:
    """How many dimensions and values a definition asks for."""
    if definition is None:
        return 0, 1
    if type(definition) is not list or len(definition) != 2:
        return 0, 0
    what, rest = definition
    if type(what) is str:
        return (rest if type(rest) is int and 0 <= rest <= 64 else 0), 0
    counts = [count_items(child) for child in rest] if type(rest) is list else []
    return sum(dims for dims, _ in counts), sum(plain for _, plain in counts)


class Mutator:
    """Makes cases, and changes them."""

    def __init__(self, seeds: list[bytes], origin: int) -> None:
        self._seeds = [split(seed) for seed in seeds]
        self._origin = origin
        self._changes = [
            *(self._change_tree,) * 5,
            *(self._change_bytes,) * 3,
            *(self._change_field,) * 2,
            *(self._change_tensors,) * 2,
            self._cut,
        ]

    def case(self, chance: random.Random) -> bytes:
        """Some sound frames, from the seeds or made here, and mutants of them."""
        if chance.random() < 0.5:
            frames = list(chance.choice(self._seeds))
        else:
            frames = self._fresh(chance)
        sound = list(frames)
        if chance.random() < 0.01:  # more dimensions than anyone keeps views for
            steady = chance.choice(frames)
            for _ in range(100):
                content = self._change_tensors(steady.content, frames, chance)
                frames.append(Frame(0, content[:_MAX_CONTENT]))
        for _ in range(12):
            frame = self._changed(frames, chance.choice(sound), chance)
            frames.append(frame)
            if chance.random() < 0.1:
                sound.append(frame)  # and so mutants get mutants
        return join(frames)

    def mutated(self, case: bytes, chance: random.Random) -> bytes:
        """The case with something about it changed."""
        frames = split(case)
        if not frames:
            frames = self._fresh(chance)
        for _ in range(chance.choice((1, 1, 2, 4))):
            how = chance.random()
            at = chance.randrange(len(frames))
            if how < 0.75:
                frames[at] = self._changed(frames[:at], frames[at], chance)
            elif how < 0.85:
                frames[at:at] = [chance.choice(frames)]
            elif how < 0.9 and len(frames) > 1:
                del frames[at]
            elif how < 0.95:
                frames += self._fresh(chance)
            else:
                frames[at] = Frame(chance.randrange(128), frames[at].content)
        return join(frames[:16])

    def _changed(self, before: list[Frame], frame: Frame, chance: random.Random) -> Frame:
        content = frame.content
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            content = chance.choice(self._changes)(content, before, chance)[:_MAX_CONTENT]
        how = chance.choice((0, 0, 0, 0, 0, 3)) | chance.choice((0, 0, 4, 8, 12))
        return Frame(how | chance.choice((0, 0, 0, 16)), content)

    # ---- frames made here

    def _fresh(self, chance: random.Random) -> list[Frame]:
        """A random layout's definition and two frames that rely on it, most of them sound."""
        definition = self._dict_node(chance, 0)
        if chance.random() < 0.05:
            definition = chance.choice(ODD_NODES)
        number = chance.choice((0, 1, 1, 126, 127))
        frames = []
        for defines in (True, False, False):
            num_dims, num_values = count_items(definition)
            dims = [chance.choice((0, 1, 1, 2, 3, 5)) for _ in range(num_dims)]
            plain = [chance.choice(VALUES) for _ in range(num_values)]
            items = [definition, *dims, *plain] if defines else dims + plain
            content = self._written(defines, number, _pack(items), definition, dims, chance)
            frames.append(Frame(0, content))
        return frames

    def _node(self, chance: random.Random, depth: int) -> Any:
        kind = chance.random()
        if kind < 0.35 or depth > 5:
            return None
        if kind < 0.75:
            rank = chance.choice((0, 1, 1, 2, 2, 3, 4))
            return [chance.choice(list(TENSOR_DTYPES_BY_NAME)), rank]
        if kind < 0.85:
            return self._dict_node(chance, depth + 1)
        children = [self._node(chance, depth + 1) for _ in range(chance.randrange(4))]
        return [chance.randrange(2), children]

    def _dict_node(self, chance: random.Random, depth: int) -> Any:
        keys = chance.sample(KEYS, chance.choice((0, 1, 2, 3, 5)))
        return [keys, [self._node(chance, depth + 1) for _ in keys]]

    def _written(
        self,
        flags: int,
        number: int,
        metadata: bytes,
        definition: Any,
        dims: list[Any],
        chance: random.Random,
    ) -> bytes:
        start = aligned(HEADER_BYTES + len(metadata)) + chance.choice((0, 0, 0, 64))
        end = tensors_end(definition, dims, start) or start
        header = _FIELDS.pack(0, VERSION, flags, number, 0, len(metadata), start, end, self._origin)
        content = (header + metadata).ljust(start, b"\0")
        return content + b"\x5a" * min(end - start, _MAX_CONTENT)

    # ---- what can be changed about one: content, the frames before it and chance to new content

    def _change_field(self, content: bytes, before: list[Frame], chance: random.Random) -> bytes:
        content = content.ljust(HEADER_BYTES, b"\0")
        at, size = chance.choice(
            ((4, 1), (5, 1), (6, 2), (8, 8), (16, 4), (20, 4), (24, 4), (28, 4))
        )
        old = int.from_bytes(content[at : at + size], "little")
        value = chance.choice(
            (
                chance.choice(NUMBERS),
                old ^ 1 << chance.randrange(8 * size),
                old + 64,
                old - 64,
                old - 1,
            )
        )
        field = (value % (1 << 8 * size)).to_bytes(size, "little")
        return content[:at] + field + content[at + size :]

    def _change_bytes(self, content: bytes, before: list[Frame], chance: random.Random) -> bytes:
        """Bytes of the metadata changed, inserted or lost, mostly with its length told truly."""
        metadata = bytearray(metadata_of(content))
        at = chance.randrange(len(metadata) + 1)
        how = chance.randrange(5)
        if how == 0 and at < len(metadata):
            metadata[at] ^= 1 << chance.randrange(8)
        elif how == 1 and at < len(metadata):
            metadata[at] = chance.choice(OCTETS)
        elif how == 2:
            piece = chance.choice(RAW_PIECES)
            metadata[at : at + chance.choice((0, 1, len(piece)))] = piece
        elif how == 3:
            del metadata[at : at + chance.choice((1, 1, 2, 4, 8, 100))]
        else:
            metadata[at : at + chance.choice((0, 1, 4))] = chance.randbytes(
                chance.choice((1, 2, 4))
            )
        return self._with_metadata(content, bytes(metadata), before, chance)

    def _change_tree(self, content: bytes, before: list[Frame], chance: random.Random) -> bytes:
        """A node of the metadata replaced, doubled, lost or swapped with another."""
        try:
            items = _unpack(metadata_of(content))
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError):
            return self._change_bytes(content, before, chance)
        if type(items) is not list or not items:
            return self._with_metadata(content, _pack([chance.choice(VALUES)]), before, chance)
        parent: Any = items
        at: Any = chance.randrange(len(items))
        in_definition = at == 0 and content[5] & 1
        while type(parent[at]) in (list, dict) and parent[at] and chance.random() < 0.7:
            parent = parent[at]
            at = (
                chance.choice(list(parent))
                if type(parent) is dict
                else chance.randrange(len(parent))
            )
        how = chance.random()
        if in_definition and how < 0.6:
            parent[at] = self._other_node(parent[at], chance)
        elif how < 0.6:
            number = type(parent[at]) is int
            parent[at] = chance.choice(DIMENSIONS if number else VALUES)
        elif how < 0.7:
            parent[at] = chance.choice(VALUES)
        elif type(parent) is dict:
            parent[chance.choice(KEYS)] = parent.pop(at)
        elif how < 0.8:
            parent.insert(at, parent[at])
        elif how < 0.9:
            del parent[at]
        else:
            other = chance.randrange(len(parent))
            parent[at], parent[other] = parent[other], parent[at]
        try:
            metadata = _pack(items)
        except (TypeError, ValueError, OverflowError):  # a date among them; an odd key
            return content
        return self._with_metadata(content, metadata, before, chance)

    def _other_node(self, node: Any, chance: random.Random) -> Any:
        how = chance.random()
        if type(node) is int and how < 0.5:
            return chance.choice(DIMENSIONS)
        if type(node) is str and how < 0.5:
            return chance.choice([*TENSOR_DTYPES_BY_NAME, "qint8", "", "x" * 100])
        if how < 0.4:
            return chance.choice(ODD_NODES)
        if how < 0.5:
            return chance.choice(ODD_KEYS)
        if how < 0.6:
            for _ in range(chance.choice((1, 30, 31, 32, 33, 34))):
                node = [chance.randrange(2), [node]]
            return node
        return self._node(chance, 0)

    def _change_tensors(self, content: bytes, before: list[Frame], chance: random.Random) -> bytes:
        """Other dimensions, in a frame of the length that they need."""
        try:
            items = _unpack(metadata_of(content))
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError):
            return content
        definition = definition_of(content, before)
        if type(items) is not list or definition is None:
            return content
        first = content[5] & 1
        for at in range(first, min(first + count_items(definition)[0], len(items))):
            if chance.random() < 0.5:
                items[at] = chance.choice((0, 1, 2, 3, 5, 9))
        return self._with_metadata(content, _pack(items), before, chance)

    def _cut(self, content: bytes, before: list[Frame], chance: random.Random) -> bytes:
        return content[: chance.randrange(len(content) + 1)]

    def _with_metadata(
        self, content: bytes, metadata: bytes, before: list[Frame], chance: random.Random
    ) -> bytes:
        """Other metadata in the frame; mostly its lengths are what they then should be."""
        content = content.ljust(HEADER_BYTES, b"\0")
        _, version, flags, number, sequence, _, start, end, origin = _FIELDS.unpack_from(content)
        tensors = content[start:]
        if chance.random() < 0.9:
            start = aligned(HEADER_BYTES + len(metadata))
            if chance.random() < 0.05:  # a truthful header about memory that is not there
                start += chance.choice((64, 960, 4096, 1 << 20, 1 << 31))
            end = start + len(tensors)
            definition = definition_of(content, before, metadata)
            if definition is not None and chance.random() < 0.9:
                try:
                    items = _unpack(metadata)
                except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError):
                    items = None
                if type(items) is list:
                    end = tensors_end(definition, items[flags & 1 :], start) or end
        fields = _FIELDS.pack(
            0, version, flags, number, sequence, len(metadata), start, end % (1 << 32), origin
        )
        tensors = tensors[: max(end - start, 0)].ljust(
            min(max(end - start, 0), _MAX_CONTENT), b"\x5a"
        )
        return (fields + metadata).ljust(min(start, _MAX_CONTENT), b"\0") + tensors


def metadata_of(content: bytes) -> bytes:
    return content[HEADER_BYTES : HEADER_BYTES + int.from_bytes(content[16:20], "little")]


def definition_of(content: bytes, before: list[Frame], metadata: bytes | None = None) -> Any:
    """The definition that a frame's dimensions are read by: its own, or the latest before it."""
    if len(content) < HEADER_BYTES:
        return None
    own = metadata_of(content) if metadata is None else metadata
    number = content[6:8]
    defining = [own] if content[5] & 1 else []
    if not defining:
        for frame in reversed(before):
            if frame.content[6:8] == number and frame.content[5] & 1:
                defining = [metadata_of(frame.content)]
                break
    for candidate in defining:
        try:
            items = _unpack(candidate)
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError):
            return None
        if type(items) is list and items:
            return items[0]
    return None
