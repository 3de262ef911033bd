"""How long a collective took on the GPU, from CUDA events, without ever waiting for the GPU.

Owns which operations are timed, and on which stream their events go (`device_events` has those).
Refuses to know metrics and spans: what it finds out goes into the ring as DEVICE records, late and
in any order.

What is measured, on NCCL:

    user's stream   ..compute.. [begin] [NCCL kernel] [end] ..compute..        async_op=False

    user's stream   ..compute.. [begin] ..compute.. wait ..compute..           async_op=True
    NCCL's stream                  [NCCL kernel] .
    side stream                                  ..[end]

    begin   on the stream that is current when the operation is issued: the moment at which its
            input is ready. An operation that queues behind others of its group counts the queue.
    end     without a Work (what torch does for async_op=False): the kernel was put on the current
            stream itself, so the very next event there is its end.
    end     with a Work: an event on the current stream after Work.wait would come after all the
            compute that was queued in between, so it goes onto a stream of our own, which first
            waits for the Work. The current stream gets nothing but `begin`.

Why the side stream waits for the Work only once the program has waited for it: whoever waits for a
WorkNCCL first releases the tensors that it keeps alive for the NCCL stream, internal buffers among
them; done any earlier, the allocator could hand out memory that NCCL still writes. Holding the Work
or its future instead would keep the program's output tensors alive, or tie them to another stream.
The price: an operation that was over before the program waited for it has no end anybody knows; it
is not timed, and counted as `over`. What is fully hidden behind compute is thus missing from the
device times (the host times have it).

The side stream is one per group and device, and nobody else's, see `cuda_streams`.

While any CUDA graph is captured nothing is recorded and nothing asked: asking after an event
can invalidate a capture of another thread. Operations between `_start_coalescing` and
`_end_coalescing` of torch's coalescing manager are not timed: their kernels start at its end.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Container
from typing import Any, Protocol

from .cuda_graphs import CaptureLog
from .cuda_streams import DriverStreams
from .device_events import EventPool, Timing
from .ring import DEVICE

_logger = logging.getLogger(__name__)

_LOOKS = 4  # operations looked at per operation that is issued: more than come in
_LOOKS_A_STEP = 256  # and per stream at the end of a step
_SIDE_STREAMS = 32


class DeviceTimer(Protocol):
    """What the interception calls around an operation whose payload may lie on a GPU.

    mark = timer.issued(handle, value)        right before the call; None: this one is not timed
    timer.finished(mark, work, step, ...)     right after it, only with a mark
    timer.waited(mark, work)                  right after the Work's own wait has returned
    timer.dropped(mark)                       instead, if the call or the wait raised or the Work
                                              was collected
    """

    def issued(self, handle: Any, value: Any) -> Any | None:
        """`handle`: the ProcessGroup or Backend; `value`: the payload, a tensor or (nested) list.

        Cheap for what is not on a GPU. None also while a CUDA graph is captured.
        """

    def finished(
        self, mark: Any, work: Any | None, step: int, begin_ns: int, meta: int, sequence: int,
        nbytes: int,
    ) -> None:  # fmt: skip
        """`work`: what the call returned. The rest is what the COLLECTIVE record holds."""

    def waited(self, mark: Any, work: Any) -> None: ...

    def dropped(self, mark: Any) -> None: ...


class TimedRecorder(Protocol):
    """Where device times go; `RingWriter` is one."""

    @property
    def record_in_step(self) -> Callable[[int, int, int, int, int, int, int], None]: ...


class CudaDeviceTimer:
    """Times operations on GPUs; one per ring. Safe for several threads.

    At most `pool` operations per device are open at a time; what does not fit is not timed, and
    counted. `skipped`: operations on a GPU without a device time, by reason:

        pool_full   more operations open than events
        over        over before the program waited for it, see above
        capturing   a CUDA graph was being captured when it was waited for
        unwaited    nobody waited for it, or the call or the wait failed
        no_stream   the driver gave no stream to time operations with a Work on
        unfinished  not over when the timer was closed
        error       CUDA refused an event; logged once, and nothing is timed from then on
    """

    def __init__(
        self, recorder: TimedRecorder, captures: CaptureLog, *, pool: int = 2048, cuda: Any = None,
        coalescing: Container[Any] | None = None,
        make_stream: Callable[[int], Any] | None = None,
    ) -> None:  # fmt: skip
        if pool < 1:
            raise ValueError(f"pool is {pool}; it must be at least 1")
        if cuda is None or coalescing is None:
            import torch
            from torch.distributed import distributed_c10d

            cuda = torch.cuda if cuda is None else cuda
            if coalescing is None:
                coalescing = distributed_c10d._world.pg_coalesce_state
        self.skipped: Counter[str] = Counter()
        self.timed = 0
        self._record = recorder.record_in_step
        self._captures = captures
        self._cuda = cuda
        self._coalescing = coalescing
        self._make_stream = make_stream or DriverStreams(cuda).make
        self._events = EventPool(cuda, captures, pool, self._write)
        self._side: dict[tuple[int, int], Any] = {}  # by device and group
        self._off = False

    @property
    def waiting(self) -> int:
        """Operations whose time is not known yet."""
        return self._events.waiting

    # ---- around an operation

    def issued(self, handle: Any, value: Any) -> Any | None:
        tensor = value
        while type(tensor) in (list, tuple):
            if not tensor:
                return None
            tensor = tensor[0]
        if not getattr(tensor, "is_cuda", False) or self._off:
            return None
        if self._captures.open or self._cuda.is_current_stream_capturing():
            return None
        if handle in self._coalescing:
            return None
        device: int = tensor.device.index
        try:
            self._events.look(_LOOKS)
            mark = self._events.take(device)
            if mark is None:
                self.skipped["pool_full"] += 1
                return None
            mark.stream = self._cuda.current_stream(device)
            mark.begin.record(mark.stream)
        except RuntimeError as error:
            self._give_up(error)
            return None
        mark.key = id(handle)
        return mark

    def finished(
        self, mark: Any, work: Any | None, step: int, begin_ns: int, meta: int, sequence: int,
        nbytes: int,
    ) -> None:  # fmt: skip
        mark.step, mark.begin_ns, mark.sequence, mark.nbytes = step, begin_ns, sequence, nbytes
        mark.meta = meta & ~0xF | DEVICE
        if work is None:
            self._end(mark, mark.stream)

    def waited(self, mark: Any, work: Any) -> None:
        try:
            with self._captures.lock:
                capturing = self._captures.open > 0
                over = capturing or work.is_completed()
            stream = None if over else self._side_stream(mark)
            if stream is None:
                self._skip(mark, "capturing" if capturing else "over" if over else "no_stream")
                return
            with self._cuda.stream(stream):
                work.synchronize()  # this stream waits, nobody else does
        except RuntimeError as error:
            self._give_up(error)
            return
        self._end(mark, stream)

    def dropped(self, mark: Any) -> None:
        self._skip(mark, "unwaited")

    def _end(self, mark: Timing, stream: Any) -> None:
        try:
            self._events.end(mark, stream)
        except RuntimeError as error:
            self._give_up(error)

    def _skip(self, mark: Timing, reason: str) -> None:
        self.skipped[reason] += 1
        self._events.give(mark)

    # ---- later

    def resolve(self) -> None:
        """Once a step: write down what is known by now, a bounded number of operations."""
        if self._off or not self.waiting or self._cuda.is_current_stream_capturing():
            return
        try:
            self._events.look_everywhere(_LOOKS_A_STEP)
        except RuntimeError as error:
            self._give_up(error)

    def close(self, timeout_s: float = 2.0) -> None:
        """Give what is still running a moment to end; what does not is counted as unfinished."""
        deadline = time.monotonic() + timeout_s
        while self.waiting and not self._off:
            before = self.waiting
            self.resolve()
            if self.waiting == before:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.001)
        if self.waiting:
            self.skipped["unfinished"] += self.waiting
        self._off = True
        self._events.clear()
        self._side.clear()

    def _write(self, timing: Timing) -> None:
        duration_ns = round(timing.begin.elapsed_time(timing.end) * 1e6)
        self._record(
            timing.step, timing.begin_ns, timing.begin_ns + duration_ns, timing.meta,
            timing.sequence, timing.nbytes, 0,
        )  # fmt: skip
        self.timed += 1

    def _side_stream(self, mark: Timing) -> Any | None:
        key = mark.device, mark.key
        if key not in self._side:
            of_device = [stream for (device, _), stream in self._side.items() if device == key[0]]
            if len(of_device) >= _SIDE_STREAMS:  # groups come and go: one more shares a stream
                self._side[key] = of_device[mark.key // 16 % _SIDE_STREAMS]
            else:
                self._side[key] = self._make_stream(mark.device)
        return self._side[key]

    def _give_up(self, error: RuntimeError) -> None:
        """An error of CUDA stays with the process: the program will hear of it by itself."""
        self.skipped["error"] += 1
        if not self._off:
            self._off = True
            _logger.warning("no more device times of collectives: %s", error)
