"""Ranks and sidecars as processes that can be killed. A helper of the tests, not a test."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_runs import onecast_processes
from prometheus_client.parser import text_string_to_metric_families

from onecast.telemetry import Session, TelemetrySettings, start_session
from onecast.telemetry.sidecar_record import SidecarRecord

# Rank argv[1] of argv[2] in argv[3], with settings argv[4] as JSON. Says "ready <url>", makes as
# many steps as each line of its input says, answers their sum, and closes at the end of its input.
RANK = """
import sys, json
from onecast.telemetry import TelemetrySettings, start_session
rank, size = int(sys.argv[1]), int(sys.argv[2])
session = start_session(rank=rank, local_rank=rank, world_size=size, local_world_size=size,
                        engine_id="e", run_dir=sys.argv[3],
                        settings=TelemetrySettings(**json.loads(sys.argv[4])))
print("ready", session.metrics_url, flush=True)
done = 0
for line in sys.stdin:
    for _ in range(int(line)):
        with session.step(done, 1), session.phase("model.forward"):
            session.set_value("sequences.running", done)
        done += 1
    print(done, flush=True)
final = session.close()
print(json.dumps(final), flush=True)
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where run directories of this test lie, apart from all others; none of them may stay."""
    with tempfile.TemporaryDirectory(prefix="test-onecast-", dir="/dev/shm") as folder:
        monkeypatch.setattr("onecast.telemetry.run_directory._parent", lambda: folder)
        yield Path(folder)
        wait_until(lambda: not onecast_processes(), "ranks and sidecars to end")
        assert os.listdir(folder) == []


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
    return found


class RankProcess:
    """One rank that makes steps when it is told to."""

    def __init__(self, rank: int, size: int, run_dir: str, **settings: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", RANK, str(rank), str(size), run_dir, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(errors := tempfile.TemporaryFile("w+")),  # no pipe: its sidecar shares it
            text=True,
        )
        self._errors = errors
        self.url = ""

    def wait_ready(self) -> str:
        word, self.url = self._line().split()
        assert word == "ready"
        return self.url

    def make_steps(self, number: int) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return int(self._line())

    def finish(self) -> Any:
        """Close the session; its final report."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        report = json.loads(self._line())
        assert self.process.wait(20) == 0
        self.kill()
        return report

    def kill(self) -> str:
        """The end by SIGKILL; what was said on stderr."""
        self.process.kill()
        self.process.wait()
        self._errors.seek(0)
        text = self._errors.read()
        for file in (self.process.stdin, self.process.stdout, self._errors):
            assert file is not None
            file.close()
        return text

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the rank has ended: {self.kill()}"
        return line


@contextmanager
def rank_processes(size: int, run_dir: str, **settings: Any) -> Iterator[list[RankProcess]]:
    ranks: list[RankProcess] = []
    try:
        for rank in range(size):
            ranks.append(RankProcess(rank, size, run_dir, **settings))
        for each in ranks:
            each.wait_ready()
        yield ranks
    finally:
        for each in ranks:
            if not each._errors.closed:
                each.kill()


def alone(run_dir: str | None = None, **changes: Any) -> Session:
    """A session of a single rank in this process."""
    any_port = changes.pop("any_port", False)
    return start_session(
        rank=0,
        local_rank=0,
        world_size=1,
        local_world_size=1,
        engine_id="alone",
        settings=TelemetrySettings(**changes),
        run_dir=run_dir,
        any_port=any_port,
    )


def sidecar_of(run_dir: str | None) -> SidecarRecord:
    assert run_dir is not None
    record = SidecarRecord.read(run_dir)
    assert record is not None
    return record


def next_sidecar(run_dir: str | None, last: SidecarRecord) -> SidecarRecord:
    """The one after `last`, once it listens."""

    def found() -> SidecarRecord | None:
        record = sidecar_of(run_dir)
        return record if record.pid != last.pid and record.alive else None

    record = wait_until(found, "another sidecar")
    assert isinstance(record, SidecarRecord)
    return record


def scrape(url: str | None) -> dict[Any, float]:
    assert url is not None
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def steps_on(url: str | None, rank: int = 0) -> float:
    name = ("onecast_step_duration_seconds_count", ("rank", str(rank)))
    return scrape(url).get(name, 0.0)
