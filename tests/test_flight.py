"""Flight records: after a crash or a kill they say what every rank was in, and where it parted."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from recorded_ranks import phase, recorded_ranks, recording, wait_for_test
from written_rings import WrittenRing

from onecast.telemetry import TelemetryError, flight_command
from onecast.telemetry.flight import keep, read_run, read_runs
from onecast.telemetry.flight_events import last_events
from onecast.telemetry.flight_table import report, table
from onecast.telemetry.flight_trace import trace


def flight(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    flight_command.add_arguments(parser)
    status = flight_command.run(parser.parse_args(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def _one_waits_alone(rank: int, run_dir: str) -> None:
    ring = recording(rank, run_dir)
    for _ in range(30):
        with phase(ring, "model.forward"):
            dist.all_reduce(torch.ones(4096))
    if rank == 0:
        with phase(ring, "kv.swap_in"):
            wait_for_test(run_dir)
    with phase(ring, "model.forward"):
        dist.all_reduce(torch.ones(4096))


def test_after_a_sigkill_in_a_collective_the_record_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorded_ranks(_one_waits_alone) as ranks:
        ranks.until(
            lambda: (
                len(ranks.readers) == 2
                and "kv.swap_in" in ranks.readers[0].names
                and 31 in ranks.looks()[1].pending[:, 4]
            ),
            "the last collective",
        )
        live = read_run(ranks.run_dir)
        assert live.kind == "live"
        assert [one.state for one in live.ranks.values()] == ["running", "running"]
        ranks.kill(1)
        ranks.until(lambda: read_run(ranks.run_dir).ranks[1].state == "dead", "its death")
        half = read_run(ranks.run_dir)
        assert half.kind == "live"
        ranks.kill(0)
        ranks.join()
        run = read_run(ranks.run_dir)
        kept = read_run(keep(ranks.run_dir, tmp_path / "flight", reason="rank 1 died"))
        status, out, err = flight(ranks.run_dir, "--json", "-n5", capsys=capsys)
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told["kind"] == "dead"
    assert told["ranks"]["1"]["state"] == "dead"
    for one in (run, kept):
        assert "in model.forward > all_reduce #31 (default_pg, 16 KiB) for " in one.ranks[1].was_in
        assert "in kv.swap_in for " in one.ranks[0].was_in
        assert one.disagreement() is None
        (hang,) = one.hangs()
        assert hang.text.startswith("rank 1 waits in all_reduce #31 (default_pg, 16 KiB) for ")
        assert "rank 0 never entered it: last finished #30, now in kv.swap_in" in hang.text
    assert (kept.kind, kept.reason) == ("kept", "rank 1 died")
    (last,) = [e for e in told["events"] if e["what"] == "all_reduce #31 (default_pg, 16 KiB)"]
    assert last["ranks"]["1"]["status"] == "in flight" and "0" not in last["ranks"]
    shared = [e for e in told["events"] if e["what"].startswith("all_reduce #30")]
    assert [set(e["ranks"]) for e in shared] == [{"0", "1"}]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two ranks, ten steps; then rank 1 reduces less, and rank 0 waits for ever."""
    folder = tmp_path / "onecast-0123456789abcdef"
    folder.mkdir()
    for rank in range(2):
        ring = WrittenRing(folder, rank)
        late = rank * 0.001
        for step in range(10):
            ring.step(step, step + 0.9, step)
            ring.phase(step + 0.1, step + 0.8, "model.forward")
            ring.call(step + 0.2 + late, step + 0.3, 2 * step + 1)
            ring.call(step + 0.4 + late, step + 0.5, 2 * step + 2)
        ring.step(10, None, 10)
        if rank == 0:
            ring.phase(10.1, None, "model.forward")
            ring.call(10.2, 10.3, 21)
            ring.call(10.4, None, 22)
        else:
            ring.call(10.2, 10.3, 21, nbytes=8192)
            ring.phase(10.4, None, "kv.swap_in")
            ring.phase(12.4, 12.5, "kv.copy")
        ring.die()
    return folder


def test_events_of_all_ranks_stand_side_by_side(run_dir: Path) -> None:
    run = read_run(run_dir)
    events = last_events(run, 6)
    header, rows = table(run, events, 200)
    assert header[2:] == ["event", "rank 0", "rank 1"]
    text = {row[2]: row[3:] for row in rows}
    assert text["all_reduce #20 (tp, 16 KiB)"] == ["100 ms", "99 ms (+1 ms)"]
    assert text["all_reduce #21 (tp, 16 KiB)"] == [
        "! all_reduce (16 KiB) of float32: 100 ms",
        "! all_reduce (8 KiB) of float32: 100 ms",
    ]
    assert text["all_reduce #22 (tp, 16 KiB)"] == ["in flight 2.1 s", "-"]
    assert text["kv.swap_in"] == ["-", "in flight 2.1 s"]
    assert [row[2] for row in rows if row[1] == "10"].count("step 10") == 1
    assert rows == table(run, last_events(run, 6), 200)[1]


def test_many_ranks_share_places(tmp_path: Path) -> None:
    for rank in range(8):
        ring = WrittenRing(tmp_path, rank, world_size=8, local_world_size=8)
        ring.call(1, 2 + rank, 1, size=8)
        if rank != 5:
            ring.call(20, None, 2, size=8)
        ring.die()
    run = read_run(tmp_path)
    header, rows = table(run, last_events(run, 5), 100)
    assert header[3:] == ["ranks"]
    assert [row[3] for row in rows] == [
        "ranks 0-7: 1.0 s to 8.0 s",
        "ranks 0-4, 6, 7: in flight 0 us | rank 5: -",
    ]


def test_the_report_says_who_was_in_what_and_where_they_parted(run_dir: Path) -> None:
    lines = report(read_run(run_dir))
    text = "\n".join(lines)
    assert "rank 0 (dead, pid " in text
    assert "at the end in step 10 > model.forward > all_reduce #22 (tp, 16 KiB) for 2.1 s" in text
    assert (
        "first disagreement: ranks disagree on #21 of tp: rank 0 called all_reduce (16 KiB), "
        "rank 1 called all_reduce (8 KiB)" in lines
    )
    assert (
        "at the end: rank 0 waits in all_reduce #22 (tp, 16 KiB) for 2.1 s; "
        "rank 1 never entered it: last finished #21, now in kv.swap_in for 2.1 s" in lines
    )


def test_plain_text_where_there_is_no_terminal(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = flight(str(run_dir), capsys=capsys)
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert max(len(line) - len(line.rstrip()) for line in out.splitlines()) == 0


def test_a_terminal_gets_a_table_and_no_escape_of_a_name(run_dir: Path) -> None:
    ring = WrittenRing(run_dir, 2, world_size=3, local_world_size=3)
    ring.phase(11, None, "\x1b]0;owned\x07[red]kv")
    master, slave = os.openpty()
    process = subprocess.run(
        [sys.executable, "-c", _MAIN, str(run_dir)],
        stdout=slave,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"},
        timeout=60,
        check=False,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # the end of a terminal
            break
        shown += part
        if not part:
            break
    os.close(master)
    assert process.returncode == 0, process.stderr
    assert b"\x1b[" in shown and "│".encode() in shown
    assert b"\x1b]0" not in shown and b"?]0;owned?[red]kv" in shown


_MAIN = """
import argparse, sys
from onecast.telemetry import flight_command
parser = argparse.ArgumentParser()
flight_command.add_arguments(parser)
sys.exit(flight_command.run(parser.parse_args()))
"""


def test_perfetto_gets_all_ranks_on_one_clock(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    options = argparse.Namespace(run_dir=[str(run_dir)], events=5, json=True, perfetto=str(out))
    assert flight_command.run(options) == 0
    written = json.loads(out.read_text(encoding="ascii"))
    run = read_run(run_dir)
    assert written["traceEvents"][0]["ph"] == "M"
    events: list[dict[str, Any]] = [e for e in written["traceEvents"] if e["ph"] == "X"]
    assert len(events) == sum(len(one.image.rows) for one in run.ranks.values())
    assert min(event["ts"] for event in events) == 0
    first = {e["pid"]: e["ts"] for e in events if e["name"] == "all_reduce #1 (tp, 16 KiB)"}
    assert first[2] - first[1] == 1000, "rank 1 is 1 ms late, in microseconds"
    (waiting,) = [e for e in events if e["name"] == "all_reduce #22 (tp, 16 KiB)"]
    assert waiting["args"]["status"] == "in flight" and waiting["dur"] >= 2_000_000
    for thread in {(event["pid"], event["tid"]) for event in events}:
        _assert_nested([e for e in events if (e["pid"], e["tid"]) == thread])


def _assert_nested(events: list[dict[str, Any]]) -> None:
    ends: list[float] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while ends and ends[-1] <= event["ts"] + 1e-6:
            ends.pop()
        end = event["ts"] + event["dur"]
        assert not ends or end <= ends[-1] + 1e-3, event
        ends.append(end)


def test_nodes_of_one_run_are_read_together(tmp_path: Path) -> None:
    for node in range(2):
        (tmp_path / str(node)).mkdir()
        for rank in (2 * node, 2 * node + 1):
            ring = WrittenRing(tmp_path / str(node), rank, local_rank=rank % 2, world_size=4)
            ring.call(1, 2, 1, size=4, nbytes=8 if rank == 3 else 4)
    run = read_runs([tmp_path / "0", tmp_path / "1"])
    assert list(run.ranks) == [0, 1, 2, 3]
    disagreement = run.disagreement()
    assert disagreement is not None and disagreement.calls[3] == "all_reduce (8 B)"
    with pytest.raises(TelemetryError, match=r"rank 0 is in both .*0 and .*0"):
        read_runs([tmp_path / "0", tmp_path / "0"])


def test_a_pipe_that_closes_early_is_no_error(run_dir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN, str(run_dir), "-n500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


def test_without_a_directory_the_kept_runs_are_listed(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ONECAST_FLIGHT_DIR", str(tmp_path / "kept"))
    assert flight(capsys=capsys)[1] == f"no run has been kept in {tmp_path}/kept\n"
    path = keep(run_dir, tmp_path / "kept")
    assert flight(capsys=capsys) == (0, f"{path}\n", "")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot read {}: No such file or directory"),
        (lambda path: path.mkdir(), "{} is no run directory: no rank-*.ring in it"),
        (lambda path: path.write_text("x"), "cannot read {}: Not a directory"),
    ],
)
def test_what_is_no_run_is_a_clear_error(
    make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    make(path)
    assert flight(str(path), capsys=capsys) == (2, "", f"onecast flight: {message.format(path)}\n")


def test_device_times_requests_and_late_kinds_do_not_disturb(run_dir: Path) -> None:
    from onecast.telemetry.ring import CONTEXT, DEVICE, GRAPH, REQUEST, SCHEDULED, pack_meta

    ring = WrittenRing(run_dir, 2, world_size=3, local_world_size=3)
    ring.call(1, 2, 1)
    now = time.perf_counter_ns()
    for kind in (DEVICE, REQUEST, GRAPH):
        ring.ring.record(now, now + 5, pack_meta(kind, ring.ring.intern("stop")), 0, 1, 0)
    for kind in (CONTEXT, SCHEDULED):
        ring.ring.record(0, 0, pack_meta(kind), -(2**63), -1, 0)
    (run_dir / "rank-2.graphs").write_text('{"name": "decode 8", "collectives": []}\n')
    run = read_run(run_dir)
    assert not run.problems
    assert [event.what for event in last_events(run, 20) if event.kind == "graph"] == ["decode 8"]
    names = {event["name"] for event in trace(run)["traceEvents"]}
    assert {"decode 8", "request 0"} <= names


def test_reading_a_live_ring_is_never_torn(tmp_path: Path) -> None:
    """A writer at full speed, read over and over: every record is one that was written."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from written_rings import WrittenRing
ring = WrittenRing({str(tmp_path)!r}, 0, capacity=64)
sequence = 0
while True:
    sequence += 1
    ring.call(sequence, sequence + 0.5, sequence, nbytes=sequence)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "rank-0.ring").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        seen = 0
        until = time.monotonic() + 1.0
        while time.monotonic() < until or not seen:
            image = read_run(tmp_path).ranks[0].image
            seen += len(image.rows)
            assert (image.rows[:, 4] == image.rows[:, 5]).all()
            assert (image.rows[:, 1] - image.rows[:, 0] == 500_000_000).all()
            assert time.monotonic() < deadline
        assert read_run(tmp_path).kind == "live"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
