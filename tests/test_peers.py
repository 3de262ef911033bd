"""Who is gone, and how ranks learn of it: by pidfds on a host, by the store's board beyond it."""

import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from onecast.comm import peers
from onecast.comm.lookout import Lookout
from onecast.comm.obituaries import Obituaries
from onecast.comm.peers import Peer, Peers

HERE, ELSEWHERE = 1, 2


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def peer_of(pid: int, rank: int, host: int = HERE) -> Peer:
    return Peer(rank, host, pid, peers._stat(pid)[1])


def group_with(*others: Peer) -> Peers:
    """The group of this process, rank 0, and others."""
    return Peers([peer_of(os.getpid(), 0), *others], 0)


def until(holds: Callable[[], bool], timeout_s: float = 5) -> float:
    """Seconds until it holds."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < timeout_s
        time.sleep(0.005)
    return time.monotonic() - start


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- processes of this host


def test_a_process_that_ends_is_gone_even_while_nobody_has_reaped_it(child):
    group = group_with(peer_of(child.pid, 1))
    assert group.gone() is None
    until(lambda: group.describe(1) == f"process {child.pid} is sleeping")
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: group.describe(1) == f"process {child.pid} is stopped")
    assert group.gone() is None
    os.kill(child.pid, signal.SIGKILL)
    assert until(lambda: group.gone() == 1) < 1
    assert group.describe(1) == f"process {child.pid} has ended"
    child.wait()
    assert group.gone() == 1
    assert group.describe(1) == f"process {child.pid} has ended"


def test_a_rank_that_left_in_order_may_end(child):
    group = group_with(peer_of(child.pid, 1))
    group.excuse(1)
    child.kill()
    child.wait()
    assert group.gone() is None


def test_a_pid_that_has_changed_hands_is_not_taken_for_the_peer(child):
    earlier = Peer(1, HERE, child.pid, peers._stat(child.pid)[1] - 1)
    group = group_with(earlier)
    assert group.gone() == 1
    assert group.describe(1) == f"process {child.pid} has ended"


def test_a_process_of_another_host_is_never_looked_up_here(child):
    group = group_with(peer_of(child.pid, 1, ELSEWHERE), peer_of(os.getpid(), 2))
    child.kill()
    child.wait()
    assert group.gone() is None
    assert group.describe(1) == "on another host"
    assert [group.is_near(rank) for rank in group.ranks] == [True, False, True]
    assert not group.on_one_host


def test_closing_gives_every_descriptor_back(child):
    before = open_fds()
    group = group_with(peer_of(child.pid, 1))
    assert open_fds() > before
    group.close()
    assert open_fds() == before
    child.kill()
    child.wait()
    assert group.gone() is None


# ---- the board of several hosts


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )


def board_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "obituaries" in thread.name]


def test_what_one_rank_posts_every_rank_of_that_board_hears_within_a_second(store):
    boards = [Obituaries(store, 7, rank) for rank in range(3)]
    other = Obituaries(store, 8, 0)
    boards[2].post(1, "its process ended")
    for board in boards:
        assert until(lambda board=board: board.heard is not None) < 1
        assert board.heard == (1, "its process ended")
    time.sleep(0.6)
    assert other.heard is None
    for board in (*boards, other):
        board.close()
    until(lambda: not board_threads())


def test_the_last_words_of_a_rank_are_out_before_its_board_closes(store):
    left, stays = Obituaries(store, 7, 0), Obituaries(store, 7, 1)
    left.post(0, "it left without closing the channel")
    left.close()
    assert until(lambda: stays.heard is not None) < 1
    stays.close()


def test_ranks_tell_how_long_ago_they_were_alive(store):
    boards = [Obituaries(store, 7, rank) for rank in range(2)]
    until(lambda: len(boards[0].ages([0, 1])) == 2)
    boards[1].close()
    until(lambda: len(board_threads()) == 1)
    time.sleep(1.2)
    ages = boards[0].ages([0, 1, 2])
    assert ages[0] < 1.2 <= ages[1] < 4
    assert 2 not in ages, "nothing was ever heard of it"
    boards[0].close()


def test_a_board_that_is_dropped_ends_its_thread(store):
    board = Obituaries(store, 7, 0)
    assert board_threads()
    del board
    gc.collect()
    until(lambda: not board_threads())


class LostStore:
    """A store whose host has gone."""

    def set(self, *_: object) -> None:
        raise dist.DistNetworkError("connection reset by peer")

    check = get = set


def test_a_lost_store_is_told_of_and_takes_nothing_else_down(store, monkeypatch):
    board = Obituaries(store, 7, 0)
    until(lambda: board._store is not None, 30)  # it resolves names
    monkeypatch.setattr(board, "_store", LostStore())
    until(lambda: board.silence is not None)
    assert board.silence == "the store of the process group is lost (connection reset by peer)"
    assert board.ages([0]) == {}
    board.post(1, "its process ended")
    board.close()
    assert board.heard is None
    group = group_with(peer_of(os.getpid(), 1, ELSEWHERE))
    assert Lookout(group, board, 0.1).describe() == f"rank 1: on another host; {board.silence}"


# ---- waiting with an eye on them


def deadline_in(seconds: float) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


def nap(nanoseconds: int) -> None:
    assert nanoseconds > 0
    time.sleep(min(nanoseconds, 1_000_000) / 1e9)


@pytest.mark.parametrize("spin", [0, 0.1, 1])
def test_a_wait_ends_when_it_is_over_and_no_later_than_its_deadline(spin):
    lookout = Lookout(group_with(), None, spin)
    for _ in range(5):
        due = deadline_in(0.02)
        assert lookout.wait(lambda due=due: time.monotonic_ns() >= due, nap, deadline_in(5))
        assert due <= time.monotonic_ns() < due + 500_000_000
    start = time.monotonic()
    assert not lookout.wait(lambda: False, nap, deadline_in(0.05))
    assert 0.05 <= time.monotonic() - start < 1
    assert not lookout.wait(lambda: False, nap, deadline_in(-1))
    assert lookout.wait(lambda: True, nap, deadline_in(-1))


@pytest.mark.parametrize("spin", [0, 0.1, 1])
def test_a_wait_for_a_rank_that_ends_is_over_within_a_second(child, spin):
    lookout = Lookout(group_with(peer_of(child.pid, 1)), None, spin)
    threading.Timer(0.3, child.kill).start()
    start = time.monotonic()
    assert not lookout.wait(lambda: False, nap, deadline_in(30))
    assert 0.3 <= time.monotonic() - start < 1.3
    assert lookout.gone() == (1, "its process ended")


def test_what_a_rank_had_sent_before_it_ended_still_arrives(child):
    child.kill()
    lookout = Lookout(group_with(peer_of(child.pid, 1)), None, 0.1)
    child.wait()
    due = deadline_in(0.1)
    assert lookout.wait(lambda: time.monotonic_ns() >= due, nap, deadline_in(30))


def test_sleeps_are_cut_into_slices_and_never_pass_the_deadline():
    asked = []

    def sleep(nanoseconds: int) -> None:
        asked.append(nanoseconds)
        time.sleep(nanoseconds / 1e9)

    lookout = Lookout(group_with(), None, 0)
    assert not lookout.wait(lambda: False, sleep, deadline_in(0.6))
    assert max(asked) <= 250_000_000
    assert 0.55e9 < sum(asked) <= 0.6e9


@pytest.mark.parametrize(
    ("cores", "spin", "sleeps"), [(0, 0.1, True), (99, 0.1, False), (0, 1, False)]
)
def test_nobody_spins_while_more_threads_run_than_there_are_cores(monkeypatch, cores, spin, sleeps):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores))
    looks: list[int] = []
    asked = []

    def ready() -> bool:
        looks.append(1)
        return bool(asked) or len(looks) > 50

    lookout = Lookout(group_with(), None, spin)
    slept = []
    for _ in range(10):
        assert lookout.wait(ready, asked.append, deadline_in(5))
        slept.append(bool(asked))
        looks.clear()
        asked.clear()
    # One that spins may lose its core for longer than it would spin: not every time.
    assert all(slept) if sleeps else not all(slept)


def test_a_source_sleeps_while_the_threads_of_its_group_send():
    asked: list[int] = []
    lookout = Lookout(group_with(), None, 1, sends=True)
    assert lookout.wait(lambda: bool(asked), asked.append, deadline_in(5))
    assert len(asked) == 1
