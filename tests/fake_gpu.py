"""A GPU made of host memory that does its work as late as a test wants: for `comm.mirror` on CPUs.

Copies, fills and events queue up in order, as on one stream, while the GPU is `busy`; `finish` does
them. So a slot that is written anew before its copy is over shows as wrong content. Page-locking is
as strict as CUDA's: no memory twice, and none that was not locked is unlocked.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from onecast.comm import mirror, shared_memory

ALREADY_REGISTERED, NOT_REGISTERED = 712, 713


class FakeStream:
    def __init__(self) -> None:
        self.waited_for: list[FakeStream] = []

    def wait_stream(self, other: "FakeStream") -> None:
        self.waited_for.append(other)


class FakeGpu:
    def __init__(self) -> None:
        self.busy = False
        self.streams = [FakeStream()]  # the last is current
        self.locked: dict[int, int] = {}  # bytes by address
        self.refuses = 0  # the error that page-locking gives
        self.used: list[tuple[torch.Tensor, FakeStream]] = []
        self._memory: set[int] = set()  # addresses of its own
        self._queue: deque[Callable[[], object]] = deque()

    def submit(self, work: Callable[[], object]) -> None:
        if self.busy:
            self._queue.append(work)
        else:
            work()

    def finish(self) -> None:
        self.busy = False
        while self._queue:
            self._queue.popleft()()

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._memory

    def adopt(self, tensor: torch.Tensor) -> None:
        self._memory.add(tensor.untyped_storage().data_ptr())

    # ---- what torch.cuda.cudart() has

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if self.refuses:
            return self.refuses
        for begin, length in self.locked.items():
            if begin < address + nbytes and address < begin + length:
                return ALREADY_REGISTERED
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.locked.pop(address, None) is not None else NOT_REGISTERED

    def cudaGetErrorString(self, error: int) -> str:
        return f"error {error}"


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Channels opened in this context have their frames copied to the GPU that it gives."""
    gpu = FakeGpu()
    copy, fill, make_region = torch.Tensor.copy_, torch.Tensor.fill_, mirror._region

    class FakeEvent:
        """Knows whether the GPU has come to where it was recorded last."""

        def __init__(self) -> None:
            self._recorded = self._reached = 0

        def record(self, stream: FakeStream) -> None:
            assert stream is gpu.streams[-1], "behind work of another stream"
            self._recorded += 1
            gpu.submit(lambda number=self._recorded: setattr(self, "_reached", number))

        def query(self) -> bool:
            return self._reached == self._recorded

    def copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if gpu.owns(self):
            gpu.submit(lambda: copy(self, source))
            return self
        return copy(self, source, non_blocking)

    def fill_(self: torch.Tensor, value: Any) -> torch.Tensor:
        if gpu.owns(self):
            gpu.submit(lambda: fill(self, value))
            return self
        return fill(self, value)

    def region(nbytes: int, device: torch.device) -> Any:
        made = make_region(nbytes, device)
        gpu.adopt(made.tensor)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", FakeEvent)
        patch.setattr(torch.cuda, "current_stream", lambda device: gpu.streams[-1])
        patch.setattr(torch.cuda, "cudart", lambda: gpu)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.Tensor, "copy_", copy_)
        patch.setattr(torch.Tensor, "fill_", fill_)
        patch.setattr(mirror, "_region", region)
        patch.setattr(
            mirror, "_record_use", lambda tensor, stream: gpu.used.append((tensor, stream))
        )
        patch.setattr(
            shared_memory, "make_mirror", lambda device, poison: mirror.DeviceMirror(device)
        )
        yield gpu
        gpu.finish()
