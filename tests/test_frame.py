"""Frames: what goes in comes out, small, checked, and with the very views of the frame before."""

import random
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecast.comm import FrameError, OutOfStep, UnsupportedTypeError
from onecast.comm.dtypes import DTYPES_BY_NAME, FROM_NUMPY, TENSOR_DTYPES
from onecast.comm.frame import Decoder, Encoder, rebuild, write
from onecast.comm.header import (
    ALIGNMENT,
    HEADER_BYTES,
    MAX_LAYOUTS,
    aligned,
    make_origin,
    read_header,
)
from onecast.comm.layout import MAX_DEPTH
from onecast.comm.region import Region

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


# ---- mappings at random, and what it means to arrive; other tests of this folder use them too


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Content of random bits; by the seed contiguous, transposed, strided or expanded."""
    generator = torch.Generator().manual_seed(seed)

    def fresh(shape: tuple[int, ...]) -> torch.Tensor:
        if dtype is torch.bool:
            return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        *outer, last = shape or (1,)
        bits = torch.randint(
            0, 256, (*outer, last * dtype.itemsize), generator=generator, dtype=torch.uint8
        )
        return bits.view(dtype).reshape(shape)

    how = seed % 4
    if how == 1 and len(shape) >= 2:
        return fresh((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
    if how == 2 and shape:
        return fresh((*shape[:-1], shape[-1] * 2 + 1))[..., 1::2]
    if how == 3 and shape:
        return fresh((1, *shape[1:])).expand(shape)
    return fresh(shape)


def random_array(dtype: "np.dtype[Any]", shape: tuple[int, ...], seed: int) -> Any:
    array = random_tensor(FROM_NUMPY[dtype], shape, seed).numpy().copy()
    array = array[::-1] if shape and seed % 3 == 0 else array
    array.flags.writeable = seed % 2 == 0
    return array


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
seeds = st.integers(0, 1 << 30)
tensors = st.builds(random_tensor, st.sampled_from(list(TENSOR_DTYPES)), shapes, seeds)
arrays = st.builds(random_array, st.sampled_from(list(FROM_NUMPY)), shapes, seeds)
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 300), 1 << 300),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    st.sampled_from(list(DTYPES_BY_NAME.values())),
    st.sampled_from([torch.device("cpu"), torch.device("cuda:3"), torch.device("meta")]),
)
keys = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), st.integers(-(1 << 63), (1 << 63) - 1)
)
nested = st.recursive(
    st.one_of(plain, tensors, arrays),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=8,
)
mappings = st.dictionaries(keys, st.one_of(plain, tensors, arrays, nested), max_size=8)


def assert_arrived(sent: Any, got: Any, path: str = "") -> None:
    """`got` equals `sent`: in type, order and every bit; arrays became tensors."""
    if isinstance(sent, np.ndarray):
        sent = torch.from_numpy(sent.copy())
    if isinstance(sent, torch.Tensor):
        assert type(got) is torch.Tensor, path
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape), path
        assert got.is_contiguous() and not got.requires_grad, path
        if not sent.numel():
            return
        # As bytes: NaNs are equal to themselves there, and float8 can be compared at all.
        same = torch.empty(sent.shape, dtype=sent.dtype).copy_(sent.detach())
        assert torch.equal(got.reshape(-1).view(torch.uint8), same.reshape(-1).view(torch.uint8)), (
            path
        )
        return
    assert type(got) is type(sent), path
    if isinstance(sent, float):
        assert struct.pack("<d", got) == struct.pack("<d", sent), path
    elif isinstance(sent, dict):
        assert list(got) == list(sent), path
        for (key, value), key_got in zip(sent.items(), got, strict=True):
            assert type(key_got) is type(key), path
            assert_arrived(value, got[key], f"{path}.{key}")
    elif isinstance(sent, list | tuple):
        assert len(got) == len(sent), path
        for index, (value, value_got) in enumerate(zip(sent, got, strict=True)):
            assert_arrived(value, value_got, f"{path}[{index}]")
    else:
        assert got == sent, path


# ---- an encoder and a decoder, side by side


def new_region(nbytes: int = 1 << 14) -> Region:
    return Region(torch.zeros(aligned(nbytes), dtype=torch.uint8))


ORIGIN = make_origin(sender=3, channel=7)


class Wire:
    """Both sides of a channel, and one piece of memory between them."""

    def __init__(self) -> None:
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.region = new_region()
        self.sequence = 0
        self.message: Any = None

    def send(self, mapping: Any) -> memoryview:
        """Write a frame; its bytes."""
        self.message = self.encoder.plan(mapping)
        if self.message.total > self.region.nbytes:
            self.region = new_region(self.message.total)
        write(self.message, self.sequence, ORIGIN, self.region)
        self.encoder.commit(self.message)
        self.sequence += 1
        assert self.region.memory is not None
        return self.region.memory[: self.message.total]

    def receive(self) -> dict[Any, Any]:
        assert self.region.memory is not None
        header = read_header(self.region.memory, self.sequence - 1, ORIGIN)
        return self.decoder.decode(self.region, header, self.region.memory)

    def pass_on(self, mapping: Any) -> dict[Any, Any]:
        self.send(mapping)
        return self.receive()


def block_message() -> dict[str, Any]:
    return {
        "swap_in": torch.arange(16).reshape(8, 2),
        "swap_out": torch.arange(16).reshape(8, 2),
        "copy": torch.arange(8).reshape(4, 2),
    }


# ---- what arrives


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(mappings, min_size=1, max_size=4))
def test_every_mapping_arrives_as_it_was_sent_first_and_again(sent):
    wire = Wire()
    for mapping in [*sent, *sent]:
        assert_arrived(mapping, wire.pass_on(mapping))
        assert_arrived(mapping, rebuild(wire.message, wire.region))
        assert_arrived(mapping, wire.pass_on(mapping))


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 5)], ids=str)
def test_every_dtype_arrives_in_every_stride(dtype, shape):
    wire = Wire()
    for seed in [0, 1, 2, 3, 0]:
        mapping = {"tensor": random_tensor(dtype, shape, seed), "after": torch.arange(2)}
        assert_arrived(mapping, wire.pass_on(mapping))


def test_a_mapping_that_differs_in_one_thing_from_the_one_before_arrives_too():
    base = {"n": 1, "a": torch.arange(4), "b": torch.ones(2, 2), "list": [1, 2]}
    others = [
        {**base, "n": True},
        {**base, "n": 1.0},
        {**base, "n": None},
        {**base, "n": torch.tensor(1)},
        {**base, "a": torch.arange(4, dtype=torch.int32)},
        {**base, "a": torch.arange(5)},
        {**base, "a": torch.arange(4).reshape(2, 2)},
        {**base, "a": np.arange(4)},
        {**base, "a": [torch.arange(4)]},
        {**base, "a": torch.nn.Parameter(torch.ones(4))},
        {**base, "a": torch.ones(2, 4, requires_grad=True)[0]},
        {**base, "list": (1, 2)},
        {**base, "list": [1, torch.ones(1)]},
        {**base, "more": 1},
        dict(reversed(base.items())),
        {"a" if key == "b" else "b" if key == "a" else key: base[key] for key in base},
        {key: base[key] for key in base if key != "b"},
    ]
    wire = Wire()
    for other in others:
        for mapping in (base, base, other, other, base):
            got = wire.pass_on(mapping)
            expected = {
                k: v.data if type(v) is torch.nn.Parameter else v for k, v in mapping.items()
            }
            assert_arrived(expected, got)


def test_lazy_conjugates_and_negatives_arrive_resolved():
    source = torch.complex(torch.arange(3.0), torch.arange(3.0))
    mapping = {"conj": source.conj(), "negative": source.conj().imag}
    wire = Wire()
    for _ in range(3):
        got = wire.pass_on(mapping)
        assert torch.equal(got["conj"], source.conj().resolve_conj())
        assert torch.equal(got["negative"], torch.tensor([0.0, -1.0, -2.0]))


def test_sending_inside_and_outside_of_inference_mode_is_the_same():
    wire = Wire()
    for _ in range(2):
        with torch.inference_mode():
            assert_arrived(block_message(), wire.pass_on(block_message()))
        assert_arrived(block_message(), wire.pass_on(block_message()))


def test_a_mapping_need_not_be_a_dict():
    assert_arrived({"b": 1, "a": 2}, Wire().pass_on(OrderedDict(b=1, a=2)))


# ---- how large, and how stable


def steady_metadata_bytes(mapping: dict[str, Any]) -> int:
    wire = Wire()
    wire.send(mapping)
    wire.send(mapping)
    return wire.message.metadata_bytes


def test_the_block_message_has_at_most_40_bytes_that_are_neither_tensor_nor_padding():
    assert steady_metadata_bytes(block_message()) == 39


def test_a_further_small_tensor_costs_at_most_3_bytes():
    base = block_message()
    for shape in [(), (8, 2), (64,), (127, 127), (65535,)]:
        more = {f"more_{i}": torch.zeros(shape, dtype=torch.int64) for i in range(8)}
        added = steady_metadata_bytes({**base, **more}) - steady_metadata_bytes(base)
        assert added <= 3 * 8 + 2  # 2: the array's own header, once it counts beyond 15


def test_tensors_lie_at_multiples_of_64_bytes():
    wire = Wire()
    got = wire.pass_on({"a": torch.ones(3), "b": torch.ones(1), "c": torch.ones(17)})
    base = wire.region.tensor.data_ptr()
    assert {(tensor.data_ptr() - base) % ALIGNMENT for tensor in got.values()} == {0}


def test_a_repeated_mapping_yields_the_very_same_views():
    wire = Wire()
    wire.pass_on({**block_message(), "step": 0})
    first = wire.pass_on({**block_message(), "step": 1})
    second = wire.pass_on({**block_message(), "step": 2})
    assert second["step"] == 2 and first["step"] == 1
    assert all(first[key] is second[key] for key in block_message())


def test_a_value_that_grows_does_not_move_the_tensors():
    wire = Wire()
    wire.pass_on({"text": "", **block_message()})
    wire.pass_on({"text": "x" * 30, **block_message()})
    addresses = {
        wire.pass_on({"text": "x" * n, **block_message()})["copy"].data_ptr()
        for n in [0, 10, 30, 20, 0]
    }
    assert len(addresses) == 1


def test_a_container_that_was_received_is_not_the_next_frames():
    wire = Wire()
    for _ in range(3):
        got = wire.pass_on({"tokens": [1, 2], "a": torch.ones(1)})
        assert got["tokens"] == [1, 2]
        got["tokens"].append(3)
        got["more"] = 4


def test_layouts_are_bounded_and_replaced_alike_on_both_sides():
    wire = Wire()
    order = random.Random(1)
    for _ in range(1500):
        number = order.randrange(MAX_LAYOUTS * 3 // 2)
        mapping = {f"key {number}": number, "common": torch.tensor([number])}
        assert_arrived(mapping, wire.pass_on(mapping))
    assert len(wire.encoder._layouts) == MAX_LAYOUTS
    assert len(wire.decoder._layouts) == MAX_LAYOUTS


def test_a_layout_in_use_is_never_the_one_that_makes_room():
    wire = Wire()
    for number in range(MAX_LAYOUTS * 3):
        wire.pass_on({"step": number, **block_message()})
        assert wire.message.defines is (number == 0)
        wire.pass_on({f"once {number}": 1})


# ---- what is refused at the sender


@dataclass
class Foo:
    x: int = 1


class StrangeInt(int):
    pass


def nested_lists(depth: int) -> list[Any]:
    value: list[Any] = [Foo()]
    for _ in range(depth):
        value = [value]
    return value


def contains_itself() -> list[Any]:
    value: list[Any] = [[1, []]]
    value.append(value)
    return value


UNSUPPORTED = [
    ({"sampling": {"params": [1, 2, (3,), Foo()]}}, r"sampling\.params\[3\]: object of type .*Foo"),
    ({"a": {1, 2}}, "a: object of type set"),
    ({"a": 1j}, "a: object of type complex"),
    ({"a": StrangeInt(1)}, "a: object of type .*StrangeInt"),
    ({"a": np.float64(1)}, r"a: object of type numpy\.float64"),
    ({"a": bytearray(1)}, "a: object of type bytearray"),
    ({"a": torch.Size([1])}, r"a: object of type torch\.Size"),
    ({"a": OrderedDict(b=1)}, "a: object of type .*OrderedDict"),
    ({"a": np.array([None])}, r"a: numpy array of dtype '\|O'"),
    ({"a": np.arange(3, dtype=">i4")}, "a: numpy array of dtype '>i4'"),
    ({"a": [torch.eye(2).to_sparse()]}, r"a\[0\]: tensor of layout torch\.sparse_coo"),
    ({"a": torch.eye(2).to_sparse()}, "a: tensor of layout"),
    ({"b": torch.ones(1), "a": [torch.empty(2, device="meta")]}, r"a\[0\]: "),
    ({True: 1}, "key True of type bool"),
    ({"a": {1.5: 1}}, "a: key 1.5 of type float"),
    ({1 << 64: 1}, "key 18446744073709551616 beyond 64 bits"),
    ({"a": ["x", "\ud800"]}, r"a\[1\]: str with lone surrogates"),
    ({"a": ("x", "\ud800")}, r"a\[1\]: str with lone surrogates"),
    ({"\ud800": 1}, "key '.ud800' of the mapping: str with lone surrogates"),
    ({"a": nested_lists(MAX_DEPTH)}, f"nested deeper than {MAX_DEPTH}"),
    ({"a": contains_itself()}, f"nested deeper than {MAX_DEPTH}"),
]


@pytest.mark.parametrize("mapping, text", UNSUPPORTED, ids=[text for _, text in UNSUPPORTED])
def test_what_cannot_travel_is_named_and_leaves_no_trace(mapping, text):
    wire = Wire()
    with pytest.raises(UnsupportedTypeError, match=text):
        wire.pass_on(mapping)
    wire.pass_on(block_message())
    wire.pass_on(block_message())
    steady = bytes(wire.send(block_message()))[8 + 8 :]
    with pytest.raises(UnsupportedTypeError, match=text):
        wire.pass_on(mapping)
    with pytest.raises(TypeError):
        wire.pass_on({**block_message(), "more": 1, **mapping})
    assert bytes(wire.send(block_message()))[8 + 8 :] == steady
    assert wire.encoder._layouts.keys() == {tuple(wire.message.layout.root)}
    assert_arrived(block_message(), wire.pass_on(block_message()))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_tensor_is_refused_by_name():
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    with pytest.raises(UnsupportedTypeError, match=r"w: quantised tensor of dtype torch\.quint8"):
        Wire().pass_on({"w": tensor})


def test_a_frame_beyond_the_limit_is_refused_with_the_limit():
    wire = Wire()
    with pytest.raises(ValueError, match="4294967295 bytes at most"):
        wire.encoder.plan({"big": torch.empty(1).expand(1 << 31)})
    assert_arrived(block_message(), wire.pass_on(block_message()))


# ---- what is refused at the receiver


def with_checksum(frame: bytes) -> bytearray:
    """The frame with its checksum set right."""
    frame = bytearray(frame)
    end = HEADER_BYTES + int.from_bytes(frame[16:20], "little")
    frame[:4] = zlib.crc32(frame[4:end]).to_bytes(4, "little")
    return frame


def rich_mapping() -> dict[str, Any]:
    return {
        "step": 3,
        "text": "größer",
        "big": 1 << 80,
        "ids": [1, 2, 3],
        "pair": (torch.ones(2, 3), [np.arange(4)]),
        "dtype": torch.float16,
        "device": torch.device("cuda:1"),
        "inner": {"a": torch.zeros(3, dtype=torch.int32), 7: None},
        **block_message(),
    }


def frames_to_mutate() -> list[tuple[bytes, bytes | None]]:
    """A frame that defines its layout, and one that relies on the first."""
    frames: list[tuple[bytes, bytes | None]] = []
    for mapping in (rich_mapping(), block_message()):
        wire = Wire()
        first = bytes(wire.send(mapping))
        wire.sequence = 0
        frames += [(first, None), (bytes(wire.send(mapping)), first)]
    return frames


def decode(frame: bytes | bytearray, before: bytes | None, expected: int = 0) -> dict[Any, Any]:
    """Decode a frame that lies, followed by other memory, in a region, after another frame."""
    decoder = Decoder()
    region = new_region(2048)
    for content in [frame] if before is None else [before, frame]:
        assert region.memory is not None
        region.memory[: len(content)] = content
        header = read_header(region.memory, expected, ORIGIN)
        mapping = decoder.decode(region, header, region.memory)
    return mapping


def mutate(frame: bytes, chance: random.Random) -> bytearray:
    mutated = bytearray(frame)
    end = HEADER_BYTES + int.from_bytes(frame[16:20], "little")
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at = chance.randrange(4, end)
        how = chance.randrange(5)
        if how == 0:
            mutated[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            mutated[at] = chance.choice([0, 1, 0x7F, 0x80, 0xC1, 0xDD, 0xDF, 0xC6, 0xC9, 0xFF])
        elif how == 2:  # a whole field, or a stretch of metadata
            size = chance.choice([2, 4, 8])
            mutated[at : at + size] = chance.randbytes(size)
        elif how == 3:  # metadata that lost or gained bytes, with its length told truly
            cut = chance.randrange(-8, 8)
            at = max(at, HEADER_BYTES)
            piece = chance.randbytes(cut) if cut > 0 else b""
            mutated[at : at - min(cut, 0)] = piece
            length = int.from_bytes(mutated[16:20], "little") + cut
            mutated[16:20] = (length % (1 << 32)).to_bytes(4, "little")
        else:
            value = chance.choice([0, 1, 63, 64, 1 << 31, (1 << 32) - 1, chance.randrange(2000)])
            field = chance.choice([16, 20, 24])
            mutated[field : field + 4] = value.to_bytes(4, "little")
    del mutated[1024:]
    return mutated


def test_ten_thousand_mutated_frames_are_decoded_or_refused_and_nothing_else():
    chance = random.Random(7)
    frames = frames_to_mutate()
    decoded = refused = 0
    for turn in range(16_000):
        frame, before = chance.choice(frames)
        mutated = mutate(frame, chance)
        if turn % 4 and len(mutated) >= HEADER_BYTES:
            mutated = with_checksum(mutated)  # or hardly any would get beyond the checksum
        try:
            decode(mutated, before)
            decoded += 1
        except FrameError:
            refused += 1
    assert refused > 10_000
    assert decoded > 500


@pytest.mark.parametrize("frame, before", frames_to_mutate(), ids=["a", "b", "c", "d"])
def test_every_flipped_bit_of_header_and_metadata_is_found(frame, before):
    assert decode(frame, before)
    for bit in range(8 * (HEADER_BYTES + int.from_bytes(frame[16:20], "little"))):
        mutated = bytearray(frame)
        mutated[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            decode(mutated, before)


HOSTILE_METADATA = {
    "an endless array": b"\xdd\xff\xff\xff\xff",
    "an endless map": b"\x91\xdf\xff\xff\xff\xff",
    "endless bytes": b"\x91\xc6\xff\xff\xff\xff",
    "deep nesting": b"\x91" * 900,
    "deep tuples": None,  # made below
    "no array": b"\xc0",
    "nothing": b"",
    "huge dimensions": msgspec.msgpack.encode([2**62, 2**62, 2**62, 2**62, 2**62, 2**62]),
    "dimensions beyond 63 bits": msgspec.msgpack.encode([2**63, 2, 8, 2, 4, 2]),
    "huge empty tensors": msgspec.msgpack.encode([0, 2**62, 2**62, 0, 4, 2]),
    "negative dimensions": msgspec.msgpack.encode([-8, -2, 8, 2, 4, 2]),
    "dimensions of text": msgspec.msgpack.encode(["8", 2, 8, 2, 4, 2]),
    "dimensions of lists": msgspec.msgpack.encode([[], 2, 8, 2, 4, 2]),
    "more tensor than frame": msgspec.msgpack.encode([8, 2, 8, 2, 5, 20]),
    "less tensor than frame": msgspec.msgpack.encode([8, 2, 8, 2, 4, 1]),
    "too few items": msgspec.msgpack.encode([8, 2, 8, 2, 4]),
    "too many items": msgspec.msgpack.encode([8, 2, 8, 2, 4, 2, 2]),
    "a strange extension": msgspec.msgpack.encode([8, 2, 8, 2, 4, msgspec.msgpack.Ext(99, b"")]),
    "a strange date": b"\x91\xc7\x0c\xff" + b"\xff" * 12,
    "no such dtype": msgspec.msgpack.encode([msgspec.msgpack.Ext(3, b"foo")]),
    "no such device": msgspec.msgpack.encode([msgspec.msgpack.Ext(4, b"foo:1")]),
    "no UTF-8": b"\x91\xa1\xff",
    "a key that is a list": b"\x91\x81\x90\x01",
}


def deep_tuples() -> bytes:
    data = b"\x90"
    while len(data) < 900:
        data = b"\x91" + msgspec.msgpack.encode(msgspec.msgpack.Ext(2, data))
    return data


@pytest.mark.parametrize("what", HOSTILE_METADATA)
def test_hostile_metadata_with_a_sound_checksum_is_refused(what):
    metadata = HOSTILE_METADATA[what]
    metadata = deep_tuples() if metadata is None else metadata
    wire = Wire()
    first = bytes(wire.send(block_message()))
    wire.sequence = 0
    steady = bytes(wire.send(block_message()))
    for frame, before in ((steady, first), (first, None)):
        start = aligned(HEADER_BYTES + len(metadata))
        tensors = frame[int.from_bytes(frame[20:24], "little") :]
        fields = frame[4:16] + struct.pack(
            "<IIII", len(metadata), start, start + len(tensors), ORIGIN
        )
        hostile = (b"0000" + fields + metadata).ljust(start, b"\0") + tensors
        with pytest.raises(FrameError):
            decode(with_checksum(hostile), before)


DEFINITIONS = [
    None,
    7,
    [],
    [["a"]],
    [["a"], ["int64", 1]],
    [["a", "a"], [None, None]],
    [["a"], []],
    [["a"], [["int65", 1]]],
    [["a"], [["int64", -1]]],
    [["a"], [["int64", 65]]],
    [["a"], [["int64", True]]],
    [["a"], [["qint8", 1]]],
    [["a"], [[2, []]]],
    [["a"], [[None, []]]],
    [[None], [None]],
    [[1.5], [None]],
    [[["a"]], [None]],
    [0, [None]],
    ["int64", 1],
]


@pytest.mark.parametrize("definition", DEFINITIONS, ids=repr)
def test_a_malformed_definition_is_refused(definition):
    metadata = msgspec.msgpack.encode([definition, 1])
    fields = struct.pack("<BBHQIIII", 0xC1, 1, 0, 0, len(metadata), 64, 128, ORIGIN)
    frame = (b"0000" + fields + metadata).ljust(128, b"\0")
    with pytest.raises(FrameError):
        decode(with_checksum(frame), None)


def test_a_frame_out_of_step_is_told_both_sequence_numbers_and_its_layout():
    wire = Wire()
    wire.send({"other": 1})
    frame = bytes(wire.send(block_message()))
    with pytest.raises(
        OutOfStep,
        match=r"frame 5 of channel 7 from rank 3 was due, frame 1 \(layout 1\) of channel 7",
    ) as caught:
        decode(frame, None, expected=5)
    error = caught.value
    assert (error.expected, error.received, error.layout, error.sender) == (5, 1, 1, 3)


def test_a_frame_of_another_channel_or_sender_is_told_by_name():
    frame = bytearray(Wire().send(block_message()))
    frame[28:32] = make_origin(2, 9).to_bytes(4, "little")
    with pytest.raises(OutOfStep, match="of channel 9 from rank 2 arrived") as caught:
        decode(with_checksum(frame), None)
    assert (caught.value.expected, caught.value.received, caught.value.sender) == (0, 0, 2)


def test_a_frame_of_another_version_is_refused_by_that():
    frame = bytearray(Wire().send(block_message()))
    frame[4] += 1
    with pytest.raises(FrameError, match="no frame of this version: 0xc2"):
        decode(with_checksum(frame), None)


def test_other_traffic_is_refused():
    with pytest.raises(FrameError, match="no frame of this version"):
        decode(torch.arange(100).numpy().tobytes(), None)


def test_a_layout_that_nobody_defined_is_refused_by_its_number():
    (_, first), (steady, _) = frames_to_mutate()[2:][::-1][1], frames_to_mutate()[3]
    assert first is None
    with pytest.raises(FrameError, match="layout 0, which no frame defined"):
        decode(steady, None)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5, 64])
def test_a_truncated_frame_is_refused(length):
    wire = Wire()
    frame = wire.send(block_message())[:length]
    decoder = Decoder()
    with pytest.raises(FrameError):
        header = read_header(frame, 0, ORIGIN)
        decoder.decode(wire.region, header, frame)


def test_a_frame_longer_than_its_memory_is_refused():
    wire = Wire()
    frame = wire.send(block_message())
    small = new_region(len(frame) - ALIGNMENT)
    assert small.memory is not None
    small.memory[:] = frame[: small.nbytes]
    header = read_header(small.memory, 0, ORIGIN)
    with pytest.raises(FrameError, match="beyond"):
        Decoder().decode(small, header, small.memory)


@pytest.mark.parametrize("wrong", [None, [1], 7, "text"])
def test_what_is_no_mapping_is_refused_by_its_type(wrong: Any) -> None:
    for encoder in (Encoder(), Encoder()):
        with pytest.raises(ValueError, match=f"not an object of type {type(wrong).__name__}"):
            encoder.plan(wrong)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_and_leaves_the_encoder_as_it_was() -> None:
    encoder = Encoder()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
    with pytest.raises(UnsupportedTypeError, match="shape"):
        encoder.plan({"x": nested})
    assert encoder.plan({"x": torch.ones(2)}).total > 0
