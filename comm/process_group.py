"""A channel over a torch.distributed process group: one `dist.broadcast` a frame.

Owns the order of broadcasts, the growing step, and what becomes of errors. Knows nothing of the
frame's bytes beyond its lengths, nor of host and device memory.

Every rank broadcasts `capacity` bytes, a number that all derive from the lengths they have seen. A
frame that fits is there at once. One that does not is cut: the first broadcast brings its front,
which says how long it is, and only the rest follows in a second; the capacity then fits.

        capacity                          capacity
    +----------------+            +----------------+
    |frame   |padding|            |front           |  rest        |
    +----------------+            +----------------+--------------+
     one broadcast                 first            second, once

Over Gloo `publish` returns once the ranks to which this one sends wait for the frame and have been
sent it, over NCCL as soon as the broadcast stands in the current stream. A rank that is gone is
told of by the publish that needs it or by the next one.

A lost peer is found by its process having ended, which the ranks of its host see within a second
and tell those of other hosts, see `obituaries`. A whole host that goes silent is found when the
time-out ends a wait.

NCCL: ranks that wait for a frame wait inside a collective, so an idle spell longer than the group's
time-out makes NCCL's watchdog end the process; give the group a long one. Gloo: a broadcast that is
larger than the one awaited ends the receiving process, from inside Gloo; nothing else than this
channel must broadcast on its group while one of its frames is awaited.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .channel import DEFAULT_TIMEOUT_S, Frame
from .endpoint import Endpoint, at_end_of, meeting_place
from .errors import Closed, CommError, PeerLost, PublishTimeout, ReceiveTimeout
from .far_peers import open_board
from .frame import Decoder, Encoder, rebuild
from .header import (
    CLOSES,
    HEADER_BYTES,
    VERSION,
    Header,
    check_metadata,
    make_origin,
    read_header,
)
from .ladder import Capacity, rung
from .lookout import Lookout
from .obituaries import Obituaries
from .peers import Peers
from .probe import Probe
from .staging import DeviceStaging, HostStaging, Staging, frame_device, is_by_stream
from .waiting import DEFAULT_SPIN


class ProcessGroupChannel(Endpoint):
    """See `Channel`. `src` is a global rank, a member of `group`, as in `dist.broadcast`.

    `spin` is the share of a core that waiting may take, from 0 to 1, see `Cadence`.

    Opening is a collective call. Closing is one too: the source says goodbye with a last frame, and
    a receiver that closes waits for it, passing over the frames before it. Between a ReceiveTimeout
    and the frame that it awaited a broadcast is under way: the group can carry nothing else then.
    """

    name = "process-group"

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
        group = self._group
        place = frame_device(group, device)
        self._staging: Staging = (
            DeviceStaging(place, is_by_stream(group, place))
            if place.type == "cuda"
            else HostStaging()
        )
        agreement = {"src": src, "frame version": VERSION}
        told = {"channel": secrets.randbits(16), "board": secrets.randbits(62)}
        peers = self._peers = Peers.exchange(group, meeting_place(group), agreement, told)
        brought = peers.by_rank[src].told
        self._origin = make_origin(src, brought["channel"])
        self._board = None if peers.on_one_host else open_board(brought["board"], peers)
        self._lookout = Lookout(peers, self._board, spin, self.is_source)
        # When this object goes, however it goes: the watch ends, and the others are told.
        self._leave = at_end_of(self, _leave, peers, self._board)
        self._capacity = Capacity()
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._pending: dist.Work | None = None  # a broadcast that a time-out left under way
        self._front: Header | None = None  # of the frame whose rest is pending

    @property
    def capacity(self) -> int:
        """Bytes of the next first broadcast."""
        return self._capacity.nbytes

    def publish(self, mapping: Mapping[Any, Any]) -> Frame:
        if self._refuses or not self.is_source:
            self._refuse()
        probe = self._probe
        encode_start_ns = time.perf_counter_ns() if probe is not None else 0
        if self._frame is not None:
            self._frame.release()
        self._staging.region.take_back()
        gone = self._lookout.gone_lately()
        message = self._encoder.plan(mapping)
        staging = self._staging
        capacity = self._capacity.nbytes
        total = message.total
        if gone is not None or not staging.writable():
            self._make_sure(gone)
        staging.reserve(capacity if total <= capacity else rung(total))
        staging.put(message, self.sequence, self._origin)
        publish_start_ns = time.perf_counter_ns() if probe is not None else 0
        try:
            self._encoder.commit(message)
            self._send(capacity, total)
        except BaseException as error:
            self._break(error)
            raise
        region = staging.region
        frame = self._frame = Frame(
            self.sequence,
            total,
            message.metadata_bytes,
            None,
            lambda: rebuild(message, region),
            self._retire if self._poison else None,
        )
        self.sequence += 1
        if probe is not None:
            broadcasts = 1 if frame.nbytes <= capacity else 2
            end_ns = time.perf_counter_ns()
            self._tell(
                probe.published, frame, broadcasts, encode_start_ns, publish_start_ns, end_ns
            )
        return frame

    def receive(self, timeout_s: float | None = None) -> Frame:
        if self._refuses or self.is_source:
            self._refuse()
        limit_s = self._wait_limit_s(timeout_s)
        probe = self._probe
        wait_start_ns = time.perf_counter_ns() if probe is not None else 0
        if self._frame is not None:
            self._frame.release()
        self._staging.region.take_back()
        capacity = self._capacity.nbytes
        try:
            header, memory = self._next(time.monotonic_ns() + int(limit_s * 1e9))
            if header.flags & CLOSES:
                self._closed = self._refuses = True
                self._part()
                raise Closed(f"rank {self.src} closed the channel after {self.sequence} frames")
            decode_start_ns = time.perf_counter_ns() if probe is not None else 0
            mapping = self._decoder.decode(self._staging.region, header, memory)
        except (ReceiveTimeout, Closed):
            raise
        except BaseException as error:
            self._break(error)
            raise
        frame = self._frame = Frame(
            header.sequence,
            header.total,
            HEADER_BYTES + header.metadata_length,
            mapping,
            None,
            self._retire if self._poison else None,
        )
        self.sequence += 1
        if probe is not None:
            broadcasts = 1 if frame.nbytes <= capacity else 2
            end_ns = time.perf_counter_ns()
            self._tell(probe.received, frame, broadcasts, wait_start_ns, decode_start_ns, end_ns)
        return frame

    def close(self) -> None:
        if self._closed:
            return
        self._closed = self._refuses = True
        if self._frame is not None:
            self._frame.release()
        if self._error is not None:
            return  # out of step: a goodbye would not be understood
        try:
            if self.is_source:
                self._make_sure(None)
                self._staging.reserve(self._capacity.nbytes)
                self._staging.put_goodbye(self.sequence, self._origin)
                self._send(self._capacity.nbytes, 0)
            else:
                deadline_ns = time.monotonic_ns() + int(self._timeout_s * 1e9)
                while not self._next(deadline_ns)[0].flags & CLOSES:
                    self.sequence += 1
        except BaseException as error:
            self._break(error)
            raise
        self._part()

    def _break(self, error: BaseException) -> None:
        """Nothing is certain about the ranks being in step after `error`."""
        if self._error is not None:
            return
        super()._break(error)
        if self._board is not None and self._board.heard is None:
            if isinstance(error, PeerLost):
                self._board.post(error.rank, error.details)
            else:
                self._board.post(self.rank, f"it gave up: {error!r}")
        self._part()

    def _part(self) -> None:
        """This rank is through with the others: in order, or they have been told."""
        if self._leave.detach() is not None:
            self._peers.close()
            if self._board is not None:
                self._board.close()

    def _retire(self, frame: Frame) -> None:
        self._staging.region.poison()

    def _send(self, capacity: int, total: int) -> None:
        deadline_ns = time.monotonic_ns() + int(self._timeout_s * 1e9)
        self._await(self._broadcast(0, capacity), deadline_ns, self._staging.sent)
        if total > capacity:
            self._await(self._broadcast(capacity, total), deadline_ns, self._staging.sent)
        self._capacity.saw(total)

    def _make_sure(self, gone: tuple[int | None, str] | None) -> None:
        """Nobody is known to be gone, and the memory of the frame before can be written."""
        try:
            if gone is not None:
                raise PeerLost(gone[0], f"{gone[1]} before frame {self.sequence} was published")
            deadline_ns = time.monotonic_ns() + int(self._timeout_s * 1e9)
            self._await(None, deadline_ns, lambda _: self._staging.writable())
        except BaseException as error:
            self._break(error)
            raise

    def _next(self, deadline_ns: int) -> tuple[Header, memoryview]:
        """The next frame, once all of it is here: its header, and a memory with its metadata."""
        staging = self._staging
        capacity = self._capacity.nbytes
        header = self._front
        if header is None:
            if self._pending is None:
                staging.reserve(capacity)
                self._pending = self._broadcast(0, capacity)
            self._await(self._pending, deadline_ns, staging.arrived)
            self._pending = None
            memory = staging.head(HEADER_BYTES)
            header = read_header(memory, self.sequence, self._origin)
            if header.total <= capacity:
                self._capacity.saw(header.total)
                if HEADER_BYTES + header.metadata_length > len(memory):
                    memory = staging.head(HEADER_BYTES + header.metadata_length)
                    check_metadata(header, memory)
                return header, memory
            staging.reserve(rung(header.total), keep=capacity)
            self._front = header
        if self._pending is None:
            self._pending = self._broadcast(capacity, header.total)
        self._await(self._pending, deadline_ns, staging.arrived)
        self._pending = self._front = None
        memory = staging.head(HEADER_BYTES + header.metadata_length)
        check_metadata(header, memory)
        self._capacity.saw(header.total)
        return header, memory

    def _broadcast(self, begin: int, end: int) -> dist.Work:
        group = self._group
        self.broadcasts += 1
        wire = self._staging.wire(begin, end)
        try:
            work: dist.Work | None = dist.broadcast(wire, src=self.src, group=group, async_op=True)
        except RuntimeError as error:
            raise self._failure(error) from error
        assert work is not None
        return work

    def _await(self, work: dist.Work | None, deadline_ns: int, done: Callable[[Any], bool]) -> None:
        """Until `done(work)`; raises PeerLost, and the time-out of this side."""
        lookout = self._lookout
        start_ns = time.monotonic_ns()
        try:
            if lookout.wait(partial(done, work), partial(self._staging.sleep, work), deadline_ns):
                return
        except RuntimeError as error:
            raise self._failure(error) from error
        gone = lookout.gone()
        if gone is not None:
            raise PeerLost(gone[0], f"{gone[1]} while this rank waited for {self._awaited()}")
        raise self._timeout(f"{(time.monotonic_ns() - start_ns) / 1e9:.3g} s", lookout.describe())

    def _awaited(self) -> str:
        if self.is_source:
            return f"the other ranks to take frame {self.sequence}"
        rest = "the rest of " if self._front is not None else ""
        return f"{rest}frame {self.sequence} from rank {self.src}"

    def _timeout(self, waited: str, details: str) -> ReceiveTimeout | PublishTimeout:
        text = f"waited {waited} in vain for {self._awaited()}"
        if not self.is_source:
            return ReceiveTimeout(f"{text} ({details})")
        under_way = "a broadcast is under way, so the channel cannot be used any more"
        return PublishTimeout(f"{text}; {under_way} ({details})")

    def _failure(self, error: RuntimeError) -> CommError:
        """What a failed broadcast means; the process group says it in words only."""
        text = str(error)
        gone = self._lookout.find_gone()
        if gone is not None:
            return PeerLost(gone[0], f"{gone[1]}; the broadcast: {text}")
        if "timed out" in text.lower():
            text = f"until the process group's own time-out ended the broadcast: {text}"
            late = self._timeout(text, self._lookout.describe())
            self._break(late)  # unlike a wait of ours that ends, this one cannot be resumed
            return late
        return PeerLost(self._lookout.only_suspect(), text)


def _leave(peers: Peers, board: Obituaries | None) -> None:
    """A channel went that was neither closed nor broken."""
    peers.close()
    if board is not None:
        board.post(peers.own.rank, "it left without closing the channel")
        board.close()
