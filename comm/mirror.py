"""Frames in shared memory, copied to where this rank wants them: its GPU, or private memory.

Owns the buffer that frames are copied to, the page-locking of the ring that they are copied from,
and when a slot has been read. Knows nothing of who else reads it.

    slot of the ring, page-locked   --one asynchronous copy-->   buffer: views at stable addresses
"""

import logging
from typing import Protocol

import torch

from .frame_ring import Ring, RingWatcher
from .header import aligned
from .region import Region

log = logging.getLogger(__name__)


class Mirror(RingWatcher, Protocol):
    """One rank's copies of frames."""

    def copy(self, slot: Region, start: int, total: int) -> Region:
        """Copy what is between `start` and `total`; the region that has it now."""

    def is_read(self, slot: Region) -> bool:
        """Whether the copy out of this slot is over."""

    def wait(self, slot: Region) -> None:
        """Wait until it is."""

    def poison(self) -> None:
        """Overwrite what was copied last, so that a view kept too long shows."""


class HostMirror:
    """Copies in private memory, which can be poisoned while others still read the slot."""

    def __init__(self) -> None:
        self._region = _region(0, torch.device("cpu"))

    def lock(self, ring: Ring) -> None: ...

    def unlock(self, ring: Ring) -> None: ...

    def copy(self, slot: Region, start: int, total: int) -> Region:
        if self._region.nbytes < total:
            self._region = _region(slot.nbytes, torch.device("cpu"))
        self._region.tensor[start:total].copy_(slot.tensor[start:total])
        return self._region

    def is_read(self, slot: Region) -> bool:
        return True

    def wait(self, slot: Region) -> None: ...

    def poison(self) -> None:
        self._region.poison()


class DeviceMirror:
    """Copies on a GPU.

    They are ordered by the stream that is current at the call, on which callers use the frame too:
    the buffer is written once the work queued there before is over. A caller that uses a frame on
    other streams orders them itself, before it releases the frame.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._region = _region(0, device)
        self._locked: set[int] = set()  # addresses of rings' memory
        self._events: dict[Region, torch.cuda.Event] = {}  # of the last copy out of each slot

    def lock(self, ring: Ring) -> None:
        """Without the page-lock copies are right as well, but the host waits for them."""
        address = ring.regions[0].tensor.data_ptr()
        nbytes = ring.slot_bytes * ring.slots
        error = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)  # type: ignore[no-untyped-call]
        if int(error) == 0:
            self._locked.add(address)
        else:
            log.warning("shared memory at %#x cannot be page-locked: error %s", address, error)

    def unlock(self, ring: Ring) -> None:
        for slot in ring.regions:
            self.wait(slot)
            self._events.pop(slot, None)
        address = ring.regions[0].tensor.data_ptr()
        if address in self._locked:
            self._locked.remove(address)
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def copy(self, slot: Region, start: int, total: int) -> Region:
        if self._region.nbytes < total:
            self._region = _region(total, self._device)
        target, source = self._region.tensor[start:total], slot.tensor[start:total]
        target.copy_(source, non_blocking=True)
        event = self._events.get(slot)
        if event is None:
            event = self._events[slot] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return self._region

    def is_read(self, slot: Region) -> bool:
        event = self._events.get(slot)
        return event is None or bool(event.query())  # type: ignore[no-untyped-call]

    def wait(self, slot: Region) -> None:
        event = self._events.get(slot)
        if event is not None:
            event.synchronize()  # bounded by the work that was queued before the copy

    def poison(self) -> None:
        self._region.poison()


def make_mirror(device: torch.device, poison: bool) -> Mirror | None:
    """What copies frames to `device`; None: they are used where they are."""
    if device.type == "cuda":
        return DeviceMirror(device)
    return HostMirror() if poison else None


def _region(nbytes: int, device: torch.device) -> Region:
    with torch.inference_mode(False):  # or a later frame outside of it could not be written here
        return Region(torch.zeros(aligned(nbytes), dtype=torch.uint8, device=device))
