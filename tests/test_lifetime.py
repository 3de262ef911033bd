"""Telemetry may die, fill up or find no room: the run goes on, and what is counted is right."""

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lifetimes import (
    alone,
    next_sidecar,
    place,
    rank_processes,
    scrape,
    sidecar_of,
    steps_on,
    wait_until,
)

from onecast.telemetry import RingReader, Session, TelemetryError, make_run_dir, name_run_dir
from onecast.telemetry.cursors import Cursors, SidecarBusy
from onecast.telemetry.run_directory import (
    ensure_run_dir,
    locked,
    remove_run_dir,
    ring_path,
    shared_run_dir,
)

pytestmark = pytest.mark.usefixtures("place")
__all__ = ["place"]  # a fixture
WARNED = logging.WARNING


@pytest.fixture
def flights(tmp_path: Path) -> Path:
    """Where runs that end badly are kept: not among the user's."""
    return tmp_path / "flights"


def make_steps(session: Session, first: int, number: int) -> None:
    for step in range(first, first + number):
        with session.step(step, 1), session.phase("sample"):
            pass


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= WARNED]


# ---- the sidecar dies


def test_a_killed_sidecar_comes_back_at_its_port_and_counts_nothing_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = alone()
    url, first = session.metrics_url, sidecar_of(session.run_dir)
    make_steps(session, 0, 10)
    open_step = session.step(10, 1)
    open_step.__enter__()  # in flight when it dies
    assert steps_on(url) == 10
    assert session.run_dir is not None
    with locked(session.run_dir, 5):  # so that nobody can start the next one yet
        os.kill(first.pid, signal.SIGKILL)
        wait_until(lambda: not first.alive, "it is dead")
        open_step.__exit__(None, None, None)
        make_steps(session, 11, 29)  # a rank does not wait for it
        assert not first.alive and sidecar_of(session.run_dir) == first
    second = next_sidecar(session.run_dir, first)
    assert second.url == url
    assert (second.restarts, second.in_a_row) == (1, 1)
    assert steps_on(url) == 30
    make_steps(session, 40, 5)
    assert session.report()["steps"] == 35
    final = session.close()
    assert final is not None and final["steps"] == 35 and final["dropped"] == 0
    (warning,) = warnings_of(caplog)
    assert f"(pid {first.pid}) died and was started again" in warning


def test_what_was_overwritten_while_there_was_no_sidecar_counts_as_dropped() -> None:
    session = alone(ring_records=64)
    first = sidecar_of(session.run_dir)
    make_steps(session, 0, 10)
    assert steps_on(session.metrics_url) == 10
    assert session.run_dir is not None
    with locked(session.run_dir, 5):
        os.kill(first.pid, signal.SIGKILL)
        wait_until(lambda: not first.alive, "it is dead")
        make_steps(session, 10, 100)  # of two records each: 200, and room for 64
    next_sidecar(session.run_dir, first)
    report = session.close()
    assert report is not None
    assert report["steps"] == 32
    assert report["dropped_by_reason"]["records/overrun"] == 200 - 64


def test_killed_six_times_in_a_row_it_is_given_up_with_one_warning_and_the_run_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = alone(metrics_port=None)
    record = sidecar_of(session.run_dir)
    for restarts in range(1, 6):
        os.kill(record.pid, signal.SIGKILL)
        record = next_sidecar(session.run_dir, record)
        assert record.restarts == record.in_a_row == restarts
        make_steps(session, restarts, 1)
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: sidecar_of(session.run_dir).given_up, "it is given up")
    make_steps(session, 6, 4)
    assert session.recording, "the ring is still a flight record"
    assert session.run_dir is not None
    assert len(RingReader(ring_path(session.run_dir, 0)).drain().rows) == 2 * 9
    wait_until(lambda: session._watch is not None and session._watch.record is None, "it is known")
    with pytest.raises(TelemetryError, match=r"sidecar .* has ended"):
        session.report()
    (given_up,) = [text for text in warnings_of(caplog) if "given up" in text]
    assert "died 6 times in a row" in given_up
    assert session.close() is None
    assert not os.path.exists(session.run_dir)


@pytest.mark.slow
def test_a_minute_of_life_makes_up_for_former_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecast.telemetry.sidecar_watch._LONG_LIFE_NS", 0)
    session = alone(metrics_port=None)
    record = sidecar_of(session.run_dir)
    for restarts in (1, 2):
        os.kill(record.pid, signal.SIGKILL)
        record = next_sidecar(session.run_dir, record)
        assert (record.restarts, record.in_a_row) == (restarts, 1)
    assert session.close() is not None


def test_another_rank_starts_it_again_when_its_starter_is_dead_too(flights: Path) -> None:
    run_dir = name_run_dir()
    with rank_processes(2, run_dir, flight_dir=str(flights)) as ranks:
        assert ranks[0].url == ranks[1].url != "None"
        first = sidecar_of(run_dir)
        starter = ranks[0 if _parent_of(first.pid) == ranks[0].pid else 1]
        (other,) = set(ranks) - {starter}
        starter.kill()
        os.kill(first.pid, signal.SIGKILL)
        second = next_sidecar(run_dir, first)
        assert second.url == other.url
        assert other.make_steps(7) == 7
        assert steps_on(other.url, rank=ranks.index(other)) == 7
        other.finish()
    wait_until(lambda: not os.path.exists(run_dir), "the sidecar takes the directory down")


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_port_that_somebody_took_meanwhile_moves_the_metrics() -> None:
    session = alone()
    first = sidecar_of(session.run_dir)
    assert session.run_dir is not None and first.port is not None
    with locked(session.run_dir, 5):
        os.kill(first.pid, signal.SIGKILL)
        taken = wait_until(lambda: _listen(first.port), "its port is free")
    with taken:
        second = next_sidecar(session.run_dir, first)
        assert second.port not in (None, first.port)
        wait_until(lambda: session.metrics_url == second.url, "the session knows")
        assert scrape(session.metrics_url)
    session.close()


def _listen(port: int | None) -> socket.socket | None:
    assert port is not None
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return None


def test_a_sidecar_killed_while_a_rank_waits_for_it_is_started_again_to_finish(
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace.json"
    with rank_processes(2, name_run_dir(), metrics_port=None, trace_file=str(trace)) as ranks:
        run_dir = ranks[0].run_dir
        first = sidecar_of(run_dir)
        for each in ranks:
            each.make_steps(3)
        ranks[0].close_session()  # which waits for rank 1
        wait_until(lambda: RingReader(ring_path(run_dir, 0)).closed, "rank 0 has closed")
        os.kill(first.pid, signal.SIGKILL)
        next_sidecar(run_dir, first)
        assert ranks[1].finish() is None
        assert json.loads(ranks[0]._line())["ranks"] == [0, 1]
    assert not os.path.exists(run_dir)


def test_only_one_process_is_the_sidecar_of_a_directory() -> None:
    run_dir = make_run_dir()
    cursors = Cursors(run_dir, 2)
    assert cursors.load(1) == (0, None)
    for number in (1, 2, 3):
        cursors.store(1, 100 * number, number)
        assert cursors.load(1) == (100 * number, number)
    assert cursors.load(0) == (0, None)
    with pytest.raises(SidecarBusy, match=run_dir):
        Cursors(run_dir, 2)
    cursors.close()
    again = Cursors(run_dir, 2)
    assert again.load(1) == (300, 3)
    again.close()
    remove_run_dir(run_dir)


# ---- ranks die


def test_when_all_ranks_are_killed_the_sidecar_ends_and_keeps_their_rings(flights: Path) -> None:
    run_dir = name_run_dir()
    with rank_processes(2, run_dir, flight_dir=str(flights)) as ranks:
        sidecar = sidecar_of(run_dir)
        for each in ranks:
            each.make_steps(5)
        for each in ranks:
            each.kill()
        wait_until(lambda: not sidecar.alive, "the sidecar ends")
    assert not os.path.exists(run_dir)
    (kept,) = _kept(flights)
    for rank in (0, 1):
        reader = RingReader(ring_path(str(kept), rank))
        assert not reader.closed and len(reader.drain().rows) == 10


def test_a_run_that_ends_in_order_is_not_kept(flights: Path) -> None:
    with rank_processes(2, name_run_dir(), flight_dir=str(flights)) as ranks:
        ranks[1].finish()
        assert ranks[0].finish()["ranks"] == [0, 1]
    assert _kept(flights) == []


@pytest.mark.slow
def test_after_everything_was_killed_at_once_the_next_start_keeps_and_sweeps(flights: Path) -> None:
    run_dir = name_run_dir()
    with rank_processes(2, run_dir, flight_dir=str(flights)) as ranks:
        sidecar = sidecar_of(run_dir)
        os.kill(sidecar.pid, signal.SIGSTOP)  # it must not come to its own end
        for each in ranks:
            each.make_steps(5)
            each.kill()
        os.kill(sidecar.pid, signal.SIGKILL)
        wait_until(lambda: not sidecar.alive, "the sidecar is dead")
    assert os.path.exists(run_dir) and _kept(flights) == []
    time.sleep(5)  # who died this moment is left alone
    session = alone(flight_dir=str(flights))
    wait_until(lambda: not os.path.exists(run_dir), "the next sidecar sweeps")
    session.close()
    (kept,) = _kept(flights)
    assert len(RingReader(ring_path(str(kept), 1)).drain().rows) == 10


@pytest.mark.slow
def test_a_new_run_in_the_directory_of_a_killed_one_starts_afresh(flights: Path) -> None:
    run_dir = name_run_dir()
    with rank_processes(2, run_dir, flight_dir=str(flights)) as ranks:
        sidecar = sidecar_of(run_dir)
        os.kill(sidecar.pid, signal.SIGSTOP)
        for each in ranks:
            each.make_steps(5)
            each.kill()
        os.kill(sidecar.pid, signal.SIGKILL)
        wait_until(lambda: not sidecar.alive, "the sidecar is dead")
    with rank_processes(2, run_dir, flight_dir=str(flights)) as ranks:
        assert sidecar_of(run_dir).restarts == 0
        for each in ranks:
            each.make_steps(2)
        ranks[1].finish()
        assert ranks[0].finish()["steps"] == 2
    assert len(_kept(flights)) == 1


def _kept(flights: Path) -> list[Path]:
    return [each for each in flights.glob("*") if each.is_dir()] if flights.exists() else []


# ---- no room


@contextmanager
def tiny_tmpfs(folder: Path, kilobytes: int) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no permission to mount a tmpfs")
    try:
        yield folder
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _use_it_all(session: Session) -> None:
    """What a program does with a session, recorded or not."""
    assert session.metrics_url is None and not session.recording
    for step in range(3):
        with session.step(step) as scope, session.phase("sample"):
            scope.set_batch_size(2)
    session.probe.published(0, 100, 10, 1, 1, 2, 3)
    session.channel_probe("other").received(0, 100, 10, 1, 1, 2, 3)
    session.requests.admitted(1, None)
    session.set_value("sequences.running", 3)
    session.record("put", time.perf_counter_ns())
    session.sample_coverage()
    with pytest.raises(ValueError, match="is no telemetry value"):
        session.set_value("kv", 1)
    with pytest.raises(KeyError), session.step(3):
        raise KeyError("x")
    with pytest.raises(TelemetryError, match="nothing is recorded"):
        session.report()
    assert session.close() is None


def test_without_room_for_the_ring_one_warning_gives_sizes_and_the_program_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tiny_tmpfs(tmp_path / "shm", 64) as shm:
        run_dir = str(shm / "onecast-full")
        session = alone(run_dir)
        (warning,) = warnings_of(caplog)
        assert f"no room for the telemetry ring {run_dir}" in warning
        assert "it needs 4263936 bytes, 65536 are free" in warning
        assert "the run goes on without telemetry of rank 0" in warning
        assert os.listdir(shm) == []
        _use_it_all(session)


@pytest.mark.slow
def test_ranks_that_do_not_fit_beside_others_give_one_warning(tmp_path: Path) -> None:
    with tiny_tmpfs(tmp_path / "shm", 300) as shm:  # a ring takes 132 of it
        run_dir = str(shm / "onecast-full")
        with rank_processes(5, run_dir, ring_records=1024, close_timeout_s=10.0) as ranks:
            assert sorted(each.url == "None" for each in ranks) == [False, False, True, True, True]
            assert [each.make_steps(3) for each in ranks] == [3] * 5
            told = [each.kill() for each in ranks]
        assert sum("no room for the telemetry ring" in text for text in told) == 1
        wait_until(lambda: os.listdir(shm) == [], "the sidecar takes the directory down")


def test_without_room_for_the_sidecar_the_program_goes_on_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tiny_tmpfs(tmp_path / "shm", 136) as shm:  # the ring takes 132 of it
        session = alone(str(shm / "onecast-full"), ring_records=1024)
        (warning,) = warnings_of(caplog)
        assert "the telemetry sidecar cannot start" in warning and "No space left" in warning
        _use_it_all(session)
        assert os.listdir(shm) == []


def test_a_sidecar_that_cannot_start_costs_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onecast.telemetry.sidecar_process._BOOT", "import sys; sys.exit(7)")
    session = alone()
    (warning,) = warnings_of(caplog)
    assert "ended with status 7 before it could start" in warning
    _use_it_all(session)


def test_a_directory_that_cannot_be_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    session = alone("/nowhere/at/all")
    (warning,) = warnings_of(caplog)
    assert "'/nowhere/at/all'" in warning
    _use_it_all(session)


# ---- settings


def test_a_port_in_use_is_an_error_or_with_any_port_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"metrics port {port} on 127.0.0.1 is already in use"):
            alone(metrics_port=port)
        session = alone(metrics_port=port, any_port=True)
        assert session.recording and scrape(session.metrics_url)
        (warning,) = warnings_of(caplog)
        assert f"metrics port {port} on 127.0.0.1 is already in use: metrics are at" in warning
        session.close()


def test_a_rank_is_recorded_once(flights: Path) -> None:
    run_dir = make_run_dir()
    session = alone(run_dir)
    with pytest.raises(ValueError, match=f"rank 0 is recorded in {run_dir} already, by process"):
        alone(run_dir)
    assert session.close() is not None
    again = alone(run_dir)  # the former one has ended, and so has its sidecar
    make_steps(again, 0, 2)
    final = again.close()
    assert final is not None and final["steps"] == 2


def test_one_after_the_other_in_one_directory_waits_for_the_former_sidecar() -> None:
    run_dir = name_run_dir()
    for number in range(3):
        session = alone(run_dir, metrics_port=None)
        make_steps(session, 0, number)
        assert session.report()["steps"] == number
        session.close(wait=False)
    wait_until(lambda: not os.path.exists(run_dir), "the last sidecar ends")


# ---- the shared directory


def test_ranks_that_share_a_key_meet_without_a_collective() -> None:
    first, second = shared_run_dir("job 7, node 0"), shared_run_dir("job 7, node 1")
    assert first != second and first == shared_run_dir("job 7, node 0")
    assert Path(first).name.startswith(f"onecast-{os.getuid()}-")
    assert os.stat(first).st_mode & 0o777 == 0o700
    with rank_processes(2, first) as ranks, rank_processes(2, second) as others:
        assert len({ranks[0].url, others[0].url}) == 2, "two engines at once"
        for each in (*ranks, *others):
            each.make_steps(4)
        for pair in (ranks, others):
            assert steps_on(pair[1].url, rank=0) == steps_on(pair[0].url, rank=1) == 4
            pair[1].finish()
            assert pair[0].finish()["steps"] == 4
    assert not os.path.exists(first) and not os.path.exists(second)


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "mine").mkdir(mode=0o700)
    for name, what in (("open", "open to others"), ("file", "no directory"), ("link", "no dir")):
        with pytest.raises(TelemetryError, match=what):
            ensure_run_dir(str(tmp_path / name))
    ensure_run_dir(str(tmp_path / "mine"))
    if os.getuid() == 0:
        os.chown(tmp_path / "mine", 12345, -1)
        with pytest.raises(TelemetryError, match="of user 12345"):
            ensure_run_dir(str(tmp_path / "mine"))


def test_a_lock_says_who_waited_for_what_and_dies_with_its_directory(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "run")
    with pytest.raises(FileNotFoundError), locked(run_dir, 1):
        pass
    with locked(run_dir, 1, make=True):
        with pytest.raises(TelemetryError, match=rf"has held {run_dir}/sidecar\.lock for 0\.0 s"):
            with locked(run_dir, 0):
                pass
        child = os.fork()
        if child == 0:  # a child holds the same open file, but not the lock after we let it go
            time.sleep(30)
            os._exit(0)
    with locked(run_dir, 0):
        remove_run_dir(run_dir)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(FileNotFoundError), locked(run_dir, 1):
        pass


# ---- forked children


def test_a_forked_child_records_nothing_and_keeps_nobody_alive() -> None:
    session = alone()
    sidecar = sidecar_of(session.run_dir)
    make_steps(session, 0, 3)
    scope = session.step(3, 1)
    scope.__enter__()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        scope.__exit__(None, None, None)
        make_steps(session, 100, 50)
        session.set_value("sequences.running", 77)
        session.close()
        os.write(tell, b"recording" if session.recording else b"not")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(told, 100) == b"not"
        report = session.report()
        assert report["steps"] == 3 and sum(each["count"] for each in report["phases"]) == 3
        assert not any(key[0] == "onecast_sequences" for key in scrape(session.metrics_url))
        scope.__exit__(None, None, None)
        final = session.close()
        assert final is not None and final["steps"] == 4
        wait_until(lambda: not sidecar.alive, "the sidecar ends although the child lives")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tell)


def test_a_child_may_have_a_session_of_its_own() -> None:
    session = alone(metrics_port=None)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        own = alone(metrics_port=None)
        make_steps(own, 0, 5)
        final = own.close()
        os.write(tell, str(final and final["steps"]).encode())
        os._exit(0)
    assert os.read(told, 100) == b"5"
    os.waitpid(child, 0)
    os.close(told)
    os.close(tell)
    final = session.close()
    assert final is not None and final["steps"] == 0


# ---- what a sidecar is made of


def test_a_sidecar_imports_neither_torch_nor_what_the_environment_adds(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nopen({str(seen)!r}, 'a').write(f'{{os.getpid()}} ')\n"
    )
    code = (
        "import os, sys\n"
        "from lifetimes import alone, sidecar_of\n"
        "session = alone()\n"
        "pid = sidecar_of(session.run_dir).pid\n"
        "print(os.getpid(), pid, 'libtorch' in open(f'/proc/{pid}/maps').read())\n"
        "session.close()\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    rank, sidecar, has_torch = done.stdout.split()
    assert has_torch == "False"
    assert rank in seen.read_text().split() and sidecar not in seen.read_text().split()


def test_signals_that_stop_ranks_leave_the_sidecar_to_its_work() -> None:
    session = alone()
    record = sidecar_of(session.run_dir)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(record.pid, number)
    make_steps(session, 0, 2)
    assert session.report()["steps"] == 2
    assert os.getsid(record.pid) == record.pid
    assert session.close() is not None


def test_an_explicit_record_counts_as_a_collective_of_its_group() -> None:
    session = alone(metrics_port=None)
    begin_ns = time.perf_counter_ns()
    for _ in range(3):
        session.record("put", begin_ns, begin_ns + 1000, 64, group="side", group_size=2)
    (found,) = session.report()["collectives"]
    assert (found["op"], found["group"], found["count"], found["bytes"]) == ("put", "side", 3, 192)
    with pytest.raises(ValueError, match="group_size is 0"):
        session.record("put", begin_ns, group_size=0)
    session.close()


@contextmanager
def endpoint(kind: str) -> Iterator[str]:
    """An address to post spans to."""
    if kind == "down":
        yield "http://127.0.0.1:9/v1/traces"  # nobody listens on the discard port
        return
    server = socket.create_server(("127.0.0.1", 0))  # nobody accepts: connected, and no answer

    def refuse() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                with client:
                    client.settimeout(5)
                    client.recv(1 << 16)
                    client.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=refuse)
    if kind == "erroring":
        thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1/traces"
    finally:
        with server:
            server.shutdown(socket.SHUT_RDWR)
        if kind == "erroring":
            thread.join()


@pytest.mark.parametrize("kind", ["down", "slow", "erroring"])
def test_an_endpoint_that_takes_no_spans_costs_spans_and_no_rank_its_time(kind: str) -> None:
    with endpoint(kind) as url:
        session = alone(
            metrics_port=None, otlp_endpoint=url, otlp_timeout_s=0.5, otlp_queue_spans=400
        )
        begin = time.monotonic()
        for first in range(0, 2000, 100):
            make_steps(session, first, 100)
            time.sleep(0.01)
        assert session.report()["steps"] == 2000
        assert time.monotonic() - begin < 10
        final = session.close()
    assert final is not None and final["steps"] == 2000, "it finished within close_timeout_s"
    assert final["spans_exported"] == 0
    dropped = {key: n for key, n in final["dropped_by_reason"].items() if key.startswith("spans/")}
    assert sum(dropped.values()) > 0
