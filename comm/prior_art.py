"""The protocols that a frame replaces, as channels: written from their description, to be measured.

Owns the order of broadcasts: the pickled metadata in one or two, in the way of `prior_metadata`,
then one per tensor that is not empty, all of these under way at once, as in vLLM. Nothing in
onecast needs them.

    two-broadcasts   2 + k broadcasts for k tensors
    fixed-metadata   1 + k; refuses metadata beyond a size that is fixed when the channel opens
    cached-size      1 + k; 2 + k for metadata longer than any before. The size is cached per call
                     site, and a channel is one: programs with several open several.

Received tensors are the receiver's own and outlive their frame; the source gets back what it sent.
The time-out bounds waits in host memory: tensors on a GPU, and over an NCCL group the metadata too,
are bounded by the process group's own.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .channel import DEFAULT_TIMEOUT_S, Channel, Frame
from .endpoint import Endpoint, meeting_place
from .errors import Closed, ReceiveTimeout
from .peers import Peers
from .prior_exchange import Broadcasts, Exchange
from .prior_mapping import GOODBYE, TensorMark, divide, load, unite, wire
from .prior_metadata import (
    PREFIX_BYTES,
    CachedSize,
    FixedMetadata,
    MetadataProtocol,
    TwoBroadcasts,
)
from .probe import Probe
from .staging import frame_device

PROTOCOLS = ("two-broadcasts", "fixed-metadata", "cached-size")
DEFAULT_METADATA_LIMIT = 8192


def open_prior_channel(
    name: str,
    group: dist.ProcessGroup | None = None,
    *,
    src: int = 0,
    device: torch.device | str | None = None,
    probe: Probe | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    metadata_limit: int = DEFAULT_METADATA_LIMIT,
) -> Channel:
    """Open a channel of one of `PROTOCOLS`; like `open_channel` a collective call.

    `metadata_limit` is the most that "fixed-metadata" can carry, in bytes of pickled metadata.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"the protocol is {name!r}; there are: {', '.join(PROTOCOLS)}")
    metadata: MetadataProtocol
    if name == "two-broadcasts":
        metadata = TwoBroadcasts()
    elif name == "fixed-metadata":
        metadata = FixedMetadata(metadata_limit)
    else:
        metadata = CachedSize()
    return PriorChannel(name, metadata, group, src, device, probe, timeout_s, metadata_limit)


class _Arrival(NamedTuple):
    """A message that is here."""

    mapping: dict[Any, Any]
    nbytes: int
    metadata_bytes: int
    broadcasts: int
    decode_start_ns: int


class PriorChannel(Endpoint):
    """See `Channel`, and the module. Closing is a collective call, as for a process group's.

    To a probe "wait" is until the metadata is here, "decode" all after that: the tensors' own
    broadcasts begin only when the metadata has been unpickled.
    """

    def __init__(
        self,
        name: str,
        metadata: MetadataProtocol,
        group: dist.ProcessGroup | None,
        src: int,
        device: torch.device | str | None,
        probe: Probe | None,
        timeout_s: float,
        metadata_limit: int,
    ) -> None:
        super().__init__(group, src, probe, timeout_s, poison=False)
        self.name = name
        self._metadata = metadata
        self._device = frame_device(self._group, device)
        self._metadata_device = meeting_place(self._group)
        agreement = {
            "src": src,
            "protocol": PROTOCOLS.index(name),
            "metadata_limit": metadata_limit,
        }
        peers = Peers.exchange(self._group, self._metadata_device, agreement)
        self._wire = Broadcasts(self._group, src, peers)
        self._arriving: Exchange[_Arrival | None] | None = None  # kept over a time-out

    def publish(self, mapping: Mapping[Any, Any]) -> Frame:
        """Send `mapping`. Raises what `Channel` says, and ValueError for metadata that is too long.

        PublishTimeout ends the channel: part of the message may have arrived.
        """
        if self._refuses or not self.is_source:
            self._refuse()
        encode_start_ns = time.perf_counter_ns()
        if self._frame is not None:
            self._frame.release()
        structure, pickled, tensors = divide(mapping, self._device)
        messages = self._metadata.outgoing(pickled)
        publish_start_ns = time.perf_counter_ns()
        before = self.broadcasts
        try:
            self._send(messages, tensors)
        except BaseException as error:
            self._break(error)
            raise
        supply = iter(tensors)
        frame = self._frame = Frame(
            self.sequence,
            sum(map(len, messages)) + sum(tensor.nbytes for tensor in tensors),
            PREFIX_BYTES + len(pickled),
            None,
            lambda: unite(structure, lambda mark: next(supply)),
            None,
        )
        self.sequence += 1
        if self._probe is not None:
            times_ns = encode_start_ns, publish_start_ns, time.perf_counter_ns()
            self._tell(self._probe.published, frame, self.broadcasts - before, *times_ns)
        return frame

    def receive(self, timeout_s: float | None = None) -> Frame:
        if self._refuses or self.is_source:
            self._refuse()
        limit_s = self._wait_limit_s(timeout_s)
        wait_start_ns = time.perf_counter_ns()
        if self._frame is not None:
            self._frame.release()
        try:
            arrival = self._next(limit_s)
        except ReceiveTimeout:
            raise
        except BaseException as error:
            self._break(error)
            raise
        if arrival is None:
            self._closed = self._refuses = True
            raise Closed(f"rank {self.src} closed the channel after {self.sequence} frames")
        mapping, nbytes, metadata_bytes, broadcasts, decode_start_ns = arrival
        frame = self._frame = Frame(self.sequence, nbytes, metadata_bytes, mapping, None, None)
        self.sequence += 1
        if self._probe is not None:
            times_ns = wait_start_ns, decode_start_ns, time.perf_counter_ns()
            self._tell(self._probe.received, frame, broadcasts, *times_ns)
        return frame

    def close(self) -> None:
        if self._closed:
            return
        self._closed = self._refuses = True
        if self._frame is not None:
            self._frame.release()
        if self._error is not None:
            return  # out of step: a goodbye would not be understood
        if self.is_source:
            self._send(self._metadata.outgoing(GOODBYE), [])
        else:
            deadline = time.monotonic() + self._timeout_s
            while self._next(max(deadline - time.monotonic(), 0)) is not None:
                self.sequence += 1

    def _send(self, messages: list[bytearray], tensors: list[torch.Tensor]) -> None:
        awaited = f"the other ranks to take frame {self.sequence}"
        self._wire.carry_on(self._depart(messages, tensors), self._timeout_s, awaited)

    def _next(self, timeout_s: float) -> _Arrival | None:
        """The next message, None for the goodbye; a call after ReceiveTimeout goes on with it."""
        if self._arriving is None:
            self._arriving = self._arrive()
        awaited = f"frame {self.sequence} from rank {self.src}"
        arrival = self._wire.carry_on(self._arriving, timeout_s, awaited)
        self._arriving = None
        return arrival

    def _depart(self, messages: list[bytearray], tensors: list[torch.Tensor]) -> Exchange[None]:
        for message in messages:
            buffer = torch.frombuffer(message, dtype=torch.uint8).to(self._metadata_device)
            yield [self._begin(buffer)]
        yield from self._broadcast(tensors)

    def _arrive(self) -> Exchange[_Arrival | None]:
        before = self.broadcasts
        nbytes = 0
        incoming = self._metadata.incoming()
        size = next(incoming)
        while True:
            buffer = torch.empty(size, dtype=torch.uint8, device=self._metadata_device)
            yield [self._begin(buffer)]
            nbytes += size
            try:
                size = incoming.send(buffer.cpu().numpy().data)
            except StopIteration as over:
                pickled: memoryview = over.value
                break
        decode_start_ns = time.perf_counter_ns()
        structure = load(pickled)
        if structure is None:
            return None
        tensors: list[torch.Tensor] = []

        def allocate(mark: TensorMark) -> torch.Tensor:
            tensors.append(torch.empty(mark.size, dtype=mark.dtype, device=self._device))
            return tensors[-1]

        mapping = unite(structure, allocate)
        yield from self._broadcast(tensors)
        nbytes += sum(tensor.nbytes for tensor in tensors)
        metadata_bytes = PREFIX_BYTES + len(pickled)
        count = self.broadcasts - before
        return _Arrival(mapping, nbytes, metadata_bytes, count, decode_start_ns)

    def _begin(self, tensor: torch.Tensor) -> dist.Work:
        self.broadcasts += 1
        return self._wire.begin(tensor)

    def _broadcast(self, tensors: list[torch.Tensor]) -> Exchange[None]:
        works = [self._begin(wire(tensor)) for tensor in tensors if tensor.numel()]
        if self._device.type == "cpu":
            yield works
        else:
            for work in works:
                work.wait()  # orders the current stream; a time-out given to NCCL would abort it
