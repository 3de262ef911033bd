"""CUDA's streams, events and graphs on a clock that a test moves. A helper, not a test.

A stream is the moment at which all that was put on it is done; an event remembers that moment.
What CUDA forbids is an error here: to ask after an event while a graph is being captured, or to
take the time between events that are not both done.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


class FakeStream:
    def __init__(self, gpu: "FakeCuda", device: int, number: int) -> None:
        self.gpu, self.device, self.cuda_stream = gpu, device, number
        self.done_at = 0
        self.waited_for: list[str] = []

    def run(self, duration_ns: int) -> None:
        self.done_at = max(self.done_at, self.gpu.now) + duration_ns

    def wait_until(self, moment: int, what: str) -> None:
        self.done_at = max(self.done_at, moment)
        self.waited_for.append(what)


class FakeEvent:
    made = 0

    def __init__(self, gpu: "FakeCuda", enable_timing: bool = False) -> None:
        self.gpu, self.timing = gpu, enable_timing
        self.at: int | None = None
        gpu.events += 1

    def record(self, stream: FakeStream) -> None:
        assert not self.gpu.captures, "an event that becomes part of a graph"
        if self.gpu.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.at = max(stream.done_at, self.gpu.now)

    def query(self) -> bool:
        assert not self.gpu.captures, "this would invalidate the capture"
        self.gpu.queries += 1
        assert self.at is not None, "never recorded"
        return self.at <= self.gpu.now

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.timing and end.timing and self.at is not None and end.at is not None
        assert self.at <= self.gpu.now and end.at <= self.gpu.now, "not both are done"
        return (end.at - self.at) / 1e6


class FakeWork:
    """What NCCL returns for async_op=True: its end is an event on NCCL's own stream."""

    def __init__(self, gpu: "FakeCuda", end: int) -> None:
        self._gpu, self._end = gpu, end
        self.released = False  # the tensors that it keeps for its stream
        self.waited_by_program = False

    def is_completed(self) -> bool:
        assert not self._gpu.captures, "this would invalidate the capture"
        return self._end <= self._gpu.now

    def wait(self) -> None:
        self.waited_by_program = True
        self.synchronize()

    def synchronize(self) -> None:
        assert self.waited_by_program, "tensors released before the program's stream waits"
        self.released = True
        self._gpu.current.wait_until(self._end, "work")


class FakeCuda:
    """In the place of `torch.cuda`; the time is in ns."""

    def __init__(self) -> None:
        self.now = 1_000
        self.events = self.queries = self.captures = 0
        self.broken = False
        self.made: list[FakeStream] = []
        self._defaults: dict[int, FakeStream] = {}
        self._nccl: dict[Any, FakeStream] = {}
        self._stack = [self.default(0)]

    def new_stream(self, device: int) -> FakeStream:
        self.made.append(FakeStream(self, device, 100 + len(self.made)))
        return self.made[-1]

    def default(self, device: int) -> FakeStream:
        return self._defaults.setdefault(device, FakeStream(self, device, device))

    @property
    def current(self) -> FakeStream:
        return self._stack[-1]

    def issue(self, group: Any, duration_ns: int, *, device: int = 0) -> FakeWork:
        """An asynchronous operation: on the group's own stream, after what is on the current."""
        stream = self._nccl.setdefault((group, device), FakeStream(self, device, -1))
        stream.done_at = max(stream.done_at, self.current_stream(device).done_at)
        stream.run(duration_ns)
        return FakeWork(self, stream.done_at)

    # ---- what torch.cuda has

    def Event(self, enable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self, enable_timing)

    def current_stream(self, device: int) -> FakeStream:
        return self.current if self.current.device == device else self.default(device)

    def is_current_stream_capturing(self) -> bool:
        return self.captures > 0

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self._stack.append(stream)
        try:
            yield
        finally:
            self._stack.pop()


class FakeGraphBase:
    """As torch's C++ class is."""

    log: list[str]

    def __init__(self) -> None:
        self.log = []

    def replay(self) -> None:
        """Run it."""
        self.log.append("replay")


def make_graph_class(gpu: FakeCuda) -> type:
    """As `torch.cuda.CUDAGraph` is: two methods of its own, one inherited."""

    class FakeGraph(FakeGraphBase):
        def capture_begin(self, pool: Any = None, fail: bool = False) -> None:
            """Begin."""
            if fail:
                raise RuntimeError("already capturing")
            gpu.captures += 1
            self.log.append(f"begin {pool}")

        def capture_end(self, fail: bool = False) -> None:
            gpu.captures -= 1
            if fail:
                raise RuntimeError("capture invalidated")
            self.log.append("end")

    return FakeGraph
