"""Rings of many ranks, written by one process at the pace of a busy engine, and a real sidecar.

Owns what a step of such an engine looks like in a ring, and the sidecar's process as seen from
outside: its address, its report, the CPU time it has taken. Knows nothing of what is measured.
"""

import http.client
import json
import os
import random
import subprocess
import sys
import time
import urllib.parse
from types import TracebackType
from typing import Any, Self

from onecast.telemetry.ring import COLLECTIVE, PHASE, STEP_KIND, RingWriter, pack_meta
from onecast.telemetry.run_directory import make_run_dir, remove_run_dir, ring_path
from onecast.telemetry.settings import TelemetrySettings

COLLECTIVES = 130  # a step
STEPS_PER_S = 100
_ENGINE = "bench"
_BATCH = 64
_RECORDS = 1 << 14  # what 8 ranks of this pace write in more than a second

# (operation, group, bytes): what a tensor-parallel rank calls most, and what is there besides.
_USUAL = [("all_reduce", "tp", 16 << 10)] * (COLLECTIVES - 2) + [
    ("broadcast", "frames", 24 << 10),
    ("all_gather", "tp", 64 << 10),
]
# What a rank of a training job with tensor, data and pipeline parallelism calls.
_VARIED = [
    ("all_reduce", "tp", 16 << 10),
    ("all_reduce", "tp", 1 << 20),
    ("all_gather_into_tensor", "tp", 256 << 10),
    ("all_gather_into_tensor", "dp", 16 << 20),
    ("reduce_scatter_tensor", "dp", 16 << 20),
    ("all_reduce", "dp", 512),
    ("broadcast", "world", 24 << 10),
    ("barrier", "world", 0),
    ("send", "pp", 4 << 20),
    ("recv", "pp", 4 << 20),
]


def cpu_s(pid: int) -> float:
    """User and system time that a process has taken so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Sidecar:
    """A sidecar for rings that this process writes; it ends once they are closed."""

    def __init__(self, ranks: int, settings: TelemetrySettings) -> None:
        self.run_dir = make_run_dir()
        command = [
            *(sys.executable, "-P", "-m", "onecast.telemetry.sidecar", "--run-dir", self.run_dir),
            *("--local-world-size", str(ranks), "--engine-id", _ENGINE),
            *("--settings", settings.to_json()),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            address = urllib.parse.urlsplit(json.loads(line)["ready"]["url"])
            self._host, self._port = str(address.hostname), int(address.port or 0)
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise RuntimeError(f"the sidecar did not start: {line!r}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def get(self, path: str) -> bytes:
        """The body at `path`, over a connection of its own."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"the sidecar answers {path} with status {response.status}")
        return body

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/report"))
        return found

    def close(self) -> None:
        assert self._process.stdout is not None
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        remove_run_dir(self.run_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Rank:
    """One ring, and the records of a step with times relative to its begin."""

    def __init__(self, run_dir: str, rank: int, ranks: int, varied: bool) -> None:
        self.ring = RingWriter(
            ring_path(run_dir, rank), capacity=1024 if varied else _RECORDS, rank=rank,
            local_rank=rank, world_size=ranks, local_world_size=ranks, engine_id=_ENGINE,
        )  # fmt: skip
        intern = self.ring.intern
        operations = _VARIED if varied else _USUAL
        self._step_meta = pack_meta(STEP_KIND)
        self._phases = [
            pack_meta(PHASE, intern(name)) for name in ("step.receive", "model.forward", "sample")
        ]
        random.seed(rank)
        length_ns = 10**9 // STEPS_PER_S * 8 // 10
        gap_ns = length_ns // len(operations)
        self._records = []
        for number, (op, group, nbytes) in enumerate(operations):
            meta = pack_meta(
                COLLECTIVE, intern(op), intern(f"{group}\t{group}-0"), intern("bfloat16"), ranks
            )
            begin = number * gap_ns + random.randrange(gap_ns // 4)
            end = begin + gap_ns // 4 + random.randrange(gap_ns // 4)
            self._records.append((begin, end, meta, nbytes, group))
        self._sequences = dict.fromkeys((group for _, group, _ in operations), 0)
        self._length_ns = length_ns
        self._ticket = -1
        self._begin_ns = 0

    def begin(self, step: int) -> None:
        self.ring.set_step(step)
        self._begin_ns = time.perf_counter_ns()
        self._ticket = self.ring.begin(self._step_meta, step, _BATCH)

    def end(self) -> None:
        """All that happened since `begin`; at least 80% of a step's time must have passed."""
        record, sequences, zero = self.ring.record, self._sequences, self._begin_ns
        part = self._length_ns // len(self._phases)
        for number, meta in enumerate(self._phases):
            record(zero + number * part, zero + (number + 1) * part, meta, 0, 0, 0)
        for begin, end, meta, nbytes, group in self._records:
            sequences[group] = sequence = sequences[group] + 1
            record(zero + begin, zero + end, meta, sequence, nbytes, 0)
        self.ring.end(self._ticket)


class Feeder:
    """Rings of `ranks` ranks in the sidecar's directory; `feed` writes steps into all of them."""

    def __init__(self, run_dir: str, ranks: int, *, varied: bool = False) -> None:
        self._ranks = [_Rank(run_dir, rank, ranks, varied) for rank in range(ranks)]
        self._step = 0

    def feed(self, steps: int, steps_per_s: float = STEPS_PER_S) -> float:
        """So many steps, at most so many a second; the seconds that it took."""
        start = time.monotonic()
        for number in range(steps):
            for rank in self._ranks:
                rank.begin(self._step)
            time.sleep(
                max(0.8 / STEPS_PER_S, start + (number + 1) / steps_per_s - time.monotonic())
            )
            for rank in self._ranks:
                rank.end()
            self._step += 1
        return time.monotonic() - start

    def close(self) -> None:
        for rank in self._ranks:
            rank.ring.close()
