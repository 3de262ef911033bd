"""A real node of rings that a test writes by hand, and a real server of it. No test itself."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onecast.telemetry import TelemetrySettings
from onecast.telemetry.http_server import TelemetryServer
from onecast.telemetry.node import Node
from onecast.telemetry.ring import COLLECTIVE, PHASE, STEP_KIND, RingWriter, pack_meta
from onecast.telemetry.tracing import Tracing

US = 1000
MS = 1_000_000


class WrittenNode:
    """`ranks` ranks whose records `write_step` makes up; `node` has taken in all of them."""

    def __init__(
        self, directory: Path, ranks: int = 4, *, hang_s: float = 0.0, **settings: Any
    ) -> None:
        self.writers = [
            RingWriter(
                directory / f"rank-{rank}.ring",
                capacity=1 << 14,
                rank=rank,
                local_rank=rank,
                world_size=ranks,
                local_world_size=ranks,
                engine_id="engine-1",
            )
            for rank in range(ranks)
        ]
        settings = {"trace_slow": False, "trace_skew_s": 0.0, **settings}
        self.node = Node(
            str(directory),
            engine_id="engine-1",
            local_world_size=ranks,
            tracing=Tracing(TelemetrySettings(**settings), "engine-1", {}),
            hang_s=hang_s,
        )
        self.steps = 0
        self._sequence = 0

    def write_steps(self, count: int, **options: Any) -> "WrittenNode":
        for _ in range(count):
            self.write_step(**options)
            self.node.poll()
        return self

    def write_step(
        self,
        *,
        collectives: int = 20,
        late_rank: int = 2,
        late_ns: int = 400 * US,
        ops: Sequence[str] = ("all_reduce", "all_gather", "broadcast"),
        group: str = "tp\tunique-tp",
        phase: str = "model.forward",
        dtype: str = "bfloat16",
    ) -> None:
        """One step of all ranks: collectives of 100 us, 200 us apart; every fourth, from the second
        on, waits for the late rank. All others come within 20 us."""
        step = self.steps
        jitter = random.Random(step)
        begin = time.perf_counter_ns() - (collectives + 2) * MS  # all of it is over by now
        cursor = begin + 300 * US
        calls = []
        for number in range(collectives):
            arrived = [cursor + jitter.randrange(20 * US) for _ in self.writers]
            if late_rank in range(len(self.writers)) and number % 4 == 1:
                arrived[late_rank] += late_ns
            ended = max(arrived) + 100 * US
            nbytes = 16384 if number % 2 else 2 << 20
            calls.append((ops[number % len(ops)], arrived, ended, nbytes))
            cursor = ended + 200 * US
        for rank, writer in enumerate(self.writers):
            writer.set_step(step)
            meta = pack_meta(PHASE, writer.intern(phase))
            writer.record(begin + 200 * US, cursor, meta, 0, 0, 0)
            for number, (op, arrived, ended, nbytes) in enumerate(calls, self._sequence + 1):
                meta = self.meta(writer, op, group, dtype)
                writer.record(arrived[rank], ended, meta, number, nbytes, 0)
            meta = pack_meta(PHASE, writer.intern("sample"))
            writer.record(cursor, cursor + 150 * US, meta, 0, 0, 0)
            writer.record(begin, cursor + 200 * US, pack_meta(STEP_KIND), step, 48, 0)
            writer.set_step(-1)
        self._sequence += collectives
        self.steps += 1

    def meta(self, writer: RingWriter, op: str, group: str, dtype: str = "") -> int:
        numbers = writer.intern(op), writer.intern(group), writer.intern(dtype)
        return pack_meta(COLLECTIVE, *numbers, len(self.writers))

    def enter(self, rank: int, op: str = "all_reduce", group: str = "tp\tunique-tp") -> int:
        """The rank begins the next collective and stays in it; returns the ticket."""
        writer = self.writers[rank]
        writer.set_step(self.steps)
        return writer.begin(self.meta(writer, op, group), self._sequence + 1, 16384)


@contextmanager
def serving(written: WrittenNode) -> Iterator[str]:
    """The sidecar's own server, on a free port; yields its address."""
    server = TelemetryServer("127.0.0.1", 0, written.node)
    try:
        yield server.url.removesuffix("/metrics")
    finally:
        server.close()
