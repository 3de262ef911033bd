"""Bytes and number of broadcasts, varied independently of each other: what is measured.

Owns the points and how each is sent over Gloo from one rank to the other; the real protocols are
measured between them, in the same turns. What the measurements mean is `e2e_cost`'s.

    in turn    k broadcasts of b bytes; each is awaited before the next begins, as what says how
               long or of which shape the next is must be
    at once    k broadcasts of b bytes, all under way at the same time, as prior protocols send the
               tensors of a step
    pickled    the same, and before and after it the metadata of t tensors of 64 bytes is pickled,
               taken out of the first broadcast, unpickled, and memory for the tensors found
    framed     the same with a frame of t such tensors, copied in, and views of it taken out

One way, as `exchanges` has it: from before the first of it until the receiver has the mapping.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from onecast.comm import open_channel
from onecast.comm.channel import TRANSPORTS
from onecast.comm.frame import Decoder, Encoder, write
from onecast.comm.header import read_header
from onecast.comm.prior_art import open_prior_channel
from onecast.comm.prior_mapping import divide, load, unite
from onecast.comm.region import Region
from onecast.comm.testing import run_ranks

from .e2e_channels import CHANNELS, TIMEOUT_S
from .exchanges import Exchanges, Stamps, Turn
from .method import ChannelMethod, Method
from .shared_page import Gate
from .workloads import make_workload

RANKS = 2
WORKLOADS = ("W1", "W2", "batch 8")
PICKLED, FRAMED = "pickled", "framed"

_CPU = torch.device("cpu")
_UNTIMED = 12
_BLOCK, _BLOCK_WARMUP = 5, 2  # timed exchanges of a method in a row; untimed before them
_LENGTH_BYTES = 8
_TENSOR = (8, torch.int64)
_IN_TURN = [(k, b) for k in (1, 2, 4, 8) for b in (64, 2 << 10, 16 << 10, 64 << 10)]
_IN_TURN += [(1, 256 << 10), (2, 256 << 10), (1, 1 << 20)]
_AT_ONCE = [(k, b) for k in (2, 4, 8, 12) for b in (64, 2 << 10, 16 << 10)]
_ENCODED = [(k, b, t) for k, b in ((1, 16 << 10), (4, 4 << 10)) for t in (1, 4, 8, 16)]


class Point(NamedTuple):
    """What is sent: `rounds` is the number of broadcasts, or 1 where all are under way at once."""

    broadcasts: int
    rounds: int
    each_bytes: int
    pickled: int = 0  # tensors
    framed: int = 0

    @property
    def name(self) -> str:
        how = "" if self.broadcasts == 1 else " at once" if self.rounds == 1 else " in turn"
        size = f"{self.each_bytes} B" if self.each_bytes < 1024 else f"{self.each_bytes >> 10} KiB"
        parts = [f"{self.broadcasts}{how}, {size}"]
        parts += [f"{PICKLED} {self.pickled}"] * bool(self.pickled)
        parts += [f"{FRAMED} {self.framed}"] * bool(self.framed)
        return ", ".join(parts)


POINTS = (
    *(Point(k, k, b) for k, b in _IN_TURN),
    *(Point(k, 1, b) for k, b in _AT_ONCE),
    *(Point(k, 1, b, pickled=t) for k, b, t in _ENCODED),
    *(Point(k, 1, b, framed=t) for k, b, t in _ENCODED),
)


# Kept from the fit, to see how the model does where it was not fitted.
HELD_OUT = frozenset(random.Random(2).sample(POINTS, len(POINTS) // 4))


class ProtocolRun(NamedTuple):
    """A real protocol with a real step."""

    channel: str
    workload: str

    @property
    def name(self) -> str:
        return f"{self.workload}, {self.channel}"


class Message(NamedTuple):
    """What one message of a protocol is made of."""

    broadcasts: float
    nbytes: int
    metadata_bytes: int
    tensors: int


class Launch(NamedTuple):
    """Microseconds one way by name of a point or a protocol's run, and the protocols' messages."""

    one_way_us: dict[str, list[float]]
    messages: dict[str, Message]


RUNS = tuple(ProtocolRun(channel, workload) for workload in WORKLOADS for channel in CHANNELS)


def launch(steps: int, timeout_s: float = 600.0) -> Launch:
    """`steps` timed exchanges of every point and protocol, which take turns."""
    source, receiver = run_ranks(_measure, RANKS, steps, timeout_s=timeout_s)
    one_way = {}
    for name, sent in source[0].items():
        ends = receiver[0][name].ends
        one_way[name] = [(e - b) / 1e3 for b, e in zip(sent.begins, ends, strict=True)]
    return Launch(one_way, source[1])


def workload(name: str) -> dict[str, Any]:
    """One of `WORKLOADS`; "batch 8" is a decode step of the engine, block lists empty."""
    if name != "batch 8":
        return make_workload(name)
    empty = torch.empty(0, 2, dtype=torch.int64)
    return {
        "step": 1,
        "swaps_awaited": -1,
        **dict.fromkeys(("swap_out", "swap_in", "copy"), empty),
        **dict.fromkeys(("input_ids", "positions", "slot_mapping"), torch.arange(8)),
        "query_start_loc": torch.arange(9, dtype=torch.int32),
        "seq_lens": torch.arange(8, dtype=torch.int32),
        "block_tables": torch.zeros(8, 8, dtype=torch.int32),
        "logits_indices": torch.arange(8),
    }


def _measure(rank: int, steps: int) -> tuple[dict[str, Stamps], dict[str, Message]]:
    methods: dict[str, Method] = {point.name: _Shape(point) for point in POINTS}
    for run in RUNS:
        methods[run.name] = _Protocol(run)
    exchanges = Exchanges(rank, Gate(), methods, {}, _UNTIMED)
    before = {run.name: (m.messages, m.broadcasts) for run in RUNS if (m := methods[run.name])}
    stamps = exchanges.run(_turns(list(methods), steps))
    messages = {}
    for run in RUNS if rank == 0 else ():
        method = methods[run.name]
        sent, broadcasts = before[run.name]
        per_message = (method.broadcasts - broadcasts) / (method.messages - sent)
        values = workload(run.workload).values()
        tensors = sum(isinstance(value, torch.Tensor) for value in values)
        messages[run.name] = Message(per_message, method.nbytes, method.metadata_bytes, tensors)
    for method in methods.values():
        method.close()
    return stamps, messages


def _turns(methods: Sequence[str], steps: int) -> Iterator[Turn]:
    """Short blocks, often: a slow spell of the machine must not meet all of one method."""
    chance = random.Random(0)  # the same on both ranks
    for first in range(0, steps, _BLOCK):
        size = min(_BLOCK, steps - first)
        for method in chance.sample(methods, len(methods)):
            for number in range(-_BLOCK_WARMUP, size):
                yield Turn(method, number >= 0, number == 0, number == size - 1)


class _Protocol(ChannelMethod):
    """A channel of its own, for a step of its own."""

    def __init__(self, run: ProtocolRun) -> None:
        channel = (
            open_channel(transport=run.channel, timeout_s=TIMEOUT_S)
            if run.channel in TRANSPORTS
            else open_prior_channel(run.channel, timeout_s=TIMEOUT_S)
        )
        super().__init__(run.name, channel)
        self._workload = run.workload

    def prepare(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        return workload(self._workload)


class _Shape(Method):
    """A point, over the world's own group."""

    def __init__(self, point: Point) -> None:
        self.name = point.name
        self._point = point
        self._buffers = [
            torch.zeros(point.each_bytes, dtype=torch.uint8) for _ in range(point.broadcasts)
        ]
        first = self._buffers[0]
        self._codec = _Pickled(first) if point.pickled else _Framed(first) if point.framed else None

    def prepare(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        count, (length, dtype) = self._point.pickled + self._point.framed, _TENSOR
        tensors = {f"tensor_{i}": torch.full((length,), i, dtype=dtype) for i in range(count)}
        return {"step": 1, **tensors}

    def send(self, mapping: dict[str, Any]) -> None:
        if self._codec is not None:
            self._codec.encode(mapping)
        self._broadcast()

    def receive(self, timeout_s: float | None = None) -> Mapping[str, Any] | None:
        self._broadcast()
        return None if self._codec is None else self._codec.decode()

    def mapping(self, received: Any) -> Mapping[str, Any] | None:
        return received if self._point.framed else None  # tensors of the other are not sent

    def _broadcast(self) -> None:
        if self._point.rounds > 1:
            for buffer in self._buffers:
                dist.broadcast(buffer, src=0)
            return
        works = [dist.broadcast(buffer, src=0, async_op=True) for buffer in self._buffers]
        for work in works:
            work.wait()


class _Pickled:
    """Metadata as prior protocols have it: its length, then a pickle."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._memory = memoryview(buffer.numpy())  # type: ignore[arg-type]

    def encode(self, mapping: dict[str, Any]) -> None:
        _, pickled, _ = divide(mapping, _CPU)
        end = _LENGTH_BYTES + len(pickled)
        self._memory[:_LENGTH_BYTES] = len(pickled).to_bytes(_LENGTH_BYTES, "little")
        self._memory[_LENGTH_BYTES:end] = pickled

    def decode(self) -> dict[Any, Any]:
        length = int.from_bytes(self._memory[:_LENGTH_BYTES], "little")
        structure = load(self._memory[_LENGTH_BYTES : _LENGTH_BYTES + length])
        assert structure is not None
        return unite(structure, lambda mark: torch.empty(mark.size, dtype=mark.dtype))


class _Framed:
    """A frame, as the channels of onecast have it."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._region = Region(buffer)
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._sequence = 0

    def encode(self, mapping: dict[str, Any]) -> None:
        message = self._encoder.plan(mapping)
        write(message, self._sequence, 0, self._region)
        self._encoder.commit(message)
        self._sequence += 1

    def decode(self) -> dict[Any, Any]:
        region, memory = self._region, self._region.memory
        assert memory is not None
        repeated = self._decoder.repeat(region, memory, self._sequence, 0)
        if repeated is None:
            header = read_header(memory, self._sequence, 0)
            mapping = self._decoder.decode(region, header, memory)
        else:
            mapping = repeated[2]
        self._sequence += 1
        return mapping
