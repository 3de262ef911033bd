"""What only the channel through shared memory promises, on real ranks.

What it promises like every channel stands in test_channels.
"""

import contextlib
import errno
import fcntl
import gc
import os
import random
import resource
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cli_runs import stray_segments
from test_frame import assert_arrived, block_message

from onecast.comm import (
    BrokenChannel,
    CannotShare,
    Closed,
    PeerLost,
    PublishTimeout,
    ReceiveTimeout,
    SharedMemoryChannel,
    futex,
    open_channel,
    peers,
    ring_writer,
    sharing,
)
from onecast.comm.channel import TRANSPORTS
from onecast.comm.frame_ring import NUM_RINGS
from onecast.comm.ring_writer import FIRST_SLOT_BYTES
from onecast.comm.testing import RankFailed, run_ranks

WORLD = 5
SLOTS = 4
RING_BYTES = SLOTS * FIRST_SLOT_BYTES
PAGES = 64 << 10  # more than the control page takes
MIB = 1 << 20


def exchange(channel: Any, mapping: Any) -> Any:
    """The frame of `mapping`, on either side."""
    return channel.publish(mapping) if channel.is_source else channel.receive()


def take(channel: Any, steps: Any, timeout_s: float | None = None) -> None:
    for step in steps:
        with channel.receive(timeout_s) as frame:
            assert frame.mapping["step"] == step


def pids() -> list[int]:
    table = [torch.zeros(1, dtype=torch.int64) for _ in range(WORLD)]
    dist.all_gather(table, torch.tensor([os.getpid()]))
    return [int(pid) for pid in table]


def segments() -> dict[int, int]:
    """The segments that this process has open: a descriptor of each, by inode."""
    fds = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:onecast"):
                fds[os.stat(f"/proc/self/fd/{fd}").st_ino] = int(fd)
    return fds


def memory_taken() -> int:
    """Bytes that the segments of this process take."""
    return sum(os.fstat(fd).st_blocks * 512 for fd in segments().values())


@contextlib.contextmanager
def files_limited_to(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- the ring


def the_source_runs_ahead(rank: int) -> None:
    channel = SharedMemoryChannel()
    for first in range(0, 3 * SLOTS, SLOTS):
        steps = range(first, first + SLOTS)
        if rank == 0:
            for step in steps:
                channel.publish({"step": step})
        dist.barrier()
        if rank != 0:
            take(channel, steps, timeout_s=0)
        dist.barrier()
    channel.close()


def a_full_ring_is_waited_for_and_says_for_whom(rank: int) -> None:
    channel = SharedMemoryChannel(timeout_s=0.4 if rank == 0 else 20)
    if rank == 0:
        for step in range(SLOTS):
            channel.publish({"step": step})
        for _ in range(2):
            with pytest.raises(
                PublishTimeout, match=r"frame 4 was not published: after 0\.4 s "
            ) as late:
                channel.publish({"step": 4, "a layout of its own": torch.arange(3)})
            text = str(late.value)
            for reader in (1, 3, 4):
                assert f"rank {reader} has taken 0 of 4 frames" in text
            assert "rank 2 has taken" not in text
            assert isinstance(late.value, TimeoutError)
    elif rank == 2:
        take(channel, range(SLOTS))
    dist.barrier()
    if rank not in (0, 2):
        take(channel, range(SLOTS))
    dist.barrier()
    for step in (4, 5):
        mapping = {"step": step, "a layout of its own": torch.arange(3)}
        with exchange(channel, mapping) as frame:
            assert_arrived(mapping, frame.mapping)
            assert frame.sequence == step
    channel.close()


def a_frame_that_is_held_keeps_its_slot(rank: int) -> None:
    channel = SharedMemoryChannel(timeout_s=0.3 if rank == 0 else 20)
    if rank == 0:
        for step in range(SLOTS):
            channel.publish({"step": step, "a": torch.full((1000,), step)})
        dist.barrier()
        with pytest.raises(PublishTimeout, match="rank 1 has taken 0 of 4") as late:
            channel.publish({"step": 4, "a": torch.full((1000,), 4)})
        assert "rank 2 has taken" not in str(late.value)
        dist.barrier()
        channel._writer._timeout_s = 20
        channel.publish({"step": 4, "a": torch.full((1000,), 4)})
    elif rank == 1:
        frame = channel.receive()
        dist.barrier()
        dist.barrier()
        assert frame.mapping["a"].tolist() == [0] * 1000
        take(channel, range(1, 5))
    else:
        take(channel, range(SLOTS))
        dist.barrier()
        dist.barrier()
        take(channel, [4])
    dist.barrier()
    channel.close()


def a_stopped_process_is_told_as_such(rank: int) -> None:
    channel = SharedMemoryChannel(timeout_s=0.6 if rank == 0 else 30)
    stopped = pids()[2]
    exchange(channel, {"step": 0}).release()
    if rank == 0:
        time.sleep(0.3)  # all wait for the next frame by then
        os.kill(stopped, signal.SIGSTOP)
        text = (
            rf"rank 2 has taken \d of \d frames, its last sign of life here was \d\.\d s ago, "
            rf"its process {stopped} is stopped$"
        )
        published = 1
        with pytest.raises(PublishTimeout, match=text) as late:
            while published < 3 * SLOTS:
                channel.publish({"step": published})
                published += 1
        assert "rank 1" not in str(late.value)
        assert published in (SLOTS, SLOTS + 1)
        os.kill(stopped, signal.SIGCONT)
        channel._writer._timeout_s = 30
        for step in range(published, 20):
            channel.publish({"step": step})
    else:
        take(channel, range(1, 20))
    dist.barrier()
    channel.close()


def a_receiver_is_told_how_the_source_is(rank: int) -> None:
    channel = SharedMemoryChannel(timeout_s=30)
    table = pids()
    exchange(channel, {"step": 0}).release()
    if rank == 1:
        time.sleep(0.2)
        os.kill(table[0], signal.SIGSTOP)
        text = (
            r"waited 0\.3 s in vain for frame 1 from rank 0: its last sign of life here was "
            rf"\d\.\d s ago, its process {table[0]} is stopped$"
        )
        with pytest.raises(ReceiveTimeout, match=text):
            channel.receive(timeout_s=0.3)
        os.kill(table[0], signal.SIGCONT)
    if rank == 0:
        time.sleep(0.4)
        channel.publish({"step": 1})
    else:
        take(channel, [1])
    channel.close()


def larger_slots_are_moved_to_with_readers_behind(rank: int) -> None:
    channel = SharedMemoryChannel(timeout_s=10)
    # Of 8-byte numbers: within the first slots, in larger ones, back, in much larger ones.
    counts = [10, 20, 200_000, 30, 190_000, 2_000_000, 5]
    if rank == 0:
        for step, count in enumerate(counts):
            channel.publish({"step": step, "a": torch.arange(count)})
    dist.barrier()
    if rank != 0:
        for step, count in enumerate(counts):
            with channel.receive() as frame:
                assert_arrived({"step": step, "a": torch.arange(count)}, frame.mapping)
    channel.close()


def rings_come_and_go_without_end(rank: int) -> None:
    """Many more than the table of rings has lines; their memory goes back."""
    window = ring_writer._WINDOW
    ring_writer._WINDOW = 8
    channel = SharedMemoryChannel(timeout_s=20)
    generator = random.Random(rank)
    most = 0
    for step in range(2 * NUM_RINGS * 10):
        count = 400_000 if step % 20 == 0 else step % 7
        if generator.random() < 0.01:
            time.sleep(0.005)
        with exchange(channel, {"step": step, "a": torch.full((count,), step)}) as frame:
            assert frame.mapping["step"] == step
            assert frame.mapping["a"].tolist()[-1:] == [step] * min(count, 1)
        most = max(most, memory_taken())
    ring_writer._WINDOW = window
    dist.barrier()
    if rank == 0:
        assert len(channel._writer._bases) > 2 * NUM_RINGS
    assert most < 80 * MIB
    channel.close()


def one_huge_frame_does_not_keep_its_memory(rank: int) -> None:
    channel = SharedMemoryChannel(timeout_s=30)
    huge = torch.arange(13_000_000)  # 104 MB
    with exchange(channel, {"huge": huge}) as frame:
        assert torch.equal(frame.mapping["huge"], huge)
    assert memory_taken() > 200 * MIB, "two slots"
    for step in range(520):  # two windows, of which the second has none but small frames
        exchange(channel, {"step": step}).release()
    dist.barrier()
    assert memory_taken() <= RING_BYTES + PAGES, memory_taken()
    channel.close()


def a_large_frame_now_and_then_takes_no_more_each_time(rank: int) -> None:
    """Also where the slots were about to get smaller when it came."""
    window = ring_writer._WINDOW
    ring_writer._WINDOW = 8
    channel = SharedMemoryChannel(timeout_s=20)
    taken = []
    for step in range(12 * 16):
        if step % 16 == 8:
            dist.barrier()  # all readers have taken what there is
            taken.append(memory_taken())
            dist.barrier()
        exchange(channel, {"a": torch.arange(400_000 if step % 16 == 8 else 3)}).release()
    ring_writer._WINDOW = window
    assert taken[-1] <= taken[2], taken
    channel.close()


def repeated_frames_have_the_same_tensors(rank: int) -> None:
    channel = SharedMemoryChannel()
    tensors: list[torch.Tensor] = []
    for step in range(10 * SLOTS):
        mapping = {"ids": torch.full((64,), step), "step": step}
        with exchange(channel, mapping) as frame:
            ids = frame.mapping["ids"]
            assert_arrived(mapping, frame.mapping)
            if SLOTS <= step < 2 * SLOTS:  # before, the layout was new
                assert all(ids.data_ptr() != tensor.data_ptr() for tensor in tensors)
                tensors.append(ids)
            elif step >= 2 * SLOTS:
                assert ids is tensors[step % SLOTS]
    channel.close()


def frames_are_never_torn(rank: int) -> None:
    channel = SharedMemoryChannel()
    generator = random.Random(rank)
    for step in range(1500):
        count = step * 37 % 5000 + 1
        if generator.random() < 0.01:
            time.sleep(generator.random() / 500)
        mapping = {"a": torch.full((count,), step), "step": step, "b": torch.tensor([step])}
        with exchange(channel, mapping) as frame:
            low, high = frame.mapping["a"].aminmax()
            assert int(low) == int(high) == int(frame.mapping["b"]) == frame.mapping["step"] == step
            assert len(frame.mapping["a"]) == count
    channel.close()


# ---- several at once, small and large worlds


def two_engines_on_one_host_do_not_meet(rank: int) -> None:
    groups = [dist.new_group(), dist.new_group([1, 2, 4])]
    there = SharedMemoryChannel(groups[0], src=0)
    back = SharedMemoryChannel(groups[0], src=4)
    other = SharedMemoryChannel(groups[1], src=2) if rank in (1, 2, 4) else None
    for step in range(60):
        assert exchange(there, {"step": step}).mapping == {"step": step}
        assert exchange(back, {"answer": -step}).mapping == {"answer": -step}
        if other is not None:
            mapping = {"other": torch.arange(step * 3000)}
            assert_arrived(mapping, exchange(other, mapping).mapping)
    for channel in (back, other, there):
        if channel is not None:
            channel.close()


def one_rank_alone_publishes_to_nobody(rank: int) -> None:
    groups = [dist.new_group([member]) for member in range(WORLD)]
    channel = SharedMemoryChannel(groups[rank], src=rank, timeout_s=5)
    assert channel.is_source
    for step in range(50):
        mapping = {"step": step, "a": torch.arange(step * 5000)}
        with channel.publish(mapping) as frame:
            assert_arrived(mapping, frame.mapping)
    assert channel.sequence == 50
    channel.close()
    with pytest.raises(Closed):
        channel.publish({})


def channels_leave_nothing_in_the_process(rank: int) -> None:
    def count() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count("memfd:onecast")
        return len(os.listdir("/proc/self/fd")), maps

    counts = []
    for _ in range(4):
        channel = SharedMemoryChannel()
        for size in (10, 200_000, 10):
            exchange(channel, {"a": torch.arange(size)}).release()
        channel.close()
        del channel
        counts.append(count())
    assert counts == [counts[0]] * 4
    assert counts[0][1] == 0
    dist.barrier()


def the_memory_has_no_name_and_is_the_owners_alone(rank: int) -> None:
    names = stray_segments()
    channel = SharedMemoryChannel()
    exchange(channel, block_message())
    assert stray_segments() <= names
    (fd,) = segments().values()
    status = os.fstat(fd)
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.getuid())
    assert status.st_nlink == 0
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    assert memory_taken() <= RING_BYTES + PAGES
    channel.close()


# ---- closing


def a_source_without_receivers_is_told(rank: int) -> None:
    channel = SharedMemoryChannel()
    exchange(channel, {"step": 0}).release()
    if rank != 0:
        channel.close()
        dist.barrier()
        return
    dist.barrier()
    deadline = time.monotonic() + 5
    with pytest.raises(
        Closed, match=r"all receivers have closed the channel: ranks \[1, 2, 3, 4\]"
    ):
        while time.monotonic() < deadline:
            channel.publish({})
    with pytest.raises(Closed):
        channel.publish({})
    channel.close()


def a_receiver_that_closes_holds_nobody_up(rank: int) -> None:
    """Whether it has a frame in hand or a ring of frames before it."""
    channel = SharedMemoryChannel(timeout_s=10)
    if rank == 0:
        for step in range(10 * SLOTS):
            channel.publish({"step": step, "a": torch.arange(step * 3000)})
    elif rank == 1:
        channel.receive()
        time.sleep(0.2)  # the source is a ring ahead, and waits
        channel.close()
    else:
        take(channel, range(10 * SLOTS))
    channel.close()


# ---- waiting


def an_interrupt_ends_a_wait_at_once(rank: int) -> None:
    channel = SharedMemoryChannel(timeout_s=30)
    table = pids()
    exchange(channel, {"step": 0}).release()
    if rank == 1:
        with pytest.raises(KeyboardInterrupt):
            channel.receive()
        told = torch.tensor([time.monotonic()], dtype=torch.float64)
        with pytest.raises(BrokenChannel, match="KeyboardInterrupt"):
            channel.receive()
        channel.close()
        dist.send(told, 0)
    elif rank == 0:
        time.sleep(0.3)
        start = time.monotonic()
        os.kill(table[1], signal.SIGINT)
        told = torch.zeros(1, dtype=torch.float64)
        dist.recv(told, 1)
        assert float(told) - start < 1
        for step in range(1, 20):
            channel.publish({"step": step})
    if rank > 1:
        take(channel, range(1, 20))
    channel.close()


def other_threads_run_while_a_frame_is_awaited(rank: int) -> None:
    channel = SharedMemoryChannel()
    if rank == 0:
        time.sleep(0.3)
        channel.publish({"step": 0})
    else:
        turns = []
        over = threading.Event()

        def turn() -> None:
            while not over.wait(0.001):
                turns.append(time.monotonic())

        thread = threading.Thread(target=turn)
        thread.start()
        start = time.monotonic()
        take(channel, [0])
        waited = [at for at in turns if start < at < start + 0.2]
        over.set()
        thread.join()
        assert len(waited) > 10
    channel.close()


def an_idle_receiver_takes_next_to_no_cpu(rank: int) -> float:
    channel = SharedMemoryChannel()
    for step in range(50):  # a cadence, after which nothing comes any more
        if rank == 0:
            time.sleep(0.002)
        exchange(channel, {"step": step}).release()
    dist.barrier()
    start = time.process_time()
    share = 0.0
    if rank == 0:
        time.sleep(2)
    else:
        with pytest.raises(ReceiveTimeout):
            channel.receive(timeout_s=2)
        share = (time.process_time() - start) / 2
        assert share < 0.05, share
    dist.barrier()
    channel.close()
    return share


# ---- what cannot be shared


def ranks_of_several_hosts_are_told_so(rank: int) -> None:
    own = peers._host_key
    for hosts, expected in [
        ([7, 7, 8, 8, 8], "two-level" if "two-level" in TRANSPORTS else "process-group"),
        ([5, 6, 7, 8, 9], "process-group"),
    ]:
        peers._host_key = lambda hosts=hosts: hosts[rank]
        try:
            with pytest.raises(
                CannotShare, match=rf"different hosts: \{{0: {hosts[0]}, 1: {hosts[1]}"
            ):
                open_channel(transport="shared-memory")
            channel = open_channel()
            assert channel.name == expected
            assert exchange(channel, {"a": 1}).mapping == {"a": 1}
            channel.close()
        finally:
            peers._host_key = own
    channel = open_channel()
    assert channel.name == "shared-memory"
    channel.close()


def refuse_to_open(path: str, *args: Any, **kwargs: Any) -> int:
    if str(path).startswith("/proc/"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return OPEN(path, *args, **kwargs)


OPEN = os.open


def refuse_memory(above: int) -> Callable[[int, int, int], None]:
    fallocate = os.posix_fallocate

    def refuse(fd: int, offset: int, nbytes: int) -> None:
        if nbytes > above:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(fd, offset, nbytes)

    return refuse


def what_one_rank_cannot_do_is_told_to_all(rank: int) -> None:
    troubles: list[tuple[int, Any, str, Any, str]] = [
        (2, os, "open", refuse_to_open, r"rank 2: cannot open the memory of rank 0: .*denied"),
        (3, sharing, "unsupported", lambda: "no futex here", "rank 3: no futex here"),
        (0, os, "posix_fallocate", refuse_memory(0), r"rank 0: [\d,]+ bytes .*No space left"),
        # Enough for the page that controls the ring, not for the ring.
        (0, os, "posix_fallocate", refuse_memory(MIB), r"rank 0: [\d,]{7,} bytes .*No space left"),
        (0, os, "memfd_create", refuse_to_create, "rank 0: .*Too many open files"),
    ]
    for culprit, module, name, broken, text in troubles:
        with pytest.MonkeyPatch.context() as patch:
            if rank == culprit:
                patch.setattr(module, name, broken)
            with pytest.raises(CannotShare, match=text):
                SharedMemoryChannel()
            assert segments() == {}
            channel = open_channel()
            assert channel.name == "process-group"
            assert exchange(channel, {"a": 1}).mapping == {"a": 1}
            channel.close()


def an_unforeseen_error_of_the_writer_strands_nobody(rank: int) -> None:
    def broken(num_readers: int) -> Any:
        raise KeyError("unforeseen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "make_ring_segment", broken)
        expected: type[Exception] = KeyError if rank == 0 else CannotShare
        with pytest.raises(expected, match=r"^'unforeseen'|rank 0: KeyError: 'unforeseen'"):
            SharedMemoryChannel()
    channel = open_channel()
    assert exchange(channel, {"a": 1}).mapping == {"a": 1}
    channel.close()


def refuse_to_create(name: str, flags: int) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def memory_that_cannot_be_had_later_costs_that_frame_alone(rank: int) -> None:
    channel = SharedMemoryChannel(timeout_s=20)
    exchange(channel, {"step": 0}).release()
    large = {"a layout of its own": torch.arange(3_000_000)}
    if rank == 0:
        before = memory_taken()
        with files_limited_to(4 * MIB):
            for _ in range(3):
                with pytest.raises(
                    CannotShare, match=r"[\d,]{9,} bytes of shared memory cannot be"
                ):
                    channel.publish(large)
            assert memory_taken() == before
            assert channel.sequence == 1
            for step in range(1, 6):
                channel.publish({"step": step})
    else:
        take(channel, range(1, 6))
    for mapping in (large, {"a layout of its own": torch.arange(3)}, large):
        assert_arrived(mapping, exchange(channel, mapping).mapping)
    channel.close()


def futexes_are_there(rank: int) -> None:
    assert futex.unsupported() is None


HEALTHY: list[Callable[[int], Any]] = [
    futexes_are_there,
    an_unforeseen_error_of_the_writer_strands_nobody,
    the_source_runs_ahead,
    a_full_ring_is_waited_for_and_says_for_whom,
    a_frame_that_is_held_keeps_its_slot,
    a_stopped_process_is_told_as_such,
    a_receiver_is_told_how_the_source_is,
    larger_slots_are_moved_to_with_readers_behind,
    rings_come_and_go_without_end,
    one_huge_frame_does_not_keep_its_memory,
    a_large_frame_now_and_then_takes_no_more_each_time,
    repeated_frames_have_the_same_tensors,
    frames_are_never_torn,
    two_engines_on_one_host_do_not_meet,
    one_rank_alone_publishes_to_nobody,
    channels_leave_nothing_in_the_process,
    the_memory_has_no_name_and_is_the_owners_alone,
    a_source_without_receivers_is_told,
    a_receiver_that_closes_holds_nobody_up,
    an_interrupt_ends_a_wait_at_once,
    other_threads_run_while_a_frame_is_awaited,
    an_idle_receiver_takes_next_to_no_cpu,
    ranks_of_several_hosts_are_told_so,
    what_one_rank_cannot_do_is_told_to_all,
    memory_that_cannot_be_had_later_costs_that_frame_alone,
]


def run_scenarios(rank: int) -> dict[str, Any]:
    results = {}
    for scenario in HEALTHY:
        start = time.monotonic()
        results[scenario.__name__] = scenario(rank)
        dist.barrier()
        gc.collect()  # a caught error holds its frames, and they the channel
        assert segments() == {}, f"{scenario.__name__} left its memory behind"
        if rank == 0:
            print(f"{time.monotonic() - start:6.2f} s  {scenario.__name__}")
    return results


@pytest.fixture(scope="module")
def healthy() -> list[dict[str, Any]]:
    """What each scenario returned, by rank; a failed assertion of any fails all."""
    return run_ranks(run_scenarios, WORLD, timeout_s=120)


@pytest.mark.parametrize("scenario", HEALTHY, ids=lambda scenario: scenario.__name__)
def test_in_a_healthy_world(healthy, scenario):
    assert all(scenario.__name__ in results for results in healthy)


# ---- ranks that leave, and one that dies while the source waits for it


def leave_one_after_another(rank: int, folder: str) -> tuple[int | None, float]:
    worlds = [[0, 1, 2, 3], [0, 1, 2], [0, 1], [0, 1]]
    groups = [dist.new_group(members) for members in worlds]
    first, second, third, fourth = (
        SharedMemoryChannel(group, timeout_s=20) if rank in members else None
        for group, members in zip(groups, worlds, strict=True)
    )
    assert first is not None
    exchange(first, {"step": 0}).release()
    if rank == 3:  # leaves in order, and its process ends
        first.close()
        os._exit(0)
    if rank == 0:
        for step in range(1, 100):
            first.publish({"step": step})
            time.sleep(0.005)
    else:
        take(first, range(1, 100))
    first.close()

    assert second is not None
    exchange(second, {"step": 0}).release()
    lost = PeerLost(None, "")
    if rank == 2:
        time.sleep(0.3)  # the source has filled the ring and waits for this rank
        Path(folder, "death").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        with pytest.raises(PeerLost, match=r"rank 2 is lost: .* frame 5") as raised:
            for step in range(1, 2 * SLOTS):
                second.publish({"step": step})
        with pytest.raises(BrokenChannel, match="PeerLost"):
            second.publish({})
    else:
        take(second, range(1, 1 + SLOTS))  # nothing that was published is lost to the others
        with pytest.raises(PeerLost) as raised:
            second.receive()
    lost, told = raised.value, time.monotonic()
    second.close()

    assert third is not None and fourth is not None
    sizes = [3, 3, 3, 200_000]  # the last in a larger ring, which is mapped when its maker is gone
    if rank == 0:
        for channel in (third, fourth):
            for step, size in enumerate(sizes):
                channel.publish({"step": step, "a": torch.full((size,), step)})
        third.close()
        Path(folder, f"lost-{lost.rank}").write_text(str(told))
        os._exit(0)
    state = Path(f"/proc/{third._peers.by_rank[0].pid}/stat")
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    for channel in (third, fourth):
        for step, size in enumerate(sizes):
            with channel.receive() as frame:
                assert frame.mapping["a"].tolist() == [step] * size
    for _ in range(2):
        with pytest.raises(Closed):
            third.receive()
    with pytest.raises(PeerLost, match="rank 0 is lost"):
        fourth.receive()
    third.close()
    fourth.close()
    return lost.rank, told


def test_only_those_that_leave_without_closing_are_lost(tmp_path):
    with pytest.raises(RankFailed) as failed:
        run_ranks(leave_one_after_another, 4, str(tmp_path))
    assert list(failed.value.results) == [1], failed.value.details
    lost, told = failed.value.results[1]
    assert lost == 2
    death = float(Path(tmp_path, "death").read_text())
    assert told - death < 2
    assert float(Path(tmp_path, "lost-2").read_text()) - death < 2
