"""Ranks and sidecars as processes that can be killed. A helper of the tests, not a test."""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
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
    """One rank that makes steps when it is told to: a fork of this process, for torch is here.

    It says "ready <url>", makes as many steps as each line of its input says, answers their sum,
    and at the end of its input closes and answers its final report.
    """

    def __init__(self, rank: int, size: int, run_dir: str, **settings: Any) -> None:
        self.run_dir = run_dir
        self.url = ""
        self._errors = tempfile.TemporaryFile("w+")  # no pipe: its sidecar shares it
        there, here = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.dup2(self._errors.fileno(), 2)
                sys.stderr = sys.__stderr__  # not pytest's, nor its log handlers
                logging.getLogger().handlers.clear()
                _close_all_but(2, there[0], here[1])
                with open(there[0]) as told, open(here[1], "w", buffering=1) as tell:
                    _be_rank(rank, size, run_dir, settings, told, tell)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(there[0])
        os.close(here[1])
        self._tell = open(there[1], "w", buffering=1)
        self._told = open(here[0])

    def wait_ready(self) -> str:
        word, self.url = self._line().split()
        assert word == "ready"
        return self.url

    def make_steps(self, number: int) -> int:
        self._tell.write(f"{number}\n")
        return int(self._line())

    def close_session(self) -> None:
        """Do not wait for what comes of it."""
        self._tell.close()

    def finish(self) -> Any:
        """Close the session; its final report."""
        self.close_session()
        report = json.loads(self._line())
        self.kill()
        return report

    def kill(self) -> str:
        """The end by SIGKILL; what was said on stderr."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._errors.seek(0)
        text = self._errors.read()
        for file in (self._tell, self._told, self._errors):
            file.close()
        return text

    @property
    def over(self) -> bool:
        return self._errors.closed

    def _line(self) -> str:
        line = self._told.readline()
        assert line, f"the rank has ended: {self.kill()}"
        return line


def _close_all_but(*kept: int) -> None:
    """What belongs to other ranks: their pipes must end when this test closes them."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _be_rank(
    rank: int, size: int, run_dir: str, settings: dict[str, Any], told: Any, tell: Any
) -> None:
    session = start_session(
        rank=rank,
        local_rank=rank,
        world_size=size,
        local_world_size=size,
        engine_id="e",
        settings=TelemetrySettings(**settings),
        run_dir=run_dir,
    )
    print("ready", session.metrics_url, file=tell)
    done = 0
    for line in told:
        for _ in range(int(line)):
            with session.step(done, 1), session.phase("model.forward"):
                session.set_value("sequences.running", done)
            done += 1
        print(done, file=tell)
    print(json.dumps(session.close()), file=tell)
    told.read()


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
            if not each.over:
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
