"""Small lists of pairs brought to a GPU without the host waiting for it.

Owns the page-locked memory that they are copied from, and when it may be written again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .block_mover import Pairs

_SLOTS = 8  # uploads under way before the host waits for the first of them
_PAIRS = 1024  # room of a slot at first


class PairUploads:
    """Page-locked slots, used in turn; one for all streams of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots = [_locked(_PAIRS) for _ in range(_SLOTS)]
        make: Callable[[], torch.cuda.Event] = torch.cuda.Event
        self._copied = [make() for _ in range(_SLOTS)]
        self._next = 0

    def upload(self, pairs: Pairs) -> Tensor:
        """`pairs` as int64 [n, 2] in the device's memory, once the current stream gets there.

        The tensor is that stream's: it must not be used on another. The device is the current one.
        """
        slot = self._next
        self._next = (slot + 1) % _SLOTS
        self._copied[slot].synchronize()  # what was copied from it last; long ago
        memory = self._slots[slot]
        if len(memory) < len(pairs):
            memory = self._slots[slot] = _locked(2 * len(pairs))
        filled = memory[: len(pairs)]
        filled.numpy()[:] = pairs
        uploaded = filled.to(self._device, non_blocking=True)
        self._copied[slot].record()
        return uploaded


def _locked(count: int) -> Tensor:
    # Not an inference tensor even if made within inference mode, as all that lives on.
    with torch.inference_mode(False):
        return torch.empty(count, 2, dtype=torch.int64, pin_memory=True)
