"""The decoder under fire: what arrives is decoded or refused by the frame error, and that is all.

Most of it runs in processes of its own (see fuzz_frames), with the frames between pages that nobody
may touch and with little memory, so that an over-read, a crash or a flood ends that process and not
this one.
"""

import importlib.util
import mmap
import random
import signal
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_frames
import msgspec
import numpy as np
import pytest
import torch
from frame_mutations import KEYS, ODD_KEYS, ODD_NODES, VALUES, Frame, Mutator, join, split
from fuzz_frames import ORIGIN, Guarded, Journal, Target, functions_under_test, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext
from test_frame import Wire, assert_arrived, block_message, mappings, random_tensor

from onecast.comm import FrameError, UnsupportedTypeError
from onecast.comm.frame import Decoder
from onecast.comm.header import DEFINES, HEADER_BYTES, VERSION, aligned, read_header

SCRIPT = Path(fuzz_frames.__file__)
SLOWEST_NS = 5_000_000_000  # a case takes about a millisecond; the rest is for a machine at a halt
GROWN_KIB = 32 << 10

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed: it has wheels for Linux on x86-64 alone",
)
fuzzed = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


# ---- processes that fuzz


class Run:
    """A process that fuzzes, and what its journal says afterwards."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._journal = folder / "journal"
        self._output = folder / "output"
        mode, *others = arguments
        first, last = (others, []) if mode == "--random" else ([], others)
        command = [sys.executable, "-P", str(SCRIPT), mode, *first, str(self._journal), *last]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=folder
            )

    def numbers(self, timeout_s: float) -> dict[str, int]:
        """Fails with the case at hand if the process does."""
        try:
            status: int | str = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            status = f"none after {timeout_s} s"
        output = self._output.read_text(errors="replace")
        if status != 0:
            path = save_case(self._journal)
            pytest.fail(f"exit status {status}; the case is in {path}\n{output[-5000:]}")
        numbers, _ = Journal.read(self._journal)
        assert numbers["slowest_ns"] < SLOWEST_NS
        assert numbers["grown_kib"] < GROWN_KIB
        return numbers


def save_case(journal: Path) -> Path:
    """The journal's case as a file for `python -P tests/fuzz_frames.py`."""
    path = journal.with_suffix(".hex")
    path.write_text(Journal.read(journal)[1].hex())
    return path


def start_random(folder: Path, seed: int, frames: int) -> Run:
    folder.mkdir()
    return Run(folder, "--random", str(seed), str(frames))


def start_guided(folder: Path, seed: int, runs: int) -> Run:
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for number, case in enumerate(seeds()):
        (corpus / str(number)).write_bytes(case)
    limits = ["-max_len=16384", "-timeout=20", "-rss_limit_mb=2048", f"-artifact_prefix={folder}/"]
    return Run(folder, "--guided", f"-seed={seed}", f"-runs={runs}", *limits, str(corpus))


def assert_shares(numbers: dict[str, int], entered: float, decoded: float) -> None:
    """Mutants of which none gets anywhere would prove nothing."""
    assert numbers["entered"] > entered * numbers["mutated"]
    assert numbers["decoded"] > decoded * numbers["mutated"]


def test_fifty_thousand_mutated_frames_are_decoded_or_refused_and_nothing_else(tmp_path):
    numbers = start_random(tmp_path / "a", seed=7, frames=50_000).numbers(100)
    assert numbers["mutated"] >= 50_000
    assert_shares(numbers, entered=0.5, decoded=0.1)


@needs_atheris
def test_frames_that_follow_coverage_are_decoded_or_refused_and_nothing_else(tmp_path):
    numbers = start_guided(tmp_path / "a", seed=7, runs=4_000).numbers(100)
    assert numbers["mutated"] >= 10_000
    assert_shares(numbers, entered=0.25, decoded=0.05)


@pytest.mark.slow
def test_a_million_mutated_frames_are_decoded_or_refused_and_nothing_else(tmp_path):
    runs = [start_random(tmp_path / str(seed), seed, 500_000) for seed in (1, 2)]
    numbers = [run.numbers(240) for run in runs]
    assert sum(each["mutated"] for each in numbers) >= 1_000_000
    for each in numbers:
        assert_shares(each, entered=0.5, decoded=0.1)


@pytest.mark.slow
@needs_atheris
def test_half_a_million_frames_that_follow_coverage_are_too(tmp_path):
    runs = [start_guided(tmp_path / str(seed), seed, 50_000) for seed in (1, 2)]
    numbers = [run.numbers(240) for run in runs]
    assert sum(each["mutated"] for each in numbers) >= 500_000
    for each in numbers:
        assert_shares(each, entered=0.25, decoded=0.05)


# ---- the instruments themselves


@pytest.mark.parametrize("side", ["before", "behind"])
def test_a_look_beyond_the_region_ends_the_process(side):
    beyond = {"before": -1, "behind": mmap.PAGESIZE}[side]
    code = (
        f"import sys, ctypes; sys.path.append({str(SCRIPT.parent)!r})\n"
        "from fuzz_frames import Guarded\n"
        "ground = Guarded(1)\n"
        "assert len(ctypes.string_at(ground.address, ground.tensor.numel())) == 4096\n"
        f"ctypes.string_at(ground.address + {beyond}, 1)\n"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGSEGV, ended.stderr


def test_a_case_that_breaks_the_decoder_is_saved_and_breaks_it_again(tmp_path, monkeypatch):
    sound = Decoder.decode

    def broken(self: Decoder, region: Any, header: Any, memory: memoryview) -> Any:
        if header.layout == 99:
            raise KeyError("broken")
        return sound(self, region, header, memory)

    monkeypatch.setattr(Decoder, "decode", broken)
    frame = bytearray(split(seeds()[0])[0].content)
    frame[6] = 99
    with pytest.raises(KeyError):
        Target(Journal(tmp_path / "journal"))(join([Frame(0, bytes(frame))]))
    path = save_case(tmp_path / "journal")
    monkeypatch.setattr(fuzz_frames, "bound_memory", int)  # this process keeps its limits
    with pytest.raises(KeyError):
        fuzz_frames.replay([path])
    monkeypatch.setattr(Decoder, "decode", sound)
    fuzz_frames.replay([path])


RECEIVING = {
    *("read_header", "check_metadata", "unpack", "_extension", "_unpack_node", "_build", "brief"),
    *("_tensors", "_num_values", "Layout.__init__", "Layout.build", "Layout.from_definition"),
    *("Decoder.decode", "Decoder._define", "Decoder._build", "_Placements.get", "_keep"),
    *("_Placements.forget", "Placement.__init__", "Region.views", "Region._view"),
}


def code_lines(code: types.CodeType) -> Iterator[tuple[str, int]]:
    for _, _, line in code.co_lines():
        if line is not None and line != code.co_firstlineno:
            yield code.co_filename, line
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_lines(constant)


@pytest.mark.filterwarnings("ignore:'mkldnn' is no longer used")
def test_mutants_reach_all_that_a_receiver_runs():
    functions = {f.__qualname__: f.__code__ for f in functions_under_test()}
    lines = {line for name in RECEIVING & functions.keys() for line in code_lines(functions[name])}
    files = {file for file, _ in lines}
    reached: set[tuple[str, int]] = set()

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    target, mutator, chance = Target(), Mutator(seeds(), ORIGIN), random.Random(3)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        while target.journal.numbers[0] < 8_000:
            target(mutator.case(chance))
    finally:
        sys.settrace(before)
    missed = sorted(lines - reached)
    assert len(lines) > 100 and len(missed) <= len(lines) // 50, missed


# ---- frames made of parts that are each well-formed


def with_lengths(flags: int, number: int, metadata: bytes, nbytes: int) -> bytes:
    """A frame whose header is right about its metadata and about `nbytes` of tensors."""
    start = aligned(HEADER_BYTES + len(metadata))
    total = min(start + nbytes, (1 << 32) - 1)
    fields = (0, VERSION, flags, number, 0, len(metadata), start, total, ORIGIN)
    content = header_of(fields) + metadata
    return content.ljust(start, b"\0") + b"\x7f" * min(nbytes, 4096)


def header_of(fields: tuple[int, ...]) -> bytes:
    sizes = (4, 1, 1, 2, 8, 4, 4, 4, 4)
    return b"".join(f.to_bytes(s, "little") for f, s in zip(fields, sizes, strict=True))


def nest(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


odd = st.one_of(
    st.sampled_from(VALUES),
    st.sampled_from(ODD_KEYS),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.builds(Ext, st.integers(-128, 127).filter(lambda code: code != -1), st.binary(max_size=20)),
    st.builds(nest, st.integers(0, 40)),
)
trees = st.recursive(
    odd,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
dtype_names = st.sampled_from(["int64", "bool", "float16", "complex128", "float8_e4m3fn"])
nodes = st.recursive(
    st.one_of(st.none(), st.tuples(dtype_names, st.integers(0, 4)).map(list)),
    lambda inner: st.one_of(
        st.tuples(st.integers(0, 1), st.lists(inner, max_size=4)).map(list),
        st.lists(st.tuples(st.sampled_from(KEYS), inner), max_size=4).map(
            lambda pairs: [[key for key, _ in pairs], [node for _, node in pairs]]
        ),
        st.sampled_from(ODD_NODES),
    ),
    max_leaves=8,
)
definitions = st.lists(st.tuples(st.sampled_from(KEYS), nodes), max_size=5).map(
    lambda pairs: [[key for key, _ in pairs], [node for _, node in pairs]]
)
dimensions = st.one_of(st.integers(0, 4), st.integers(-(1 << 63), (1 << 64) - 1), odd)


def raw_map(pairs: list[tuple[Any, Any]]) -> bytes:
    """A map that msgspec would not write: keys of all kinds, some of them twice."""
    pack = msgspec.msgpack.encode
    body = b"".join(pack(key) + pack(value) for key, value in pairs)
    return b"\x91" + bytes([0x80 + len(pairs)]) + body


maps = st.lists(st.tuples(odd, odd), max_size=8).map(raw_map)
metadatas = st.one_of(
    trees.map(msgspec.msgpack.encode), st.lists(trees).map(msgspec.msgpack.encode), maps
)
flags = st.sampled_from([0, DEFINES])


@fuzzed
@given(st.lists(st.tuples(flags, st.integers(0, 3), metadatas, st.integers(0, 500)), max_size=4))
def test_sound_headers_before_arbitrary_metadata_are_survived(frames):
    Target()(join([Frame(0, with_lengths(*frame)) for frame in frames]))


@fuzzed
@given(definitions, st.lists(dimensions, max_size=12), st.lists(trees, max_size=6), st.data())
def test_definitions_with_whatever_dimensions_are_survived(definition, dims, plain, data):
    nbytes = data.draw(st.integers(0, 2000))
    define = msgspec.msgpack.encode([definition, *dims, *plain])
    steady = msgspec.msgpack.encode([*dims, *plain])
    cut = data.draw(st.integers(0, len(steady)))
    frames = [(DEFINES, define), (0, steady), (0, steady[:cut]), (0, steady)]
    Target()(join([Frame(0, with_lengths(flag, 5, packed, nbytes)) for flag, packed in frames]))


@fuzzed
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_survived(data):
    Target()(data)
    Target()(join([Frame(0, data), Frame(0, with_lengths(0, 0, data, 0))]))


def test_every_truncation_of_every_frame_is_survived():
    target = Target()
    for case in seeds():
        for frame in split(case):
            for length in range(len(frame.content)):
                cut = frame.content[:length]
                told = frame.content[:16] + length.to_bytes(4, "little") + frame.content[20:]
                target(join([Frame(how, what) for how in (0, 4, 12) for what in (cut, told)]))


@fuzzed
@given(st.integers(0, 200), st.integers(0, 200), st.binary(min_size=HEADER_BYTES, max_size=200))
def test_a_header_is_read_from_no_more_memory_than_there_is(shown, length, content):
    ground = Guarded(1)
    memory = memoryview(ground.tensor.numpy())
    content = (
        bytes([0] * 4 + [VERSION]) + content[5:16] + length.to_bytes(4, "little") + content[20:]
    )
    behind = memory[len(memory) - shown :] if shown else memory[:0]
    behind[:] = content[:shown].ljust(shown, b"\0")
    with pytest.raises(FrameError):
        read_header(behind, 1 << 63, ORIGIN)


# ---- what such frames once did: each failed in its own way, and not by the frame error


def tuples(depth: int) -> bytes:
    data = b"\x90"
    for _ in range(depth):
        data = b"\x91\xc9" + len(data).to_bytes(4, "big") + b"\x02" + data
    return data


def arrays_of_absent_length(depth: int, nbytes: int) -> bytes:
    data = b"".join(b"\xdd" + (nbytes - 6 * at - 9).to_bytes(4, "big") for at in range(depth))
    return data.ljust(nbytes, b"\xc0")


ONE_TENSOR = [["a"], [["int64", 1]]]
LONG = Ext(1, b"\x7f" * 2000)  # beyond the digits that Python prints
BEYOND = 1 << 31
# metadata, where the tensors start if not right behind it, and their bytes
FORGED: dict[str, tuple[list[Any], int | None, int]] = {
    "a dimension too long to print": ([ONE_TENSOR, LONG], None, 8),
    "a rank too long to print": ([[["a"], [["int64", LONG]]], 1], None, 8),
    "a device that torch is to drop": ([[["a"], [None]], Ext(4, b"mkldnn")], None, 0),
    "no tensor, at an end beyond memory": ([[["a"], [None]], 1], BEYOND, 0),
    "an empty tensor, at an end beyond memory": ([ONE_TENSOR, 0], BEYOND, 0),
    "a tensor beyond memory": ([ONE_TENSOR, 1], BEYOND, 8),
}


@pytest.fixture
def torch_warns_again() -> Iterator[None]:
    """torch gives each of its warnings once per process, and an earlier test may have had it."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_frame_is_refused_by_the_frame_error(what, torch_warns_again):
    items, start, nbytes = FORGED[what]
    content = with_lengths(DEFINES, 5, msgspec.msgpack.encode(items), nbytes)
    if start is not None:
        lengths = start.to_bytes(4, "little") + (start + nbytes).to_bytes(4, "little")
        content = content[:20] + lengths + content[28:]
    target = Target()
    target(join([Frame(0, content)]))
    assert target.journal.numbers[1] == 1, "refused too early to say anything"
    assert target.journal.numbers[2] == 0


def test_no_depth_of_nesting_is_too_deep_to_be_refused():
    target = Target()
    for depth in range(1, 1100):  # one of them is as deep as can be decoded, and no deeper
        deep = b"\x91" * depth + b"\xc0"
        for metadata in (
            b"\x92" + msgspec.msgpack.encode(ONE_TENSOR) + deep,
            b"\x91\x92\x91\xa1a\x91\x92\xa5int64" + deep,
            b"\x91\x92" + b"\x91\x00" * 20 + deep,
        ):
            target(join([Frame(0, with_lengths(DEFINES, 5, metadata, 8))]))
    assert target.journal.numbers[1] == 3 * 1099
    assert target.journal.numbers[2] == 0


def test_large_forged_metadata_takes_neither_the_stack_nor_memory_nor_time(tmp_path):
    pack = msgspec.msgpack.encode
    many = 200_000
    cases = [
        b"\x91" * 3_000_000,
        b"\x81\xc0" * 1_000_000,
        b"\x91" + tuples(20_000),
        b"\x91" + tuples(300),
        b"\x91" + arrays_of_absent_length(900, 1 << 20),
        b"\x91" + arrays_of_absent_length(400, 3 << 20),
        pack([ONE_TENSOR, Ext(1, b"\x7f" * 3_000_000)]),
        pack([[["a"], [["int64", 64]]], *[(1 << 63) - 1] * 64]),
        pack([[[*range(many)], [None] * many], *range(many)]),
        pack([[[*range(many)], [["int64", 0]] * many]]),
        pack([[["a"], [[0, [["int64", 64]] * 3_000]]], *[1] * 64 * 3_000]),
        pack([[[*range(many)], [["int64", 1]] * many], *[0] * many]),
        pack([[["x" * 3_000_000, "y"], [None] * 3], 1, 2]),
        pack([*range(1_000_000)]),
    ]
    paths = []
    for number, metadata in enumerate(cases):
        frames = [
            Frame(how, with_lengths(flag, 5, metadata, 8)) for how in (0, 3) for flag in (1, 0)
        ]
        paths.append(tmp_path / f"{number}.hex")
        paths[-1].write_text(join(frames).hex())
    command = [sys.executable, "-P", str(SCRIPT), *map(str, paths)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-5000:]


# ---- the sender's side: whatever a caller hands over


class Anything:
    """What nobody could send."""


strange = st.one_of(
    st.builds(Anything),
    st.sampled_from([Anything, len, ..., NotImplemented, range(3), 1j, np.float32(1), np.int64(1)]),
    st.builds(OrderedDict, st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)),
    st.sets(st.integers(), max_size=3),
    st.builds(bytearray, st.binary(max_size=3)),
    st.text(st.characters(categories=["Cs"]), max_size=2),
    st.integers(1 << 64, 1 << 70),
    st.datetimes(),
    st.decimals(),
    st.builds(
        lambda kind: np.zeros(2, kind), st.sampled_from(["O", "M8[s]", ">i4", "S3", "i4,f8"])
    ),
    st.builds(
        lambda make: make(),
        st.sampled_from(
            [
                lambda: torch.eye(2).to_sparse(),
                lambda: torch.eye(2).to_sparse_csr(),
                lambda: torch.ones(2, device="meta"),
                lambda: torch.ones(2, requires_grad=True),
                lambda: torch.nn.Parameter(torch.ones(2)),
                lambda: torch.ones(1).expand(1 << 31),
                lambda: torch.ones(1).expand(1 << 40, 1 << 20),
                lambda: torch.empty((2,) * 5).permute(4, 2, 0, 1, 3),
                lambda: torch.empty((1,) * 70),
            ]
        ),
    ),
)
tensor_seeds = st.integers(0, 1 << 30)
strange_keys = st.one_of(
    st.text(st.characters(), max_size=3),
    st.integers(-(1 << 70), 1 << 70),
    st.sampled_from([None, True, 1.5, b"a", (), (1, 2), float("nan")]),
)
strange_trees = st.recursive(
    st.one_of(
        strange,
        st.integers(),
        st.builds(random_tensor, st.just(torch.int32), st.just((2,)), tensor_seeds),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(strange_keys, inner, max_size=3),
    ),
    max_leaves=6,
)
strange_mappings = st.one_of(
    st.dictionaries(strange_keys, st.one_of(strange_trees, strange), max_size=4), strange_trees
)


@fuzzed
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@given(st.lists(st.one_of(strange_mappings, mappings), max_size=4))
def test_whatever_is_handed_over_is_planned_or_refused_and_the_encoder_works_on(objects):
    wire = Wire()
    assert_arrived(block_message(), wire.pass_on(block_message()))
    for thing in objects:
        try:
            if wire.encoder.plan(thing).total < 1 << 20:
                assert_arrived(dict(thing), wire.pass_on(thing))
        except (UnsupportedTypeError, ValueError):
            pass
        assert_arrived(block_message(), wire.pass_on(block_message()))


def test_a_large_tensor_in_place_of_a_mapping_is_refused_without_going_through_it():
    wire = Wire()
    for _ in range(3):
        wire.pass_on(block_message())
    with pytest.raises(ValueError, match="not an object of type Tensor"):
        wire.encoder.plan(torch.ones(1).expand(1 << 50))  # type: ignore[arg-type]
    assert_arrived(block_message(), wire.pass_on(block_message()))


def test_a_tensor_of_a_rank_that_receivers_refuse_is_refused_at_the_sender_wherever_it_stands():
    wire = Wire()
    deep = torch.ones((1,) * 65)
    for mapping in ({"x": deep}, {"x": [deep]}, {"x": torch.nn.Parameter(deep)}):
        with pytest.raises(UnsupportedTypeError, match=r"x.*: tensor of rank 65, beyond 64"):
            wire.encoder.plan(mapping)
    mapping = {"x": torch.ones((1,) * 64)}
    for _ in range(3):
        assert_arrived(mapping, wire.pass_on(mapping))
