"""Kept runs: whole, small, private and few; and shared memory is cleared of the dead alone."""

import fcntl
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from written_rings import WrittenRing

from onecast.telemetry import RingReader, RingWriter
from onecast.telemetry import flight_keep as keeping
from onecast.telemetry.flight import keep, kept_runs, read_run, sweep
from onecast.telemetry.flight_ring import read_ring
from onecast.telemetry.ring import process_start_time
from onecast.telemetry.run_directory import LOCK, locked, ring_path


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """In place of /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    return folder


def a_run(parent: Path, *, ranks: int = 2, dead: bool = True, capacity: int = 1024) -> Path:
    run_dir = parent / f"onecast-{secrets.token_hex(8)}"
    run_dir.mkdir(0o700)
    (run_dir / LOCK).touch()
    for rank in range(ranks):
        ring = WrittenRing(run_dir, rank, capacity=capacity)
        for number in range(1, 31):
            ring.call(number, number + 0.5, number)
        ring.call(40, None, 31)
        if dead:
            ring.die()
    return run_dir


def test_a_kept_run_is_what_it_was_and_small_and_private(parent: Path, tmp_path: Path) -> None:
    run_dir = a_run(parent, capacity=65536)
    (run_dir / "rank-1.graphs").write_text('{"name": "decode 8", "collectives": []}\n')
    (run_dir / "sidecar.json").write_text("{}")
    (run_dir / "sidecar.state").write_bytes(b"not kept")
    flight_dir = tmp_path / "a" / "flight"
    path = keep(run_dir, flight_dir, reason="rank 1 died")
    assert path.parent == flight_dir and path.name.endswith(run_dir.name.removeprefix("onecast-"))
    assert sorted(os.listdir(path)) == [
        "kept.json", "rank-0.ring", "rank-1.graphs", "rank-1.ring", "sidecar.json",
    ]  # fmt: skip
    for folder in (flight_dir, path):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}
    assert (path / "rank-0.ring").stat().st_size < 100_000
    assert sum(file.stat().st_blocks * 512 for file in path.iterdir()) < 100_000
    before, after = read_run(run_dir), read_run(path)
    assert (after.kind, after.reason, after.problems) == ("kept", "rank 1 died", [])
    for rank in (0, 1):
        assert (before.ranks[rank].image.rows == after.ranks[rank].image.rows).all()
        assert before.ranks[rank].image.names == after.ranks[rank].image.names
        assert after.ranks[rank].state == "dead"
    assert after.ranks[1].graphs == ["decode 8"]
    drained = RingReader(path / "rank-0.ring").drain()
    assert (len(drained.rows), len(drained.pending), drained.lost) == (30, 1, 0)


def test_a_ring_that_went_round_is_kept_from_its_oldest_record(
    parent: Path, tmp_path: Path
) -> None:
    run_dir = parent / "onecast-0123456789abcdef"
    run_dir.mkdir()
    ring = WrittenRing(run_dir, 0, capacity=64)
    for number in range(1, 1001):
        ring.call(number, number + 0.5, number)
    path = keep(run_dir, tmp_path / "flight")
    assert read_ring(path / "rank-0.ring").rows[:, 4].tolist() == list(range(937, 1001))
    assert read_run(path).ranks[0].state == "running", "as it was when it was kept"
    assert RingReader(path / "rank-0.ring").drain().lost == 936


def test_only_the_latest_runs_stay(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, flight_dir = a_run(parent), tmp_path / "flight"
    paths = []
    for day in range(12):
        monkeypatch.setattr(keeping.time, "strftime", lambda *_, d=day: f"202601{d + 10}T000000Z")
        paths.append(keep(run_dir, flight_dir))
    assert kept_runs(flight_dir) == paths[:1:-1]
    (flight_dir / ".new-0123").mkdir()  # of a keeper that was killed
    (flight_dir / "mine").mkdir()
    (flight_dir / "20250101T000000Z-link").symlink_to(tmp_path)
    monkeypatch.setattr(keeping, "MAX_BYTES", 1)
    last = keep(run_dir, flight_dir)
    assert sorted(os.listdir(flight_dir)) == sorted(
        [".lock", "20250101T000000Z-link", "mine", last.name]
    )
    assert tmp_path.exists() and run_dir.exists()


def test_what_is_too_large_loses_its_oldest_records(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MAX_BYTES", 2 * 64 * 64)
    run_dir = parent / "onecast-0123456789abcdef"
    run_dir.mkdir()
    for rank in range(2):
        ring = WrittenRing(run_dir, rank)
        for number in range(1, 301):
            ring.call(number, number + 0.5, number)
    path = keep(run_dir, tmp_path / "flight")
    assert read_ring(path / "rank-1.ring").rows[:, 4].tolist() == list(range(237, 301))


def test_nothing_is_kept_by_halves(parent: Path, tmp_path: Path) -> None:
    flight_dir = tmp_path / "flight"
    empty = parent / "onecast-0123456789abcdef"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"nothing to keep in .*: no rank has recorded"):
        keep(empty, flight_dir)
    (empty / "rank-0.ring").write_bytes(b"x" * 5000)
    with pytest.raises(FileNotFoundError, match="is not a telemetry ring"):
        keep(empty, flight_dir)
    WrittenRing(empty, 1).call(1, 2, 1)
    path = keep(empty, flight_dir)
    assert "rank-0.ring was not kept" in " ".join(read_run(path).problems)
    assert sorted(os.listdir(flight_dir)) == [".lock", path.name]


def test_a_flight_directory_of_others_is_refused(parent: Path, tmp_path: Path) -> None:
    run_dir = a_run(parent)
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    with pytest.raises(NotADirectoryError, match=r"flight_dir .*link is no directory"):
        keep(run_dir, link)
    target.chmod(0o777)
    with pytest.raises(PermissionError, match=r"may be written by everyone \(mode 777\)"):
        keep(run_dir, target)
    if os.getuid() == 0:
        target.chmod(0o700)
        os.chown(target, 12345, 12345)
        with pytest.raises(PermissionError, match="belongs to user 12345, not to 0"):
            keep(run_dir, target)
    assert not os.listdir(target)


def test_links_in_a_run_directory_are_not_followed(parent: Path, tmp_path: Path) -> None:
    run_dir = a_run(parent)
    secret = tmp_path / "secret"
    secret.write_text("of somebody else")
    (run_dir / "rank-0.graphs").symlink_to(secret)
    (run_dir / "rank-7.ring").symlink_to(run_dir / "rank-0.ring")
    path = keep(run_dir, tmp_path / "flight")
    assert sorted(os.listdir(path)) == ["kept.json", "rank-0.ring", "rank-1.ring"]
    left_out = json.loads((path / "kept.json").read_text())["left_out"]
    assert set(left_out) == {"rank-0.graphs", "rank-7.ring"}


def test_keepers_take_turns(parent: Path, tmp_path: Path) -> None:
    run_dir, flight_dir = a_run(parent), tmp_path / "flight"
    kept: list[Path] = []
    threads = [
        threading.Thread(target=lambda: kept.append(keep(run_dir, flight_dir))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(kept)) == 4 and sorted(kept) == sorted(kept_runs(flight_dir))
    for path in kept:
        assert len(read_run(path).ranks) == 2


# ---- sweeping


def test_a_run_whose_processes_are_dead_moves_away(parent: Path, tmp_path: Path) -> None:
    run_dir = a_run(parent)
    (path,) = sweep(tmp_path / "flight", parent)
    assert not run_dir.exists()
    run = read_run(path)
    assert (run.kind, run.reason) == ("kept", "all its processes were killed")
    assert len(run.ranks) == 2
    assert sweep(tmp_path / "flight", parent) == []


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process.pid
    process.kill()
    process.wait()


def test_a_run_in_use_stays(parent: Path, tmp_path: Path, sleeper: int) -> None:
    living = a_run(parent, dead=False)
    with_sidecar = a_run(parent)
    record = {
        "pid": sleeper, "start_time": process_start_time(sleeper), "started_ns": 0, "url": None,
    }  # fmt: skip
    (with_sidecar / "sidecar.json").write_text(json.dumps(record))
    joining = a_run(parent)
    read_by_another_container = a_run(parent)
    state = read_by_another_container / "sidecar.state"
    state.touch()
    starting = a_run(parent, ranks=1)  # of two
    agreed_on = parent / "onecast-00112233aabbccdd"
    agreed_on.mkdir()
    of_another_version = a_run(parent)
    with open(of_another_version / "rank-1.ring", "r+b") as file:
        file.seek(8)
        file.write((77).to_bytes(8, "little"))
    with locked(str(joining), 1.0), open(state) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sweep(tmp_path / "flight", parent) == []
    stay = (living, with_sidecar, joining, read_by_another_container, starting, agreed_on)
    for path in (*stay, of_another_version):
        assert path.is_dir(), path
    assert len(sweep(tmp_path / "flight", parent)) == 2, "those whose locks were held"


def test_a_run_that_died_this_moment_is_left_to_whoever_started_it(
    parent: Path, tmp_path: Path
) -> None:
    run_dir = a_run(parent, ranks=1)
    ring = WrittenRing(run_dir, 1)
    now = time.perf_counter_ns()
    ring.ring.record(now, now, 1, 1, 1, 0)
    ring.die()
    assert sweep(tmp_path / "flight", parent) == []
    for number in range(100):
        ring.call(number, number + 1, number)  # long ago
    assert len(sweep(tmp_path / "flight", parent)) == 1


def test_a_process_with_the_id_of_a_dead_rank_does_not_save_its_run(
    parent: Path, tmp_path: Path
) -> None:
    a_run(parent)  # its header has the id of this very process, but another start
    assert len(sweep(tmp_path / "flight", parent)) == 1


def test_what_is_old_enough_goes_even_if_ranks_never_came(parent: Path, tmp_path: Path) -> None:
    half, empty = a_run(parent, ranks=1), parent / "onecast-00112233aabbccdd"
    empty.mkdir()
    for path in (half, *half.iterdir()):
        os.utime(path, (time.time() - 61,) * 2)
    os.utime(empty, (time.time() - 3601,) * 2)
    assert len(sweep(tmp_path / "flight", parent)) == 1
    assert not half.exists() and not empty.exists()


def test_a_run_that_ended_in_order_is_not_worth_keeping(parent: Path, tmp_path: Path) -> None:
    run_dir = parent / "onecast-00112233aabbccdd"
    run_dir.mkdir()
    ring = WrittenRing(run_dir, 0, world_size=1, local_world_size=1)
    ring.call(1, 2, 1)
    ring.ring.close()
    ring.die()
    assert sweep(tmp_path / "flight", parent) == []
    assert not run_dir.exists()


def test_what_is_of_others_is_left_alone(parent: Path, tmp_path: Path) -> None:
    run_dir = a_run(parent)
    elsewhere = run_dir.rename(tmp_path / "elsewhere")
    (parent / "onecast-0011223344556677").symlink_to(elsewhere)
    (parent / "onecast-1122334455667788").write_text("a segment")
    named = a_run(parent).rename(parent / "onecast-precious")
    if os.getuid() == 0:
        foreign = a_run(parent)
        os.chown(foreign, 12345, 12345)
    before = sorted(os.listdir(parent))
    assert sweep(tmp_path / "flight", parent) == []
    assert sorted(os.listdir(parent)) == before
    assert elsewhere.exists() and named.exists()
    assert sweep(tmp_path / "flight", tmp_path / "not there") == []


def test_a_run_that_cannot_be_kept_stays_and_the_log_says_why(
    parent: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = a_run(parent)
    (tmp_path / "flight").write_text("a file in the way")
    assert sweep(tmp_path / "flight", parent) == []
    assert run_dir.exists()
    assert f"cannot keep what the run in {run_dir} has left" in caplog.text


def test_two_sweepers_take_a_run_once(parent: Path, tmp_path: Path) -> None:
    for _ in range(4):
        a_run(parent)
    kept: list[Path] = []
    threads = [
        threading.Thread(target=lambda: kept.extend(sweep(tmp_path / "flight", parent)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == len(set(kept)) == len(kept_runs(tmp_path / "flight")) == 4
    assert os.listdir(parent) == []


def test_the_ring_of_a_living_rank_is_kept_while_it_writes(parent: Path, tmp_path: Path) -> None:
    run_dir = parent / "onecast-0123456789abcdef"
    run_dir.mkdir()
    ring = RingWriter(ring_path(str(run_dir), 0), capacity=64, rank=0)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            ring.record(number, number + 1, 1, number, number, 0)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(5):
            path = keep(run_dir, tmp_path / "flight")
            rows = read_ring(path / "rank-0.ring").rows
            assert (rows[:, 4] == rows[:, 5]).all() and (rows[:, 0] == rows[:, 4]).all()
    finally:
        stop.set()
        thread.join()
