"""The sidecar tells of a hang while it lasts, and keeps the rings of what ended badly."""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from onecast.comm.testing import RankFailed, run_ranks
from onecast.telemetry import (
    RingReader,
    Session,
    TelemetrySettings,
    make_run_dir,
    start_session,
)
from onecast.telemetry.flight import FlightRun, kept_runs, read_run
from onecast.telemetry.run_directory import ring_path

LIMIT_S = 0.5


def _session(rank: int, run_dir: str, flight_dir: str) -> Session:
    """With what this process and its sidecar say in a file."""
    os.dup2(os.open(_log(flight_dir), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    return start_session(
        rank=rank,
        local_rank=rank,
        world_size=2,
        local_world_size=2,
        engine_id="hanging",
        settings=TelemetrySettings(hang_s=LIMIT_S, flight_dir=flight_dir),
        run_dir=run_dir,
    )


def _log(flight_dir: str) -> Path:
    return Path(flight_dir).with_suffix(".log")


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def _until(find: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 30
    while not (found := find()):
        assert time.monotonic() < deadline, f"not within 30 s: {what}"
        time.sleep(0.05)
    return found


def _hangs_and_goes_on(rank: int, run_dir: str, flight_dir: str) -> Any:
    session = _session(rank, run_dir, flight_dir)
    found = None
    tensor = torch.ones(4096)
    with session.step(0, batch_size=1):
        dist.all_reduce(tensor)
        if rank == 1:
            with session.phase("kv.swap_in"):
                Path(flight_dir).with_suffix(".swapping").touch()
                url = session.metrics_url
                assert url is not None
                base = url.removesuffix("/metrics")
                hangs = _until(lambda: json.loads(_get(f"{base}/hangs.json"))["hangs"], "a hang")
                found = hangs, _get(url)
        _until(Path(flight_dir).with_suffix(".swapping").exists, "the phase")
        dist.all_reduce(tensor)
    session.close()
    return found


def _kept(flight_dir: str, run_dir: str) -> FlightRun:
    """Not what a sidecar of this test may find of other runs in shared memory."""
    name = Path(run_dir).name.removeprefix("onecast-")
    (path,) = _until(
        lambda: [path for path in kept_runs(flight_dir) if path.name.endswith(name)], "the kept run"
    )
    return read_run(path)


def test_a_hang_is_logged_exported_and_kept_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    flight_dir, run_dir = str(tmp_path / "flight"), make_run_dir()
    _, (hangs, metrics) = run_ranks(_hangs_and_goes_on, 2, run_dir, flight_dir)
    (hang,) = hangs
    assert hang["text"].startswith("rank 0 waits in all_reduce #2 (default_pg, 16 KiB) for ")
    assert "rank 1 never entered it: last finished #1, now in kv.swap_in for " in hang["text"]
    assert [one["status"] for one in hang["ranks"]] == ["waits", "absent"]
    assert 'onecast_hangs_total{group="default_pg",op="all_reduce"} 1' in metrics
    assert "onecast_desyncs_total{" not in metrics
    run = _kept(flight_dir, run_dir)
    assert {one.state for one in run.ranks.values()} == {"ended"}
    said = _log(flight_dir).read_text()
    assert said.count("rank 1 never entered it") == 1, "told once"
    assert said.count("over after ") == 1
    assert f"its last events: onecast flight {run.path}" in said


def _dies_in_a_collective(rank: int, run_dir: str, flight_dir: str) -> None:
    session = _session(rank, run_dir, flight_dir)
    dist.all_reduce(torch.ones(4))
    if rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        with session.phase("model.forward"):
            dist.all_reduce(torch.ones(4096))
    with session.phase("kv.swap_in"):
        other = RingReader(ring_path(run_dir, 1))
        _until(lambda: not other.alive, "the other's death")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_rank_was_in_is_kept(
    tmp_path: Path,
) -> None:
    flight_dir, run_dir = str(tmp_path / "flight"), make_run_dir()
    with pytest.raises(RankFailed, match="SIGKILL"):
        run_ranks(_dies_in_a_collective, 2, run_dir, flight_dir)
    run = _kept(flight_dir, run_dir)
    assert run.ranks[1].was_in.startswith("in model.forward > all_reduce #2 (default_pg, 16 KiB)")
    assert run.ranks[0].was_in.startswith("in kv.swap_in")
    assert {one.state for one in run.ranks.values()} == {"dead"}
    assert "ended without closing telemetry" in run.reason
    _until(lambda: not Path(run_dir).exists(), "the run directory to go")
    assert f"its last events: onecast flight {run.path}" in _log(flight_dir).read_text()
