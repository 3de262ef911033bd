"""Memory without a name that processes share, and sleeping on a word of it."""

import errno
import os
import platform
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from cli_runs import stray_segments

from onecast.comm import CannotShare
from onecast.comm.frame_ring import Control, Ring, control_bytes
from onecast.comm.futex import Futex, is_weakly_ordered, make_fence, unsupported
from onecast.comm.segment import PAGE, Segment

MIB = 1 << 20


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(4 * PAGE)
    yield made
    made.close()


def open_files() -> list[str]:
    """What the descriptors of this process lead to."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the one that listed them
            continue
    return sorted(links)


# ---- segments


def test_what_one_writes_the_other_reads(segment):
    other = Segment.attach(os.getpid(), segment.fd, segment.key)
    here, there = segment.map(PAGE, 2 * PAGE), other.map(PAGE, 2 * PAGE)
    assert here[:] == bytes(2 * PAGE)
    here[5] = 7
    there[-1] = 8
    assert (there[5], here[-1]) == (7, 8)
    other.close()


def test_it_has_no_name_and_only_its_owner_may_open_it(segment):
    before = stray_segments()
    other = Segment.create(PAGE)
    assert stray_segments() == before
    assert os.readlink(f"/proc/self/fd/{other.fd}") == "/memfd:onecast (deleted)"
    assert stat.S_IMODE(os.fstat(other.fd).st_mode) == 0o600
    assert not os.get_inheritable(other.fd)
    other.close()


def test_it_can_grow_and_never_shrink(segment):
    memory = segment.map(0, PAGE)
    memory[100] = 1
    assert segment.reserved == 4 * PAGE
    assert segment.extend(3 * MIB) == 4 * PAGE
    assert segment.reserved == 4 * PAGE + 3 * MIB
    assert segment.extend(PAGE) == 4 * PAGE + 3 * MIB
    assert segment.map(4 * PAGE, 3 * MIB)[:] == bytes(3 * MIB)
    assert memory[100] == 1
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, PAGE)


def test_only_the_segment_that_was_meant_is_attached_to(segment):
    files = open_files()
    other = Segment.create(PAGE)
    empty = os.memfd_create("empty")
    for fd, key in [(other.fd, segment.key), (segment.fd, segment.key ^ 1), (empty, 0)]:
        with pytest.raises(CannotShare, match=f"descriptor {fd} of process {os.getpid()} is not"):
            Segment.attach(os.getpid(), fd, key)
    assert other.key != segment.key
    os.close(empty)
    other.close()
    with pytest.raises(FileNotFoundError):
        Segment.attach(os.getpid(), empty, 0)
    assert open_files() == files


def test_the_segment_of_a_process_that_ended_cannot_be_had(segment):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(FileNotFoundError):
        Segment.attach(child.pid, 3, segment.key)


def test_mappings_outlive_the_descriptor(segment):
    memory = segment.map(PAGE, PAGE)
    segment.close()
    segment.close()
    memory[0] = 5
    assert memory[0] == 5


def test_a_segment_that_is_dropped_gives_its_descriptor_back():
    files = open_files()
    segment = Segment.create(PAGE)
    assert len(open_files()) == len(files) + 1
    del segment
    assert open_files() == files


@pytest.fixture
def little_memory() -> Iterator[Callable[[int], None]]:
    """Limits what a file of this process may grow to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_memory_that_cannot_be_had_is_refused_with_its_size(segment, little_memory):
    files = open_files()
    little_memory(MIB)
    with pytest.raises(CannotShare, match=r"2,097,152 bytes .* besides 16,384 reserved before: "):
        segment.extend(2 * MIB)
    assert segment.reserved == 4 * PAGE
    with pytest.raises(CannotShare, match=r"2,097,152 bytes .* besides 0 reserved before"):
        Segment.create(2 * MIB)
    assert open_files() == files
    assert segment.extend(MIB // 2) == 4 * PAGE


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_no_space_is_told_apart_from_other_errors(segment, monkeypatch, code):
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(codes[0], os.strerror(codes[0]))

    codes = [code]
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(CannotShare, match=os.strerror(code)):
        segment.extend(PAGE)
    codes[0] = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        segment.extend(PAGE)


def test_a_ring_that_was_left_takes_no_memory_and_its_mapping_stays_readable(segment):
    offset = segment.extend(4 * MIB)
    ring, again = (Ring(segment, 0, offset, MIB, 4) for _ in range(2))
    ring.regions[3].tensor.fill_(9)
    assert again.regions[3].tensor[-1] == 9
    segment.give_back(ring.offset, ring.slot_bytes * ring.slots)
    assert segment.reserved == 4 * PAGE
    assert again.regions[0].tensor[0] == 0


def test_the_control_page_has_room_for_its_readers():
    for readers in (0, 1, 64, 65, 320):
        segment = Segment.create(control_bytes(readers))
        control = Control(segment, readers)
        assert len(control.words) * 8 == control_bytes(readers)
        assert len({word // 8 for word in control.takens}) == readers, "a cache line each"
        assert all(word < len(control.words) for word in control.takens)
        segment.close()


# ---- sleeping and waking


def test_a_word_that_has_changed_is_not_slept_on(segment):
    memory = segment.map(0, PAGE)
    futex = Futex(memory, 64)
    memory[64:72] = (7 << 32 | 5).to_bytes(8, "little")
    start = time.monotonic()
    futex.wait(6, 10_000_000_000)
    assert time.monotonic() - start < 5


def test_a_sleep_ends_with_its_time(segment):
    memory = segment.map(0, PAGE)
    futex = Futex(memory, 64)
    memory[64:72] = (7 << 32 | 5).to_bytes(8, "little")
    for upper in (0, 9 << 32):  # of what is expected only the low half counts
        start = time.monotonic()
        futex.wait(upper | 5, 100_000_000)
        assert 0.09 < time.monotonic() - start < 5
    start = time.monotonic()
    futex.wait(5, 0)
    assert time.monotonic() - start < 5


def test_a_sleeper_lets_other_threads_run_and_one_of_them_can_wake_it(segment):
    memory = segment.map(0, PAGE)
    futex = Futex(memory, 64)
    done = []

    def wake() -> None:
        time.sleep(0.1)
        done.append(sum(range(100_000)))
        memory[64] = 1
        futex.wake()

    thread = threading.Thread(target=wake)
    thread.start()
    start = time.monotonic()
    while memory[64] == 0:
        futex.wait(0, 10_000_000_000)
    assert done and time.monotonic() - start < 5
    thread.join()


ANSWER = """
import sys
from onecast.comm.futex import Futex
from onecast.comm.segment import PAGE, Segment
pid, fd, key = map(int, sys.argv[1:])
memory = Segment.attach(pid, fd, key).map(0, PAGE)
memory[200] = 1
Futex(memory, 200).wake()
here = Futex(memory, 128)
while memory[128] == 0:
    here.wait(0, 10_000_000_000)
memory[200] = 2
Futex(memory, 200).wake()
"""


def test_processes_wake_one_another(segment):
    memory = segment.map(0, PAGE)
    there, here = Futex(memory, 128), Futex(memory, 200)
    args = [str(number) for number in (os.getpid(), segment.fd, segment.key)]
    with subprocess.Popen([sys.executable, "-P", "-c", ANSWER, *args]) as child:
        deadline = time.monotonic() + 30
        while memory[200] == 0 and time.monotonic() < deadline:
            here.wait(0, 1_000_000_000)
        time.sleep(0.1)  # it sleeps by now
        memory[128] = 1
        start = time.monotonic()
        there.wake()
        while memory[200] == 1 and time.monotonic() < deadline:
            here.wait(1, 10_000_000_000)
        assert memory[200] == 2
        assert time.monotonic() - start < 5
    assert child.returncode == 0


def test_waking_nobody_is_nothing(segment):
    Futex(segment.map(0, PAGE), 0).wake()


def test_where_futexes_cannot_be_used_the_reason_is_given(monkeypatch):
    assert unsupported() is None
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    assert unsupported() == "the number of the futex call on Linux sparc64 is not known"
    monkeypatch.undo()
    monkeypatch.setattr(platform, "system", lambda: "Plan9")
    assert "on Plan9" in str(unsupported())


@pytest.mark.parametrize(("machine", "weak"), [("x86_64", False), ("aarch64", True)])
def test_a_fence_can_be_called_on_any_machine(monkeypatch, machine, weak):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert is_weakly_ordered() == weak
    fence, another = make_fence(), make_fence()
    for _ in range(100):
        fence()
        another()


def test_more_memory_than_there_is_is_refused_and_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onecast.comm.segment._available_bytes", lambda: 100 << 20)
    with pytest.raises(CannotShare, match=r"134,217,728 bytes .* 104,857,600 are available"):
        Segment.create(128 << 20)
    segment = Segment.create(PAGE)
    with pytest.raises(CannotShare, match="are available"):
        segment.extend(128 << 20)
    assert segment.reserved == PAGE
    segment.close()
