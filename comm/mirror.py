"""Frames in shared memory, copied to where this rank wants them: its GPU, or private memory.

Owns the buffer that frames are copied to, the page-locking of the rings that they are copied from,
and when a slot has been read. Knows nothing of who else reads it.

    slot of the ring, page-locked   --one asynchronous copy-->   buffer: views at stable addresses
"""

import contextlib
import ctypes
import logging
import time
from collections.abc import Iterable
from typing import Protocol

import torch

from .endpoint import at_end_of
from .frame_ring import Ring, RingWatcher
from .header import aligned
from .region import Region

log = logging.getLogger(__name__)

_SPIN_S = 20e-6  # what most copies that are waited for still take
_NAP_S = (20e-6, 1e-3)  # the first, and the longest, between two questions whether a copy is over


class Mirror(RingWatcher, Protocol):
    """One rank's copies of frames."""

    def copy(self, slot: Region, start: int, total: int) -> Region:
        """Copy what is between `start` and `total`; the region that has it now."""

    def is_read(self, slot: Region) -> bool:
        """Whether the copy out of this slot is over."""

    def wait(self, slot: Region, timeout_s: float) -> bool:
        """The same, after waiting for it so long at most."""

    def poison(self) -> None:
        """Overwrite what was copied last, so that a view kept too long shows."""

    def close(self, timeout_s: float) -> None:
        """The rings are not used any more; waits so long at most for copies under way."""


class HostMirror:
    """Copies in private memory, which can be poisoned while others still read the slot."""

    def __init__(self) -> None:
        self._region = _region(0, torch.device("cpu"))

    def lock(self, ring: Ring) -> None: ...

    def is_through(self, ring: Ring) -> bool:
        return True

    def unlock(self, ring: Ring) -> None: ...

    def copy(self, slot: Region, start: int, total: int) -> Region:
        self._region.take_back()
        if self._region.nbytes != slot.nbytes:
            self._region = _region(slot.nbytes, torch.device("cpu"))
        self._region.tensor[start:total].copy_(slot.tensor[start:total])
        return self._region

    def is_read(self, slot: Region) -> bool:
        return True

    def wait(self, slot: Region, timeout_s: float) -> bool:
        return True

    def poison(self) -> None:
        self._region.poison()

    def close(self, timeout_s: float) -> None: ...


class DeviceMirror:
    """Copies on a GPU.

    They are ordered by the stream that is current when the channel is called, on which callers use
    the frame too; if it is another than at the call before, it is made to wait for that one. A
    caller that uses a frame on other streams orders them itself, before it releases the frame.

    The buffer is as long as a slot: it stays where it is until the ring moves to other slots.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device)
        self._region = _region(0, device)
        self._locked: dict[int, Ring] = {}  # by the address of its memory; held, or it would go
        self._events: dict[Region, torch.cuda.Event] = {}  # of the last copy out of each slot
        # When this object goes without `close`, however it goes. Not at exit: all goes then.
        self._leave = at_end_of(self, _drop, device, self._locked, self._events)
        self._leave.atexit = False

    def lock(self, ring: Ring) -> None:
        """Without the page-lock copies are right as well, but the host waits for them."""
        address = _address(ring)
        error = _tell_cuda(self._device, "cudaHostRegister", address, len(ring.memory), 0)
        if error is None:
            self._locked[address] = ring
        else:
            log.warning("shared memory at %#x cannot be page-locked: %s", address, error)

    def is_through(self, ring: Ring) -> bool:
        return all(map(self.is_read, ring.regions))

    def unlock(self, ring: Ring) -> None:
        assert self.is_through(ring)
        for slot in ring.regions:
            self._events.pop(slot, None)
        # Before it is unmapped: what is mapped there later would be taken for the memory before.
        if self._locked.pop(_address(ring), None) is not None:
            _unlock(self._device, ring)

    def copy(self, slot: Region, start: int, total: int) -> Region:
        self._follow()
        if self._region.nbytes != slot.nbytes:
            self._region = _region(slot.nbytes, self._device)
        target, source = self._region.tensor[start:total], slot.tensor[start:total]
        target.copy_(source, non_blocking=True)
        event = self._events.get(slot)
        if event is None:
            event = self._events[slot] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return self._region

    def is_read(self, slot: Region) -> bool:
        event = self._events.get(slot)
        return event is None or bool(event.query())  # type: ignore[no-untyped-call]

    def wait(self, slot: Region, timeout_s: float) -> bool:
        return self._wait([slot], timeout_s)

    def poison(self) -> None:
        self._follow()
        self._region.poison()

    def close(self, timeout_s: float) -> None:
        self._wait([*self._events], timeout_s)
        self._leave()

    def _wait(self, slots: Iterable[Region], timeout_s: float) -> bool:
        # Not by the event's own wait: it has no time-out, and the copy may stand behind a kernel
        # that waits for a rank which is dead.
        start = time.monotonic()
        nap_s = _NAP_S[0]
        for slot in slots:
            while not self.is_read(slot):
                waited_s = time.monotonic() - start
                if waited_s >= timeout_s:
                    return False
                if waited_s > _SPIN_S:
                    time.sleep(min(nap_s, timeout_s - waited_s))
                    nap_s = min(nap_s * 1.5, _NAP_S[1])
        return True

    def _follow(self) -> None:
        """Order the current stream behind the one that was current at the call before."""
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            stream.wait_stream(self._stream)
            _record_use(self._region.tensor, stream)
            self._stream = stream


def make_mirror(device: torch.device, poison: bool) -> Mirror | None:
    """What copies frames to `device`; None: they are used where they are."""
    if device.type == "cuda":
        return DeviceMirror(device)
    return HostMirror() if poison else None


def _drop(
    device: torch.device, locked: dict[int, Ring], events: dict[Region, torch.cuda.Event]
) -> None:
    """Unlock what no copy reads any more; the rest stays mapped until the process ends."""
    for ring in locked.values():
        if all(slot not in events or events[slot].query() for slot in ring.regions):  # type: ignore[no-untyped-call]
            _unlock(device, ring)
        else:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(ring))
    locked.clear()
    events.clear()


def _unlock(device: torch.device, ring: Ring) -> None:
    error = _tell_cuda(device, "cudaHostUnregister", _address(ring))
    if error is not None:
        log.warning("shared memory at %#x stays page-locked: %s", _address(ring), error)


def _address(ring: Ring) -> int:
    return ring.regions[0].tensor.data_ptr()


def _tell_cuda(device: torch.device, function: str, *arguments: int) -> str | None:
    """Call this function of the CUDA runtime; the text of its error."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):  # or a context would be made on another GPU
        error = getattr(cudart, function)(*arguments)
        if int(error) == 0:
            return None
        # CUDA keeps it until it is asked, and torch asks after its next kernel, which it would
        # blame: so here is one to blame.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
    return str(cudart.cudaGetErrorString(error))


def _record_use(tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Once freed, its memory is given to others only when this stream is through with it."""
    tensor.record_stream(stream)


def _region(nbytes: int, device: torch.device) -> Region:
    with torch.inference_mode(False):  # or a later frame outside of it could not be written here
        return Region(torch.zeros(aligned(nbytes), dtype=torch.uint8, device=device))
