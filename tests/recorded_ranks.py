"""Real ranks that record to rings in a directory while a test looks at them from outside.

A rank's program is told the run directory, and waits for its test by `wait_for_test` until the test
says a word by `release`: so a hang ends, and a rank stays, for as long as the test looks.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onecast.comm.testing import RankFailed, run_ranks
from onecast.telemetry import CollectiveInstrumentor, RingReader, RingWriter, make_run_dir
from onecast.telemetry.hang import RankLook, look_at
from onecast.telemetry.ring import PHASE, pack_meta
from onecast.telemetry.run_directory import ring_path

_FOR_EVER_S = 60.0


def recording(rank: int, run_dir: str, world_size: int = 2) -> RingWriter:
    """Start recording this rank's collectives; until the process ends."""
    return instrumented(rank, run_dir, world_size)[0]


def instrumented(
    rank: int, run_dir: str, world_size: int = 2
) -> tuple[RingWriter, CollectiveInstrumentor]:
    """The same, with what records them."""
    ring = RingWriter(
        ring_path(run_dir, rank),
        capacity=4096,
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        engine_id="hanging",
    )
    instrumentor = CollectiveInstrumentor()
    instrumentor.instrument(ring)
    _until(lambda: len(list(Path(run_dir).glob("*.ring"))) == world_size, "all rings")
    return ring, instrumentor


@contextlib.contextmanager
def phase(ring: RingWriter, name: str) -> Iterator[None]:
    ticket = ring.begin(pack_meta(PHASE, ring.intern(name)), 0, 0)
    yield
    ring.end(ticket)


def wait_for_test(run_dir: str, word: str = "go") -> None:
    _until(Path(run_dir, word).exists, f"the word {word!r}")


def say(run_dir: str, word: str) -> None:
    Path(run_dir, word).touch()


def _until(found: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _FOR_EVER_S
    while not found():
        assert time.monotonic() < deadline, f"not within {_FOR_EVER_S} s: {what}"
        time.sleep(0.01)


class RecordedRanks:
    """Ranks at work; `looks` is what a sidecar sees of them."""

    def __init__(self, program: Callable[..., Any], world_size: int, run_dir: str) -> None:
        self.run_dir = run_dir
        self.world_size = world_size
        self.failure: RankFailed | None = None
        self._readers: dict[int, RingReader] = {}
        self._thread = threading.Thread(target=self._run, args=(program, world_size))
        self._thread.start()

    def _run(self, program: Callable[..., Any], world_size: int) -> None:
        try:
            run_ranks(program, world_size, self.run_dir, timeout_s=_FOR_EVER_S)
        except RankFailed as failure:
            self.failure = failure

    @property
    def readers(self) -> dict[int, RingReader]:
        for rank in range(self.world_size):
            path = ring_path(self.run_dir, rank)
            if rank not in self._readers and path.exists():
                self._readers[rank] = RingReader(path)
        return dict(sorted(self._readers.items()))

    def looks(self) -> list[RankLook]:
        return [look_at(reader, reader.drain().pending) for reader in self.readers.values()]

    def until(self, found: Callable[[], Any], what: str) -> Any:
        """Ask again and again until something was found."""
        deadline = time.monotonic() + 30
        while True:
            value = found()
            if value:
                return value
            assert time.monotonic() < deadline, f"not within 30 s: {what}"
            assert self._thread.is_alive(), f"the ranks have ended: {self.failure}"
            time.sleep(0.02)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.readers[rank].pid, number)

    def release(self, *words: str) -> None:
        for word in words or ("go", "leave"):
            say(self.run_dir, word)

    def join(self) -> None:
        self._thread.join()


@contextlib.contextmanager
def recorded_ranks(program: Callable[..., Any], world_size: int = 2) -> Iterator[RecordedRanks]:
    """`program(rank, run_dir)` on real ranks. At the end they are released, killed if need be."""
    # Not in shared memory: the start of any sidecar there clears the runs of the dead away.
    folder = tempfile.mkdtemp(prefix="onecast-recorded-")
    run_dir = make_run_dir(f"{folder}/run")
    ranks = RecordedRanks(program, world_size, run_dir)
    try:
        yield ranks
    finally:
        ranks.release()
        ranks._thread.join(0.5)
        for reader in ranks.readers.values() if ranks._thread.is_alive() else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(reader.pid, signal.SIGKILL)
        ranks.join()
        shutil.rmtree(folder)
