"""Where the bytes of a frame lie while a process group broadcasts them: host or device memory.

Owns buffers, and how to see that a broadcast is through with them. Knows nothing of capacity,
sequence numbers, deadlines or peers: none of its questions waits. Both classes have the same
methods; `wire` is what to broadcast, `region` where the tensors of the frame end up, `head` the
header and metadata on the host.
"""

import time
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from .frame import Message, write, write_goodbye, write_head
from .header import HEADER_BYTES, aligned
from .parts import MIXED
from .region import Region

_HEAD_BYTES = 4096  # copied back from a device at once; longer metadata takes a second copy
_MILLISECOND_NS = 1_000_000
_NAP_NS = 200_000  # the longest sleep that nothing but its end can end, where better ones exist
# To sleep with, not to end an operation: who times operations at `Work.wait` by replacing it would
# take the end of every such sleep for a failure. Hence this name, which stays what it is here.
_wait_for = dist.Work.wait
_LONG_NAP_NS = 5 * _MILLISECOND_NS  # and where none exist


class Staging(Protocol):
    region: Region

    def reserve(self, nbytes: int, keep: int = 0) -> None:
        """Make the region `nbytes` long; its first `keep` bytes stay what they are."""

    def put(self, message: Message, sequence: int, origin: int) -> None:
        """Write a frame. Nothing has changed for anyone if this raises."""

    def put_goodbye(self, sequence: int, origin: int) -> None:
        """Write the frame that closes a channel."""

    def wire(self, begin: int, end: int) -> torch.Tensor:
        """These bytes of the region, to broadcast."""

    def writable(self) -> bool:
        """Whether a frame can be put here: nothing reads what `put` writes any more."""

    def sent(self, work: dist.Work) -> bool:
        """Whether the region may be read and written again. Raises what the process group does."""

    def arrived(self, work: dist.Work) -> bool:
        """Whether the bytes are here. Raises what the process group raises."""

    def sleep(self, work: dist.Work | None, nanoseconds: int) -> None:
        """Sleep that long at most; until `work` is over, where that can be waited for."""

    def head(self, nbytes: int) -> memoryview:
        """The first `nbytes` at least, or all there are, of the region on the host."""


class HostStaging:
    """One buffer in host memory, broadcast as it is."""

    def __init__(self) -> None:
        self.region = Region(_zeros(0, pinned=False))

    def reserve(self, nbytes: int, keep: int = 0) -> None:
        if self.region.nbytes != nbytes:
            tensor = _zeros(nbytes, pinned=False)
            tensor[:keep].copy_(self.region.tensor[:keep])
            self.region = Region(tensor)

    def put(self, message: Message, sequence: int, origin: int) -> None:
        write(message, sequence, origin, self.region)

    def put_goodbye(self, sequence: int, origin: int) -> None:
        write_goodbye(sequence, origin, self.region)

    def wire(self, begin: int, end: int) -> torch.Tensor:
        whole = begin == 0 and end == self.region.nbytes
        return self.region.tensor if whole else self.region.tensor[begin:end]

    def writable(self) -> bool:
        return True  # `sent` was

    def sent(self, work: dist.Work) -> bool:
        return self.arrived(work)

    def arrived(self, work: dist.Work) -> bool:
        if not work.is_completed():
            return False
        work.wait()  # at once: it raises if the broadcast failed, and whoever times it sees its end
        return True

    def sleep(self, work: dist.Work | None, nanoseconds: int) -> None:
        if work is None or nanoseconds < 2 * _MILLISECOND_NS:
            # The wait below counts in milliseconds, and would take 0 for no time-out.
            time.sleep(min(nanoseconds, _NAP_NS) / 1e9)
            return
        try:
            _wait_for(work, timedelta(milliseconds=nanoseconds // _MILLISECOND_NS))
        except RuntimeError:
            if work.is_completed():
                work.wait()  # raises if the broadcast failed; it may also have ended just now

    def head(self, nbytes: int) -> memoryview:
        assert self.region.memory is not None
        return self.region.memory


class DeviceStaging:
    """One buffer on the device, broadcast there; the host sees no more than header and metadata.

    The source writes the frame into pinned memory and uploads it in one asynchronous copy; tensors
    that are on the device already are copied there directly.

        source    pinned --copy--> region --broadcast--+        one stream, the host does not wait
        receiver  pinned <--copy-- region <-broadcast--+        the host waits for the copy's event
                  (header, metadata)

    Everything is ordered by the stream that is current when the channel is called, on which callers
    use the frame too. If it is another than at the call before, it is made to wait for that one.
    Work that a caller puts on yet another stream is the caller's to order: it must wait for the
    current one, and must be over, or the current one made to wait for it, before the frame is
    released.

    `by_stream`: the group's broadcasts are ordered by streams (NCCL), and a host that waits for one
    only makes its stream wait. Else (Gloo) the host itself has to.
    """

    def __init__(self, device: torch.device, by_stream: bool) -> None:
        self._device = device
        self._by_stream = by_stream
        self._stream = torch.cuda.current_stream(device)
        self.region = Region(torch.zeros(0, dtype=torch.uint8, device=device))
        self._pinned = Region(_zeros(0, pinned=True))
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._downloaded: dist.Work | None = None  # the broadcast that `_event` stands behind
        self._naps = 0  # since the event was recorded

    def reserve(self, nbytes: int, keep: int = 0) -> None:
        self._follow()
        if self.region.nbytes != nbytes:
            with torch.inference_mode(False):
                tensor = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
                tensor[:keep].copy_(self.region.tensor[:keep])
            self.region = Region(tensor)

    def put(self, message: Message, sequence: int, origin: int) -> None:
        pinned = self._room(message.total)
        late = [
            isinstance(source, torch.Tensor) and source.device == self._device
            for source in message.sources
        ]
        if any(late):
            here = [
                None if on else source for on, source in zip(late, message.sources, strict=True)
            ]
            pinned.copy_in(message.placement, here, MIXED)
            write_head(message, sequence, origin, pinned)
        else:
            write(message, sequence, origin, pinned)
        self._upload(message.total)
        if any(late):
            views = self.region.views(message.placement)
            for view, source, on in zip(views, message.sources, late, strict=True):
                if on:
                    view.copy_(torch.as_tensor(source))

    def put_goodbye(self, sequence: int, origin: int) -> None:
        write_goodbye(sequence, origin, self._room(HEADER_BYTES))
        self._upload(HEADER_BYTES)

    def wire(self, begin: int, end: int) -> torch.Tensor:
        return self.region.tensor[begin:end]

    def writable(self) -> bool:
        # The upload before, behind which a dead peer can hold a broadcast, and with it this stream.
        done: bool = self._event.query()  # type: ignore[no-untyped-call]
        return done

    def sent(self, work: dist.Work) -> bool:
        if not self._by_stream and not work.is_completed():
            return False
        work.wait()
        return True

    def arrived(self, work: dist.Work) -> bool:
        if self._downloaded is not work:
            if not self._by_stream and not work.is_completed():
                return False
            # A time-out given to NCCL's wait would abort the communicator; an event can be asked
            # again and again. The header is copied back behind the broadcast, on the same stream.
            work.wait()
            self._download(min(self.region.nbytes, _HEAD_BYTES))
            self._downloaded = work
        done: bool = self._event.query()  # type: ignore[no-untyped-call]
        return done

    def sleep(self, work: dist.Work | None, nanoseconds: int) -> None:
        # Nothing wakes a thread that sleeps for an event, and be it in slices. Naps that grow with
        # the wait add an eighth to it at most, and leave an idle rank asleep.
        self._naps += 1
        nap_ns = min(_NAP_NS + self._naps * _NAP_NS // 8, _LONG_NAP_NS)
        time.sleep(min(nanoseconds, nap_ns) / 1e9)

    def head(self, nbytes: int) -> memoryview:
        have = min(self.region.nbytes, _HEAD_BYTES)
        wanted = min(nbytes, self.region.nbytes)
        if wanted > have:
            self._download(wanted)
            self._event.synchronize()  # bounded: all that this stream holds before it is over
            have = wanted
        assert self._pinned.memory is not None
        return self._pinned.memory[:have]

    def _room(self, nbytes: int) -> Region:
        """Pinned memory for a frame; `writable` was true."""
        if self._pinned.nbytes < nbytes:
            self._pinned = Region(_zeros(max(self.region.nbytes, _HEAD_BYTES), pinned=True))
        return self._pinned

    def _upload(self, nbytes: int) -> None:
        self.region.tensor[:nbytes].copy_(self._pinned.tensor[:nbytes], non_blocking=True)
        self._event.record(self._stream)
        self._naps = 0

    def _download(self, nbytes: int) -> None:
        self._follow()
        pinned = self._room(nbytes)
        pinned.tensor[:nbytes].copy_(self.region.tensor[:nbytes], non_blocking=True)
        self._event.record(self._stream)
        self._naps = 0

    def _follow(self) -> None:
        """Order the current stream behind the one that was current at the call before."""
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            stream.wait_stream(self._stream)
            if self.region.tensor.is_cuda:
                # Once freed, its memory goes to others only when this stream is through with it.
                self.region.tensor.record_stream(stream)
            self._stream = stream


def frame_device(group: dist.ProcessGroup, device: torch.device | str | None) -> torch.device:
    """Where frames lie: `device`, or None for what suits the group; raises ValueError."""
    only_nccl = dist.get_backend(group) == "nccl"
    place = torch.device(device if device is not None else "cuda" if only_nccl else "cpu")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {place}; a frame can lie on cpu or cuda")
    if only_nccl and place.type == "cpu":
        raise ValueError("device is cpu; an NCCL group broadcasts from cuda only")
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


def is_by_stream(group: dist.ProcessGroup, place: torch.device) -> bool:
    """Whether streams order what the group broadcasts from there: NCCL does, as one of several."""
    backends = dict(one.split(":") for one in dist.get_backend_config(group).split(","))
    return backends.get(place.type) == "nccl"


def _zeros(nbytes: int, pinned: bool) -> torch.Tensor:
    """Zeros: what pads a frame is sent, and must not be what this memory held before."""
    with torch.inference_mode(False):  # or a later frame outside of it could not be written here
        return torch.zeros(aligned(nbytes), dtype=torch.uint8, device="cpu", pin_memory=pinned)
