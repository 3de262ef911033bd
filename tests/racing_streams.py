"""Streams that run as late and in as wild an order as CUDA allows, over memory that tells races.

A helper, not a test. What is put on a stream happens when a seeded random choice comes to it, held
back only by what precedes it there and by the events that the stream waits for. Every access to a
row is checked against the last ones: two, of which one writes, must be ordered by streams, events
or the host's own waiting (vector clocks), however they happened to fall this time.

    host clock  --(put on a stream)-->  stream clock  --(record)-->  event  --(wait)-->  stream
                                                                     event  --(query)--> host
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Clock = dict[str, int]
Row = tuple[int, int]  # memory, and the row in it


class Race(AssertionError):
    """Two accesses to a row that nothing orders."""


class Access(NamedTuple):
    actor: str
    tick: int
    what: str

    def before(self, clock: Clock) -> bool:
        return clock.get(self.actor, 0) >= self.tick


def join(clock: Clock, other: Clock) -> None:
    for actor, tick in other.items():
        clock[actor] = max(clock.get(actor, 0), tick)


class Stream:
    def __init__(self, machine: "Machine", name: str) -> None:
        self.machine, self.name = machine, name
        self.clock: Clock = {}
        self.queue: deque[Callable[[], bool]] = deque()  # each done once it returns True
        self.put = self.done = 0  # so many of all that ever came

    def submit(self, work: Callable[[Clock], object]) -> None:
        """`work` gets the clock of what precedes it."""
        join(self.clock, self.machine.host)
        self.clock[self.name] = self.put = self.put + 1
        clock = dict(self.clock)

        def step() -> bool:
            work(clock)
            return True

        self.queue.append(step)

    def wait_event(self, event: "Event") -> None:
        self.machine.log.append(f"{self.name} waits for {event.stream and event.stream.name}")
        if self.name in self.machine.deaf or event.stream is None:
            return
        join(self.clock, event.clock)
        self.put += 1
        stream, put = event.stream, event.put  # as recorded by now
        self.queue.append(lambda: stream.done >= put)

    def wait_stream(self, other: "Stream") -> None:
        event = Event(self.machine)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.machine.run_until(lambda: self.done >= self.put)
        join(self.machine.host, self.clock)


class Event:
    def __init__(self, machine: "Machine") -> None:
        self.machine = machine
        self.stream: Stream | None = None
        self.clock: Clock = {}
        self.put = 0
        machine.events_made += 1

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.machine.current
        join(self.stream.clock, self.machine.host)
        self.clock, self.put = dict(self.stream.clock), self.stream.put
        self.machine.log.append(f"event on {self.stream.name}")

    def query(self) -> bool:
        over = self.stream is None or self.stream.done >= self.put
        if over:
            join(self.machine.host, self.clock)
        return over

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query()
        return 1.0

    def synchronize(self) -> None:
        if not self.query():
            self.machine.log.append("the host waits")
            self.machine.run_until(self.query)


class Machine:
    """All streams, the host, and the memory that both share."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.host: Clock = {"host": 1}
        self.streams: list[Stream] = []
        self.stack = [self.stream("default")]
        self.deaf: set[str] = set()  # streams that wait for nothing: what a forgotten wait leaves
        self.log: list[str] = []
        self.events_made = 0
        self.memories: dict[int, tuple[str, int]] = {}  # by address: name, bytes of a row
        self.homes: dict[int, str] = {}  # of a tensor on the device: the stream it was made on
        self.recorded: set[tuple[int, str]] = set()  # memory and another stream that uses it
        self._kept: list[torch.Tensor] = []
        self._writes: dict[Row, Access] = {}
        self._reads: dict[Row, dict[str, Access]] = {}

    @property
    def current(self) -> Stream:
        return self.stack[-1]

    def stream(self, name: str) -> Stream:
        self.streams.append(Stream(self, name))
        return self.streams[-1]

    def tick(self, most: int) -> None:
        """Let up to `most` things happen."""
        for _ in range(most):
            heads = [stream for stream in self.streams if stream.queue]
            self.rng.shuffle(heads)
            if not any(self._step(stream) for stream in heads):
                assert not heads, "every stream waits"
                return

    def _step(self, stream: Stream) -> bool:
        if stream.queue[0]():
            stream.queue.popleft()
            stream.done += 1
            return True
        return False

    def run_until(self, over: Callable[[], bool]) -> None:
        while not over():
            assert any(stream.queue for stream in self.streams), "nothing is under way"
            self.tick(1)

    def finish(self) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self.streams))

    def abandon(self) -> None:
        """Let nothing more happen."""
        for stream in self.streams:
            stream.queue.clear()
            stream.done = stream.put

    # ---- memory

    def adopt(self, tensor: torch.Tensor, name: str) -> None:
        address = tensor.untyped_storage().data_ptr()
        self.memories[address] = (name, tensor.stride(0) * tensor.element_size())
        self._kept.append(tensor)  # or its address would become that of another

    def rows(self, tensor: torch.Tensor) -> list[Row]:
        address = tensor.untyped_storage().data_ptr()
        assert address in self.memories, "memory that nobody told of"
        row_bytes = self.memories[address][1]
        assert tensor.is_contiguous()
        begin = tensor.data_ptr() - address
        return [
            (address, row)
            for row in range(begin // row_bytes, -(-(begin + tensor.nbytes) // row_bytes))
        ]

    def access(
        self, actor: str, clock: Clock, reads: Sequence[Row], writes: Sequence[Row], what: str
    ) -> None:
        mine = Access(actor, clock[actor], what)
        for row in (*reads, *writes):
            last = self._writes.get(row)
            if last is not None and not last.before(clock):
                self._race(row, last, mine)
        for row in writes:
            for read in self._reads.pop(row, {}).values():
                if not read.before(clock):
                    self._race(row, read, mine)
            self._writes[row] = mine
        for row in reads:
            self._reads.setdefault(row, {})[actor] = mine

    def _race(self, row: Row, one: Access, other: Access) -> None:
        name = self.memories[row[0]][0]
        raise Race(f"{name} {row[1]}: {one.what} on {one.actor}, {other.what} on {other.actor}")

    def host_writes(self, tensor: torch.Tensor, what: str) -> None:
        self.host["host"] += 1
        self.access("host", self.host, [], self.rows(tensor), what)

    def submit(
        self,
        reads: Sequence[Row],
        writes: Sequence[Row],
        work: Callable[[], object],
        what: str,
    ) -> None:
        """On the current stream."""
        stream = self.current

        def happen(clock: Clock) -> None:
            self.access(stream.name, clock, reads, writes, what)
            work()

        self._check_home([row[0] for row in (*reads, *writes)])
        stream.submit(happen)

    def move_rows(
        self, source: torch.Tensor, destination: torch.Tensor, pairs: torch.Tensor, programs: int
    ) -> None:
        """In the place of the kernel: which rows, it knows when it runs."""
        assert programs > 0
        stream, given = self.current, self.rows(pairs)
        from_rows, to_rows = self.rows(source), self.rows(destination)

        def happen(clock: Clock) -> None:
            self.access(stream.name, clock, given, [], "kernel")
            moved = [(a, b) for a, b in pairs.tolist() if from_rows[a] != to_rows[b]]
            self.rng.shuffle(moved)
            reads, writes = [from_rows[a] for a, _ in moved], [to_rows[b] for _, b in moved]
            assert len(set(writes)) == len(writes) and not set(reads) & set(writes)
            self.access(stream.name, clock, reads, writes, "kernel")
            for a, b in moved:
                destination[b] = source[a]

        self._check_home([rows[0][0] for rows in (given, from_rows, to_rows) if rows])
        self.log.append(f"kernel of {len(pairs)} on {stream.name}")
        stream.submit(happen)

    def _check_home(self, addresses: Sequence[int]) -> None:
        name = self.current.name
        for address in set(addresses):
            home = self.homes.get(address, name)
            assert home == name or (address, name) in self.recorded, (
                f"memory of {home} would be given to others while {name} uses it"
            )
