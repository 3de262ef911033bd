"""What a session records of GPUs beside the host times: device times and replays of CUDA graphs.

Owns that the two belong together: nothing is timed while a graph is captured.
"""

from .cuda_graphs import CaptureLog
from .device_time import CudaDeviceTimer
from .ring import RingWriter


class GpuRecording:
    """The timer and the log of one rank, for the interception; patches CUDAGraph from now on."""

    def __init__(self, ring: RingWriter) -> None:
        self.captures = CaptureLog(ring.path.with_suffix(".graphs"), ring)
        self.timer = CudaDeviceTimer(ring, self.captures)
        self.captures.instrument()

    def resolve(self) -> None:
        """At the end of each step: write down the device times that are known by now."""
        self.timer.resolve()

    def close(self, timeout_s: float = 2.0) -> None:
        """After `uninstrument`, before the ring closes; waits at most so long for the GPU.

        0, after an error: it does not wait. A forked child only calls `captures.uninstrument`.
        """
        self.timer.close(timeout_s)
        self.captures.uninstrument()


def open_gpu_recording(ring: RingWriter) -> GpuRecording | None:
    """None where torch has no CUDA: the interception then has nothing to ask."""
    import torch

    # Not is_available(): it would start the driver, which a later fork does not survive.
    return GpuRecording(ring) if torch.version.cuda is not None else None
