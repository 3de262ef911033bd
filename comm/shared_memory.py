"""A channel through memory that all ranks of a host share: frames are encoded where they are read.

Owns the opening handshake, and the order of encoding, publishing, waiting and decoding. The ring
itself, and when to sleep, are its neighbours' (`ring_writer`, `ring_reader`, `waiting`).

The source writes each frame straight into a slot of the ring, readers get views of that slot, which
stays theirs until they release the frame; so the source may be some frames ahead of them. No
collective is called after opening. A receiver that closes is not waited for any more; the source
that closes lets all receivers read what it published.
"""

import secrets
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist

from .channel import DEFAULT_TIMEOUT_S, Frame
from .endpoint import Endpoint, at_end_of, meeting_place
from .errors import CannotShare, Closed, FrameError, PeerLost, PublishTimeout, ReceiveTimeout
from .frame import Decoder, Encoder, Message, rebuild, write
from .header import HEADER_BYTES, VERSION, make_origin, read_header
from .mirror import Mirror, make_mirror
from .peers import Peers
from .probe import Probe
from .region import Region
from .ring_reader import RingReader
from .ring_writer import RingWriter
from .sharing import gather_reasons, share_segment
from .staging import frame_device
from .waiting import DEFAULT_SPIN, Cadence

_SLICE_S = 0.2  # the longest wait for a GPU between two looks at the peers


class Outlet(Protocol):
    """What a source writes its frames to."""

    def reserve(self, nbytes: int) -> Region:
        """Memory for the next frame."""

    def publish(self) -> None:
        """What was written there is the next frame."""

    def look(self) -> None:
        """Raise PeerLost if a rank is known to be gone."""

    def close(self) -> None:
        """There are no more."""

    def abandon(self, lost: int | None) -> None:
        """There are no more, as this rank is lost."""


class Inlet(Protocol):
    """What a receiver reads them from."""

    def next(self, timeout_s: float) -> Region:
        """Where the next frame lies; the same until `release`."""

    def release(self) -> None:
        """It was read."""

    def look(self) -> None:
        """Raise PeerLost if a rank is known to be gone."""

    def leave(self) -> None:
        """No more are read."""


class SharedMemoryChannel(Endpoint):
    """See `Channel`. Opening is a collective call; `spin` is what `Cadence` takes."""

    name = "shared-memory"
    _peers_type: ClassVar[type[Peers]] = Peers
    _writer: Outlet
    _reader: Inlet
    _departure: "weakref.finalize[..., SharedMemoryChannel] | None" = None

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        src: int = 0,
        device: torch.device | str | None = None,
        probe: Probe | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        poison: bool = False,
        spin: float = DEFAULT_SPIN,
    ) -> None:
        super().__init__(group, src, probe, timeout_s, poison)
        Cadence(spin)  # refuses a share that cannot be before any rank has opened anything
        place = frame_device(self._group, device)
        agreement = {"src": src, "frame version": VERSION}
        told = {"channel": secrets.randbits(62)}
        meet = meeting_place(self._group)
        peers = self._peers = self._peers_type.exchange(self._group, meet, agreement, told)
        self._origin = make_origin(src, peers.by_rank[src].told["channel"])
        self._mirror = make_mirror(place, poison)
        self._unread: Region | None = None  # a released slot that is still being copied
        self._lent: Region | None = None  # where the tensors of the last frame lie
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._connect(spin)

    def _connect(self, spin: float) -> None:
        """Come to share a ring; raises CannotShare, on all ranks."""
        peers = self._peers
        if not peers.on_one_host:
            hosts = {rank: peer.host for rank, peer in peers.by_rank.items()}
            raise CannotShare(f"the ranks are on different hosts: {hosts}")
        readers = [rank for rank in peers.ranks if rank != self.src]
        segment = share_segment(self._group, peers, self.src, len(readers))
        reason = None
        leave: Callable[[], None]
        try:
            if self.is_source:
                writer = RingWriter(segment, readers, peers, self._timeout_s, self._mirror)
                self._writer, leave = writer, partial(writer.abandon, self.src)
            else:
                reader = RingReader(segment, readers, self.src, peers, spin, self._mirror)
                self._reader, leave = reader, reader.leave
        except OSError as error:  # of address space or descriptors
            reason = f"cannot map the ring: {error}"
        failed = gather_reasons(self._group, peers, reason)
        if failed:
            raise CannotShare("the ranks cannot share memory: " + "; ".join(failed))
        # When this object goes without having closed: the others are told, or not held up.
        self._departure = at_end_of(self, leave)

    def publish(self, mapping: Mapping[Any, Any]) -> Frame:
        if self._refuses or not self.is_source:
            self._refuse()
        probe = self._probe
        encode_start_ns = time.perf_counter_ns() if probe is not None else 0
        if self._frame is not None:
            self._frame.release()
        lent = self._lent
        message = self._encoder.plan(mapping)
        mirror = self._mirror
        try:
            region = self._writer.reserve(message.total)
            if mirror is not None and not mirror.is_read(region):
                self._await_read(mirror, region, self._timeout_s, self._writer.look)
        except (PeerLost, Closed) as error:
            self._end(error)
            raise
        if region is lent:
            region.take_back()
        write(message, self.sequence, self._origin, region)
        publish_start_ns = time.perf_counter_ns() if probe is not None else 0
        try:
            self._encoder.commit(message)
            self._writer.publish()
        except BaseException as error:
            self._end(error)
            raise
        self._lent = region
        # Not before: to look at the views takes a fifth of the time until the frame is out.
        if lent is not None:
            lent.take_back()
        frame = self._frame = Frame(
            self.sequence,
            message.total,
            message.metadata_bytes,
            None,
            lambda: _rebuild(message, region, mirror),
            self._poison_copy if self._poison else None,
        )
        self.sequence += 1
        if probe is not None:
            end_ns = time.perf_counter_ns()
            self._tell(probe.published, frame, 0, encode_start_ns, publish_start_ns, end_ns)
        return frame

    def receive(self, timeout_s: float | None = None) -> Frame:
        if self._refuses or self.is_source:
            self._refuse()
        limit_s = self._timeout_s if timeout_s is None else self._wait_limit_s(timeout_s)
        probe = self._probe
        wait_start_ns = time.perf_counter_ns() if probe is not None else 0
        if self._frame is not None:
            self._frame.release()
        try:
            if self._unread is not None:
                self._give_back(limit_s)
            slot = self._reader.next(limit_s)
            decode_start_ns = time.perf_counter_ns() if probe is not None else 0
            memory = slot.memory
            assert memory is not None
            again = None
            if self._mirror is None:
                again = self._decoder.repeat(slot, memory, self.sequence, self._origin)
            total, metadata_bytes, mapping = again or self._decode(slot, memory)
            self._lent = slot
        except ReceiveTimeout:
            raise
        except BaseException as error:
            self._end(error)
            raise
        frame = self._frame = Frame(
            self.sequence,
            total,
            metadata_bytes,
            mapping,
            None,
            self._retire,
        )
        self.sequence += 1
        if probe is not None:
            end_ns = time.perf_counter_ns()
            self._tell(probe.received, frame, 0, wait_start_ns, decode_start_ns, end_ns)
        return frame

    def _decode(self, slot: Region, memory: memoryview) -> tuple[int, int, dict[Any, Any]]:
        """The frame's bytes, those of header and metadata, and its mapping."""
        header = read_header(memory, self.sequence, self._origin)
        region = slot
        if self._mirror is not None:
            if header.total > slot.nbytes:
                raise FrameError(f"the frame ends at {header.total}, beyond {slot.nbytes}")
            region = self._mirror.copy(slot, header.start, header.total)
            self._unread = slot
        mapping = self._decoder.decode(region, header, memory)
        return header.total, HEADER_BYTES + header.metadata_length, mapping

    def close(self) -> None:
        if self._closed:
            return
        self._closed = self._refuses = True
        if self._departure is not None:
            self._departure.detach()
        if self._frame is not None:
            self._frame.release()
        try:
            if not self.is_source:
                if self._unread is not None and self._error is None:
                    self._give_back(self._timeout_s)  # or what is copied could be written meanwhile
                self._reader.leave()
            elif self._error is None:
                self._writer.close()
            elif not isinstance(self._error, PeerLost):  # of that the readers were told
                self._writer.abandon(self.src)
        finally:
            self._close_mirror()
            self._peers.close()

    def _close_mirror(self) -> None:
        if self._mirror is not None:
            hopeless = self._error is not None or self._unread is not None
            self._mirror.close(0.0 if hopeless else self._timeout_s)

    def _end(self, error: BaseException) -> None:
        if isinstance(error, Closed):
            self._closed = self._refuses = True
            return
        self._break(error)
        if self.is_source and isinstance(error, PeerLost) and error.rank is not None:
            if self._departure is not None:
                self._departure.detach()
            self._writer.abandon(error.rank)

    def _retire(self, frame: Frame) -> None:
        self._frame = None
        if self._lent is not None:
            self._lent.take_back()
        if self._mirror is not None:
            if self._poison:
                self._mirror.poison()
            if self._unread is not None and not self._mirror.is_read(self._unread):
                return  # the next receive waits for it: the device is a step behind at most
        self._unread = None
        self._reader.release()

    def _give_back(self, timeout_s: float) -> None:
        """Release the slot whose copy was under way when its frame was released."""
        assert self._mirror is not None and self._unread is not None
        self._await_read(self._mirror, self._unread, timeout_s, self._reader.look)
        self._unread = None
        self._reader.release()

    def _await_read(
        self, mirror: Mirror, slot: Region, timeout_s: float, look: Callable[[], None]
    ) -> None:
        """Wait until the copy out of a slot is over; raises PeerLost, and this side's time-out."""
        deadline = time.monotonic() + timeout_s
        while not mirror.wait(slot, max(min(deadline - time.monotonic(), _SLICE_S), 0)):
            look()
            if time.monotonic() >= deadline:
                kind = PublishTimeout if self.is_source else ReceiveTimeout
                raise kind(
                    f"waited {timeout_s:.3g} s in vain for this rank's own GPU to copy a frame "
                    f"before frame {self.sequence}: something queued there earlier does not end"
                )

    def _poison_copy(self, frame: Frame) -> None:
        assert self._mirror is not None
        self._mirror.poison()


def _rebuild(message: Message, region: Region, mirror: Mirror | None) -> dict[Any, Any]:
    """What the source's own frame holds, made when it is asked for."""
    if mirror is not None:
        region = mirror.copy(region, message.placement.start, message.total)
    return rebuild(message, region)
