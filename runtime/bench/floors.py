"""What no channel can undercut, and what people use: raw bytes, and pickles in shared memory.

Owns those methods. None of them could be used as it is: they have one slot, nobody says that it
has been read, and a reader that waits spins.

    memcpy-flag        the bytes of a frame copied into shared memory, then a flag; the reader sees
                       the flag and does not even look at the bytes
    pickle-numpy-shm   pickle.dumps (protocol 5) into the slot, then a flag; pickle.loads from it,
    pickle-tensor-shm  as the shared-memory queues of vLLM and SGLang do it; of arrays, of tensors
    raw-broadcast      one Gloo broadcast of as many bytes as a frame has
"""

import mmap
import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from .method import Method
from .shared_page import await_word, ordering_fence, share_memory

_DATA = 64  # the slot begins a cache line after the flag


class _Slot:
    """A flag, the number of messages so far, and room for one message. A collective call."""

    def __init__(self, nbytes: int) -> None:
        pages = -(-(_DATA + nbytes) // mmap.PAGESIZE)
        memory = memoryview(share_memory(pages * mmap.PAGESIZE))
        self.flag = memory[:8].cast("Q")
        self.length = memory[8:16].cast("Q")
        self.data = memory[_DATA:]
        self.fence = ordering_fence()


class MemcpyFlag(Method):
    """The floor of shared memory."""

    name = "memcpy-flag"

    def __init__(self, frame_bytes: int) -> None:
        self.nbytes = frame_bytes
        self._slot = _Slot(frame_bytes)
        self._frame = memoryview(bytearray(frame_bytes))
        self._target = self._slot.data[:frame_bytes]

    def send(self, mapping: dict[str, Any]) -> None:
        slot = self._slot
        self.messages += 1
        self._target[:] = self._frame
        if slot.fence is not None:
            slot.fence()
        slot.flag[0] = self.messages

    def receive(self, timeout_s: float | None = None) -> None:
        slot = self._slot
        self.messages += 1
        await_word(slot.flag, 0, self.messages)
        if slot.fence is not None:
            slot.fence()


class PickleQueue(Method):
    """`as_arrays`: tensors travel as numpy arrays, which pickle many times faster."""

    def __init__(self, mapping: Mapping[str, Any], as_arrays: bool) -> None:
        self.name = "pickle-numpy-shm" if as_arrays else "pickle-tensor-shm"
        self._as_arrays = as_arrays
        self.nbytes = len(pickle.dumps(self.prepare(mapping), protocol=5))
        self._slot = _Slot(self.nbytes + 1024)  # plain values may grow by a few bytes

    def prepare(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        if not self._as_arrays:
            return dict(mapping)
        return {
            key: value.numpy() if isinstance(value, torch.Tensor) else value
            for key, value in mapping.items()
        }

    def send(self, mapping: dict[str, Any]) -> None:
        slot = self._slot
        self.messages += 1
        pickled = pickle.dumps(mapping, protocol=5)
        slot.data[: len(pickled)] = pickled
        slot.length[0] = len(pickled)
        if slot.fence is not None:
            slot.fence()
        slot.flag[0] = self.messages

    def receive(self, timeout_s: float | None = None) -> Any:
        slot = self._slot
        self.messages += 1
        await_word(slot.flag, 0, self.messages)
        if slot.fence is not None:
            slot.fence()
        return pickle.loads(slot.data[: slot.length[0]])

    def mapping(self, received: Any) -> Mapping[str, Any]:
        mapping: Mapping[str, Any] = received
        return mapping


class RawBroadcast(Method):
    """The floor of Gloo: no encoding and no decoding."""

    def __init__(self, name: str, frame_bytes: int) -> None:
        self.name = name
        self.nbytes = frame_bytes
        self._bytes = torch.zeros(frame_bytes, dtype=torch.uint8)

    def send(self, mapping: dict[str, Any]) -> None:
        self.messages += 1
        self.broadcasts += 1
        dist.broadcast(self._bytes, src=0)

    def receive(self, timeout_s: float | None = None) -> None:
        self.messages += 1
        self.broadcasts += 1
        dist.broadcast(self._bytes, src=0)
