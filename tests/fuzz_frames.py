"""The decoder under fire: what one input is, what must hold of it, and how millions of them run.

    python -P tests/fuzz_frames.py HEXFILE...                   inputs again, from their hex
    python -P tests/fuzz_frames.py --random SEED N JOURNAL      at least N mutated frames
    python -P tests/fuzz_frames.py --guided JOURNAL ARGS...     atheris; ARGS are libFuzzer's

An input is a case, frames that reach one decoder one after the other, in one region of memory:

    +-----+--------+-------+-----+--------+-------+
    |  1  |   4    |   n   |  1  |   4    |   n   | ...
    | how | length | frame | how | length | frame |
    +-----+--------+-------+-----+--------+-------+

`how`: bits 0-1: 3 keeps the frame's checksum, else it is set right, or hardly any would get beyond
it; bits 2-3: how much memory the decoder is shown; bit 4: decoded in inference mode; bit 7: nobody
mutated this one. Whatever is cut off or too long stands for what is there, so that every string of
bytes is a case.

The region lies between pages that nobody may touch: to read or write beyond it ends the process.
The journal is a file that says, also after such an end, how far the process came and with what:

    8 bytes each: mutated frames, those beyond the header, those decoded, the slowest case in ns,
    growth of resident memory in KiB, length of the case at hand; then that case
"""

import ctypes
import mmap
import pickle
import random
import resource
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onecast.comm import FrameError
from onecast.comm.frame import Decoder, Encoder, write
from onecast.comm.header import (
    ALIGNMENT,
    HEADER_BYTES,
    MAX_LAYOUTS,
    check_metadata,
    make_origin,
    read_header,
)
from onecast.comm.region import Region

sys.path.append(str(Path(__file__).parent))  # python -P leaves the script's folder out
from frame_mutations import Frame, Mutator, join, split

ORIGIN = make_origin(sender=3, channel=7)
REGION_PAGES = (1, 16, 1024)  # a case lies in the smallest that holds its frames
MAX_FRAMES = 128  # of a case; the others are left out
MEMORY_BYTES = 512 << 20  # of address space that decoding may take, with all that it keeps
MAX_JOURNALLED = 1 << 24

# A date is nothing that a frame carries, but msgpack has them and a forged frame may.
PERMITTED = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, datetime)


class Journal:
    """Counts and the case at hand, in a file that survives the process."""

    NUMBERS = ("mutated", "entered", "decoded", "slowest_ns", "grown_kib", "length")

    def __init__(self, path: Path | None = None) -> None:
        size = mmap.PAGESIZE + MAX_JOURNALLED
        if path is None:
            self._memory = mmap.mmap(-1, size)
        else:
            path.write_bytes(b"")
            with path.open("r+b") as file:
                file.truncate(size)  # sparse: what is never written takes no room
                self._memory = mmap.mmap(file.fileno(), size)
        self.numbers = memoryview(self._memory)[: 8 * len(self.NUMBERS)].cast("Q")

    def begin(self, case: bytes) -> None:
        case = case[:MAX_JOURNALLED]
        self.numbers[5] = len(case)
        self._memory[mmap.PAGESIZE : mmap.PAGESIZE + len(case)] = case

    @classmethod
    def read(cls, path: Path) -> tuple[dict[str, int], bytes]:
        """The numbers by name, and the case at hand."""
        with path.open("rb") as file:
            numbers = np.frombuffer(file.read(8 * len(cls.NUMBERS)), np.uint64)
            file.seek(mmap.PAGESIZE)
            case = file.read(int(numbers[5]))
        return dict(zip(cls.NUMBERS, map(int, numbers), strict=True)), case


class Guarded:
    """Memory of whole pages between two pages that nobody may touch."""

    def __init__(self, pages: int) -> None:
        nbytes = pages * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, nbytes + 2 * mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (address, address + mmap.PAGESIZE + nbytes):
            if libc.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) != 0:  # PROT_NONE
                raise OSError(ctypes.get_errno(), "mprotect")
        self.address = address + mmap.PAGESIZE
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))
        self.tensor = torch.from_numpy(array)


class Target:
    """Calls with a case return, or raise AssertionError or what the decoder should not raise."""

    def __init__(self, journal: Journal | None = None) -> None:
        self.journal = journal or Journal()
        self._grounds: dict[int, Guarded] = {}
        self._sound = sound_frames({"n": 5, "ids": torch.arange(4), "name": "x"}, MAX_LAYOUTS - 1)

    def __call__(self, case: bytes) -> None:
        start_ns = time.perf_counter_ns()
        self.journal.begin(case)
        frames = split(case)[:MAX_FRAMES]
        ground = self._ground(max((len(frame.content) for frame in frames), default=0))
        region = Region(ground.tensor)
        assert region.memory is not None
        decoder = Decoder()
        self._receive_sound(decoder, region, region.memory, self._sound[0])
        known = decoder._layouts[MAX_LAYOUTS - 1]
        for frame in frames:
            self._receive(decoder, region, region.memory, ground.address, frame)
        if decoder._layouts[MAX_LAYOUTS - 1] is known:
            self._receive_sound(decoder, region, region.memory, self._sound[1])
        for frame_bytes in self._sound:
            self._receive_sound(decoder, region, region.memory, frame_bytes)
        numbers = self.journal.numbers
        numbers[3] = max(numbers[3], time.perf_counter_ns() - start_ns)

    def _ground(self, nbytes: int) -> Guarded:
        fitting = [pages for pages in REGION_PAGES if pages * mmap.PAGESIZE >= nbytes]
        pages = fitting[0] if fitting else REGION_PAGES[-1]
        if pages not in self._grounds:
            self._grounds[pages] = Guarded(pages)
        return self._grounds[pages]

    def _receive(
        self, decoder: Decoder, region: Region, memory: memoryview, address: int, frame: Frame
    ) -> None:
        numbers = self.journal.numbers
        content = frame.content[: region.nbytes]
        if frame.how & 3 != 3:
            content = with_checksum(content)
        memory[: len(content)] = content
        if not frame.is_sound:
            numbers[0] += 1
        known = decoder._layouts.copy()
        # What a channel has at hand: all its memory or the frame alone, at once or its front first.
        shown = memory[: len(content)] if frame.how & 4 else memory
        front = shown[: HEADER_BYTES + 8] if frame.how & 8 else shown
        again = None
        try:
            again = decoder.repeat(region, shown, 0, ORIGIN)
            header = read_header(front, 0, ORIGIN)
            if front is not shown:
                check_metadata(header, shown)
            if not frame.is_sound:
                numbers[1] += 1
            with torch.inference_mode(frame.how & 16 != 0):
                mapping = decoder.decode(region, header, shown)
        except FrameError:
            assert again is None, "a frame that was refused was taken for a repeated one"
            assert decoder._layouts == known, "a frame that was refused changed the layouts"
            return
        if not frame.is_sound:
            numbers[2] += 1
        if again is not None:
            assert again[:2] == (header.total, HEADER_BYTES + header.metadata_length)
            assert same_parts(again[2], mapping), "a repeated frame came out otherwise"
        assert header.total <= region.nbytes, "the frame ends beyond the region"
        assert set(decoder._layouts) <= {*known, header.layout}
        spans = sorted(read_all(mapping))
        ends = [address + header.start, *(end for _, end in spans)]
        starts = [*(start for start, _ in spans), address + header.total]
        assert all(end <= start for end, start in zip(ends, starts, strict=True)), "tensors overlap"

    def _receive_sound(
        self, decoder: Decoder, region: Region, memory: memoryview, frame: bytes
    ) -> None:
        """A decoder that has seen whatever it has seen still decodes a sound frame."""
        memory[: len(frame)] = frame
        mapping = decoder.decode(region, read_header(memory, 0, ORIGIN), memory)
        assert [*mapping] == ["n", "ids", "name"] and (mapping["n"], mapping["name"]) == (5, "x")
        assert mapping["ids"].tolist() == [0, 1, 2, 3]


def same_parts(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether two flat mappings hold the same tensors, at the same places, and the same values."""
    return [*one] == [*other] and all(
        (a.data_ptr(), a.shape, a.dtype) == (b.data_ptr(), b.shape, b.dtype)
        if isinstance(a, torch.Tensor)
        else pickle.dumps(a) == pickle.dumps(b)  # NaNs too, and numbers too long to print
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def with_checksum(frame: bytes) -> bytes:
    """The frame with its checksum set right, as far as it goes."""
    end = HEADER_BYTES + int.from_bytes(frame[16:20], "little")
    return zlib.crc32(frame[4:end]).to_bytes(4, "little") + frame[4:]


def read_all(value: Any) -> Iterator[tuple[int, int]]:
    """Read and write every byte of every tensor in a mapping; yields where each lies."""
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous() and type(value) is torch.Tensor
        if value.numel():
            address, nbytes = value.data_ptr(), value.nbytes
            assert address % ALIGNMENT == 0
            ctypes.memmove(address, ctypes.string_at(address, nbytes), nbytes)
            yield address, address + nbytes
    elif isinstance(value, dict):
        for item in value.values():
            yield from read_all(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from read_all(item)
    else:
        assert isinstance(value, PERMITTED), f"a value of type {type(value)}"


def sound_frames(mapping: dict[Any, Any], number: int) -> list[bytes]:
    """A frame that defines its layout as `number`, and one that relies on it."""
    encoder = Encoder()
    region = Region(torch.zeros(1 << 14, dtype=torch.uint8))
    assert region.memory is not None
    frames = []
    for _ in range(2):
        message = encoder.plan(mapping)
        message.layout.number = number
        write(message, 0, ORIGIN, region)
        encoder.commit(message)
        frames.append(bytes(region.memory[: message.total]))
    return frames


def seeds() -> list[bytes]:
    """Cases that nobody mutated: real frames, with all that frames can carry."""
    mappings: list[dict[Any, Any]] = [
        {
            "step": 3,
            "text": "größer",
            "big": 1 << 80,
            "ids": [1, 2, 3],
            "pair": (torch.ones(2, 3), [torch.arange(4)]),
            "dtype": torch.float16,
            "device": torch.device("cuda:1"),
            "inner": {"a": torch.zeros(3, dtype=torch.int32), 7: None},
            "swap_in": torch.arange(16).reshape(8, 2),
        },
        {"swap_in": torch.arange(16).reshape(8, 2), "copy": torch.arange(8).reshape(4, 2)},
        {"a": torch.ones(2, 0, 3), "b": torch.tensor(True), "c": (1.5, b"x", (None, -1)), 5: "y"},
        {"deep": [[[{"x": [(torch.ones(1, dtype=torch.bfloat16), "z")]}]]], "n": {}},
        {},
    ]
    cases = []
    for number, mapping in enumerate(mappings):
        define, steady = sound_frames(mapping, number % MAX_LAYOUTS)
        cases.append(join([Frame(0x80, define), Frame(0x80, steady), Frame(0x80, steady)]))
    return cases


# ---- processes


def bound_memory() -> None:
    """From here on this process gets MEMORY_BYTES of addresses and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE >> 10


def replay(paths: list[Path]) -> None:
    target = Target()
    bound_memory()
    for path in paths:
        target(bytes.fromhex(path.read_text()))


def run_random(seed: int, frames: int, journal: Journal) -> None:
    """Cases at random until `frames` frames were mutated; resident memory must not grow."""
    target = Target(journal)
    mutator = Mutator(seeds(), ORIGIN)
    chance = random.Random(seed)
    bound_memory()
    settled: int | None = None
    while journal.numbers[0] < frames:
        target(mutator.case(chance))
        if settled is None and journal.numbers[0] >= frames // 10:
            settled = resident_kib()
    journal.numbers[4] = max(resident_kib() - (settled or 0), 0)


def run_guided(arguments: list[str], journal: Journal) -> None:
    """Cases by coverage, until libFuzzer ends the process."""
    import atheris

    for function in functions_under_test():
        atheris.instrument_func(function)
    target = Target(journal)
    mutator = Mutator(seeds(), ORIGIN)

    def mutate(case: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.2:
            return bytes(atheris.Mutate(case, len(case)))
        return mutator.mutated(case, chance)[:max_size]

    atheris.Setup([sys.argv[0], *arguments], target, custom_mutator=mutate)
    bound_memory()
    atheris.Fuzz()


def functions_under_test() -> Iterator[Callable[..., Any]]:
    """What the receiver's side runs of onecast.comm, to be instrumented in place."""
    names = ("header", "layout", "values", "frame", "region")
    for module in (sys.modules[f"onecast.comm.{name}"] for name in names):
        owners = [module, *(v for v in vars(module).values() if isinstance(v, type))]
        for owner in owners:
            for value in vars(owner).values():
                function = getattr(value, "__func__", value)  # a classmethod's
                if getattr(function, "__module__", None) == module.__name__ and hasattr(
                    function, "__code__"
                ):
                    yield function


def main(arguments: list[str]) -> None:
    warnings.simplefilter("error")
    if arguments[0] == "--random":
        run_random(int(arguments[1]), int(arguments[2]), Journal(Path(arguments[3])))
    elif arguments[0] == "--guided":
        run_guided(arguments[2:], Journal(Path(arguments[1])))
    else:
        replay([*map(Path, arguments)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
