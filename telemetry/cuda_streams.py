"""CUDA streams that are nobody else's, straight from the driver.

Owns their making. A stream of torch's pool may be one that the program or NCCL uses, and one made
without the flag below ties itself to the default stream: work on either waits for the other.
"""

import ctypes
import logging
from typing import Any

_logger = logging.getLogger(__name__)

_CU_STREAM_NON_BLOCKING = 1


class DriverStreams:
    """Makes non-blocking streams.

    They are kept until the process ends: torch may still hold events that were recorded on them.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def make(self, device: int) -> Any | None:
        """A stream of this device; None, told once, if the driver gives none."""
        try:
            create = ctypes.CDLL("libcuda.so.1").cuStreamCreate
        except (OSError, AttributeError) as error:
            _logger.warning("no device times of asynchronous collectives: %s", error)
            return None
        handle = ctypes.c_void_p()
        with self._cuda.device(device):
            self._cuda.Event().record(self._cuda.current_stream(device))  # its context, made ours
            code = create(ctypes.byref(handle), _CU_STREAM_NON_BLOCKING)
        if code != 0 or handle.value is None:
            _logger.warning("no device times of asynchronous collectives: driver error %d", code)
            return None
        return self._cuda.ExternalStream(handle.value, device=device)
