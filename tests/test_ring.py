"""The ring: what a rank writes can be read while it runs, after it is killed, and nothing twice."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onecast.telemetry import RingProbe, RingReader, RingWriter, TelemetryError, make_run_dir
from onecast.telemetry import ring as layout
from onecast.telemetry.histograms import DURATIONS, SIZES, Histogram
from onecast.telemetry.probe import unpack_frame
from onecast.telemetry.run_directory import remove_run_dir, ring_path

META = layout.pack_meta(layout.COLLECTIVE, 1, 2, 3, 4)


@pytest.fixture
def run_dir() -> Iterator[str]:
    directory = make_run_dir()
    yield directory
    remove_run_dir(directory)


def writer(run_dir: str, capacity: int = 1024, rank: int = 0) -> RingWriter:
    return RingWriter(ring_path(run_dir, rank), capacity=capacity, rank=rank, engine_id="engine é")


def test_a_record_comes_back_with_every_field(run_dir: str) -> None:
    ring = writer(run_dir)
    reader = RingReader(ring.path)
    ring.set_step(7)
    before = time.perf_counter_ns()
    ticket = ring.begin(META, 41, 4096)
    ring.end(ticket)
    after = time.perf_counter_ns()
    (row,) = reader.drain().rows.tolist()
    assert before <= row[layout.BEGIN] <= row[layout.END] <= after
    assert row[layout.STEP :] == [7, META, 41, 4096, layout.OK, ticket]
    assert layout.meta_kind(META) == layout.COLLECTIVE
    assert [f(META) for f in (layout.meta_name, layout.meta_group, layout.meta_dtype)] == [1, 2, 3]
    assert layout.meta_group_size(META) == 4
    assert reader.engine_id == "engine é"
    assert (reader.rank, reader.pid, reader.step, reader.head) == (0, os.getpid(), 7, 1)
    assert abs(reader.clock_offset_ns + time.perf_counter_ns() - time.time_ns()) < 50_000_000


def test_the_files_are_private(run_dir: str) -> None:
    ring = writer(run_dir)
    assert os.stat(run_dir).st_mode & 0o777 == 0o700
    assert os.stat(ring.path).st_mode & 0o777 == 0o600
    assert make_name_parts(run_dir)


def make_name_parts(run_dir: str) -> bool:
    other = make_run_dir()
    remove_run_dir(other)
    return other != run_dir and Path(run_dir).name.startswith("onecast-")


def test_a_record_is_handed_out_once_and_only_when_it_has_ended(run_dir: str) -> None:
    ring = writer(run_dir)
    reader = RingReader(ring.path)
    first, second = ring.begin(META, 1, 0), ring.begin(META, 2, 0)
    ring.end(second)
    assert reader.drain().rows[:, layout.SEQUENCE].tolist() == [2]
    drained = reader.drain()
    assert len(drained.rows) == 0
    assert drained.pending[:, layout.SEQUENCE].tolist() == [1]
    ring.end(first)
    assert reader.drain().rows[:, layout.SEQUENCE].tolist() == [1]
    drained = reader.drain()
    assert len(drained.rows) == len(drained.pending) == drained.lost == 0


def test_a_record_may_carry_another_step_than_the_current_one(run_dir: str) -> None:
    ring = writer(run_dir)
    reader = RingReader(ring.path)
    ring.set_step(7)
    device = layout.pack_meta(layout.DEVICE, 1, 2, 3, 4)
    outer = ring.begin(layout.pack_meta(layout.STEP_KIND), 7, 0)
    ring.record_in_step(3, 1000, 2000, device, 5, 64, -(2**63))
    ring.discard_step(outer)  # the record is of another step, and of a kind that outlives one
    ring.end(outer, layout.DISCARDED)
    row, _ = sorted(reader.drain().rows.tolist())
    assert row == [1000, 2000, 3, device, 5, 64, -(2**63), 2]


def test_a_second_reader_goes_on_where_the_first_one_ended(run_dir: str) -> None:
    ring = writer(run_dir, capacity=64)
    first = RingReader(ring.path)
    early, late, never = (ring.begin(META, sequence, 0) for sequence in (1, 2, 3))
    ring.end(early)
    assert first.drain().rows[:, layout.SEQUENCE].tolist() == [1]
    assert first.cursor == 3
    ring.end(late)
    ring.end(ring.begin(META, 4, 0))
    second = RingReader(ring.path, start=first.cursor, since_ns=first.cut_ns)
    drained = second.drain()
    assert drained.rows[:, layout.SEQUENCE].tolist() == [2, 4]
    assert drained.pending[:, layout.SEQUENCE].tolist() == [3]
    by_ticket = RingReader(ring.path, start=first.cursor).drain()
    assert by_ticket.rows[:, layout.SEQUENCE].tolist() == [4], "nothing twice, whatever is left out"
    assert by_ticket.pending[:, layout.SEQUENCE].tolist() == [3]
    ring.end(never)
    for sequence in range(100):
        ring.end(ring.begin(META, sequence, 0))
    third = RingReader(ring.path, start=second.cursor, since_ns=second.cut_ns)
    drained = third.drain()
    assert (len(drained.rows), drained.lost) == (64, 100 - 64)


def test_overruns_are_counted_and_nothing_else_is_lost(run_dir: str) -> None:
    ring = writer(run_dir, capacity=64)
    reader = RingReader(ring.path)
    for sequence in range(200):
        ring.end(ring.begin(META, sequence, 0))
    drained = reader.drain()
    assert drained.lost == 200 - 64
    assert drained.rows[:, layout.SEQUENCE].tolist() == list(range(136, 200))


def test_an_operation_that_is_overrun_in_flight_is_counted_and_cannot_end_another(
    run_dir: str,
) -> None:
    ring = writer(run_dir, capacity=64)
    reader = RingReader(ring.path)
    stuck = ring.begin(META, 0, 0)
    assert len(reader.drain().pending) == 1
    open_again = [ring.begin(META, sequence, 0) for sequence in range(1, 65)]
    ring.end(stuck)  # its slot belongs to number 64 now
    drained = reader.drain()
    assert (drained.lost, len(drained.rows), len(drained.pending)) == (1, 0, 64)
    for ticket in open_again:
        ring.end(ticket)
    assert reader.drain().rows[:, layout.SEQUENCE].tolist() == list(range(1, 65))


def test_threads_lose_and_mix_nothing(run_dir: str) -> None:
    ring = writer(run_dir, capacity=1 << 16)
    reader = RingReader(ring.path)
    found: list[np.ndarray] = []
    done = threading.Event()

    def write(thread: int) -> None:
        for sequence in range(5000):
            ring.end(ring.begin(META, sequence, thread))

    def read() -> None:
        while not done.is_set():
            found.append(reader.drain().rows)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    reading = threading.Thread(target=read)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in [reading, *threads]:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        reading.join()
        sys.setswitchinterval(interval)
    rows = np.concatenate([*found, reader.drain().rows])
    assert reader.lost == 0
    assert len(rows) == len(np.unique(rows[:, layout.TICKET])) == 20_000
    for number in range(4):
        own = rows[rows[:, layout.NBYTES] == number]
        assert sorted(own[:, layout.SEQUENCE].tolist()) == list(range(5000))


def test_whoever_sees_the_end_of_a_step_has_seen_its_contents(run_dir: str) -> None:
    ring = writer(run_dir, capacity=1 << 16)
    reader = RingReader(ring.path)
    step_meta = layout.pack_meta(layout.STEP_KIND)
    done = threading.Event()

    def write() -> None:
        for step in range(3000):
            ring.set_step(step)
            outer = ring.begin(step_meta, step, 0)
            for sequence in range(3):
                ring.end(ring.begin(META, sequence, 0))
            ring.end(outer)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    ended: set[int] = set()
    contents: dict[int, int] = {}
    while not done.is_set() or len(ended) < 3000:
        for row in reader.drain().rows.tolist():
            if row[layout.META] == step_meta:
                ended.add(row[layout.STEP])
            else:
                contents[row[layout.STEP]] = contents.get(row[layout.STEP], 0) + 1
        assert all(contents[step] == 3 for step in ended)
        ended = {step for step in ended if step >= max(ended) - 5} if not done.is_set() else ended
        if done.is_set() and len(contents) == 3000:
            break
    thread.join()


KILLED = """
import sys, time
from pathlib import Path
from onecast.telemetry import RingWriter
from onecast.telemetry.ring import COLLECTIVE, pack_meta
ring = RingWriter(Path(sys.argv[1]), capacity=1024, rank=3, engine_id="e")
ring.set_step(11)
name, group = ring.intern("all_reduce"), ring.intern("tp\\t0")
for sequence in range(10):
    ring.end(ring.begin(pack_meta(COLLECTIVE, name, group), sequence, 8))
ring.begin(pack_meta(COLLECTIVE, name, group), 10, 8)
print("written", flush=True)
time.sleep(60)
"""


def test_after_sigkill_the_ring_shows_what_was_in_flight(run_dir: str) -> None:
    path = ring_path(run_dir, 3)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    reader = RingReader(path)
    assert reader.alive
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not reader.alive, "a zombie counts as dead"
    process.wait()
    process.stdout.close()
    assert not reader.alive and not reader.closed
    drained = reader.drain()
    assert len(drained.rows) == 10
    (row,) = drained.pending.tolist()
    assert reader.names[layout.meta_name(row[layout.META])] == "all_reduce"
    assert (row[layout.STEP], row[layout.SEQUENCE], row[layout.END]) == (11, 10, 0)


def test_a_full_tmpfs_is_an_error_that_says_what_to_do(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TelemetryError, match=r"it needs 135168 bytes, .* set fewer ring_records"):
        writer(run_dir)
    assert os.listdir(run_dir) == []


def test_the_space_is_reserved_before_the_first_record(run_dir: str) -> None:
    ring = writer(run_dir, capacity=4096)
    info = os.stat(ring.path)
    assert info.st_blocks * 512 >= info.st_size


@pytest.mark.parametrize("capacity", [0, 63, 1000])
def test_a_capacity_that_is_no_power_of_two_is_refused(run_dir: str, capacity: int) -> None:
    with pytest.raises(ValueError, match=f"ring_records is {capacity}"):
        writer(run_dir, capacity)


def test_names_are_interned_once_and_a_full_table_still_answers(run_dir: str) -> None:
    ring = writer(run_dir)
    reader = RingReader(ring.path)
    assert ring.intern("all_reduce") == ring.intern("all_reduce") == 1
    assert reader.names == ["", "all_reduce"]
    for number in range(600):
        ring.intern(f"name {number}")
    assert len(reader.names) == layout.NUM_NAMES
    assert reader.names[-1] == "(other)"
    assert ring.intern("one more") == layout.NUM_NAMES - 1
    assert ring.intern("name 3") == 5


def test_what_is_no_ring_is_refused(tmp_path: Path) -> None:
    short, wrong = tmp_path / "short", tmp_path / "wrong"
    short.write_bytes(b"x" * 100)
    wrong.write_bytes(b"\0" * (layout.RECORDS_OFFSET + 64 * 64))
    for path in (short, wrong):
        with pytest.raises(TelemetryError, match="not a telemetry ring"):
            RingReader(path)


def test_a_frame_keeps_its_numbers(run_dir: str) -> None:
    ring = writer(run_dir)
    reader = RingReader(ring.path)
    probe = RingProbe(ring)
    probe.published(5, 18_000, 33, 1, 1000, 1500, 4000)
    probe.received(6, 1 << 33, 40, 2, 2000, 600_000_000_000, 600_000_000_700)
    sent, got = reader.drain().rows.tolist()
    assert unpack_frame(sent[layout.NBYTES], sent[layout.AUX]) == (18_000, 33, 1, 2500)
    assert unpack_frame(got[layout.NBYTES], got[layout.AUX]) == (1 << 33, 40, 2, 700)
    assert (sent[layout.BEGIN], sent[layout.END], sent[layout.SEQUENCE]) == (1000, 4000, 5)


def test_histogram_counts_are_exact_at_the_bucket_edges() -> None:
    histogram = Histogram(DURATIONS)
    histogram.add(np.array([1, 1000, 1001, 2000, 2001, 1000 << 18, (1000 << 18) + 1, 10**12]))
    buckets = dict(histogram.buckets())
    assert list(buckets)[:2] == ["1e-06", "2e-06"] and len(buckets) == 20
    assert [buckets[edge] for edge in ("1e-06", "2e-06", "4e-06")] == [2, 4, 5]
    assert buckets["0.262144"] == 6 and buckets["+Inf"] == 8
    assert histogram.sum == pytest.approx(1000.524295007)
    sizes = Histogram(SIZES)
    sizes.add(np.array([0, 64, 65, 256]))
    assert sizes.buckets()[:2] == [("64.0", 2.0), ("256.0", 4.0)]


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_within_five_percent(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = np.exp(generator.normal(10 + 2 * seed, 1.0, 20_000)).astype(np.int64)
    histogram = Histogram(DURATIONS)
    histogram.add(values)
    for fraction in (0.5, 0.99):
        exact = float(np.quantile(values, fraction)) * 1e-9
        assert histogram.quantile(fraction) == pytest.approx(exact, rel=0.05)
    assert Histogram(DURATIONS).quantile(0.5) is None
