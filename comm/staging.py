"""Where the bytes of a frame lie while a process group broadcasts them: host or device memory.

Owns buffers and the waits that belong to them. Knows nothing of capacity, sequence numbers or
errors of peers. Both classes have the same methods; `wire` is what to broadcast, `region` where the
tensors of the frame end up, `head` the header and metadata on the host.
"""

import time
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from .frame import Message, write, write_goodbye, write_head
from .header import HEADER_BYTES, aligned
from .region import Region

_HEAD_BYTES = 4096  # copied back from a device at once; longer metadata takes a second copy
_POLL_S = 20e-6


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

    def sent(self, work: dist.Work, timeout_s: float) -> bool:
        """Wait until the region may be read and written again; False: not in time."""

    def arrived(self, work: dist.Work, timeout_s: float) -> bool:
        """Wait until the bytes are here; False: not yet. Raises what the process group raises."""

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

    def sent(self, work: dist.Work, timeout_s: float) -> bool:
        return self.arrived(work, timeout_s)

    def arrived(self, work: dist.Work, timeout_s: float) -> bool:
        try:
            work.wait(timedelta(seconds=max(timeout_s, 0.001)))  # less would mean: for ever
        except RuntimeError:
            if work.is_completed():
                raise  # the broadcast failed, it did not just take long
            return False
        return True

    def head(self, nbytes: int) -> memoryview:
        assert self.region.memory is not None
        return self.region.memory


class DeviceStaging:
    """One buffer on the device, broadcast there; the host sees no more than header and metadata.

    The source writes the frame into pinned memory and uploads it in one asynchronous copy; tensors
    that are on the device already are copied there directly. Everything is ordered by the current
    stream, on which callers use the frame too: work on other streams must be made to wait by them,
    and must be done before the frame is released.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.region = Region(torch.zeros(0, dtype=torch.uint8, device=device))
        self._pinned = Region(_zeros(0, pinned=True))
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._awaited: dist.Work | None = None

    def reserve(self, nbytes: int, keep: int = 0) -> None:
        if self.region.nbytes != nbytes:
            with torch.inference_mode(False):
                tensor = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
                tensor[:keep].copy_(self.region.tensor[:keep])
            self.region = Region(tensor)

    def put(self, message: Message, sequence: int, origin: int) -> None:
        pinned = self._writable(message.total)
        late = [
            isinstance(source, torch.Tensor) and source.device == self._device
            for source in message.sources
        ]
        if any(late):
            here = [
                None if on else source for on, source in zip(late, message.sources, strict=True)
            ]
            pinned.copy_in(message.placement, here, one_by_one=True)
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
        write_goodbye(sequence, origin, self._writable(HEADER_BYTES))
        self._upload(HEADER_BYTES)

    def wire(self, begin: int, end: int) -> torch.Tensor:
        return self.region.tensor[begin:end]

    def sent(self, work: dist.Work, timeout_s: float) -> bool:
        work.wait()  # NCCL: the current stream waits, not the host
        return True

    def arrived(self, work: dist.Work, timeout_s: float) -> bool:
        if self._awaited is not work:
            # A time-out given to NCCL's wait would abort the communicator; an event can be asked
            # again and again. The header is copied back behind the broadcast, on the same stream.
            work.wait()
            self._download(0, min(self.region.nbytes, _HEAD_BYTES))
            self._awaited = work
        return self._poll(timeout_s)

    def head(self, nbytes: int) -> memoryview:
        have = min(self.region.nbytes, _HEAD_BYTES)
        wanted = min(nbytes, self.region.nbytes)
        if wanted > have:
            self._download(0, wanted)
            self._event.synchronize()  # bounded: the broadcast before it is over
            have = wanted
        assert self._pinned.memory is not None
        return self._pinned.memory[:have]

    def _writable(self, nbytes: int) -> Region:
        """Pinned memory that no copy is reading any more."""
        self._event.synchronize()  # of the upload before, a step ago: over long since
        if self._pinned.nbytes < nbytes:
            self._pinned = Region(_zeros(max(self.region.nbytes, _HEAD_BYTES), pinned=True))
        return self._pinned

    def _upload(self, nbytes: int) -> None:
        self.region.tensor[:nbytes].copy_(self._pinned.tensor[:nbytes], non_blocking=True)
        self._event.record()

    def _download(self, begin: int, end: int) -> None:
        if self._pinned.nbytes < end:
            self._pinned = Region(_zeros(max(end, _HEAD_BYTES), pinned=True))
        target = self._pinned.tensor[begin:end]
        target.copy_(self.region.tensor[begin:end], non_blocking=True)
        self._event.record()

    def _poll(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self._event.query():  # type: ignore[no-untyped-call]
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True


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


def _zeros(nbytes: int, pinned: bool) -> torch.Tensor:
    """Zeros: what pads a frame is sent, and must not be what this memory held before."""
    with torch.inference_mode(False):  # or a later frame outside of it could not be written here
        return torch.zeros(aligned(nbytes), dtype=torch.uint8, pin_memory=pinned)
