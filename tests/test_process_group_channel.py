"""The channel over a process group, on real ranks: one broadcast a frame, and honest errors."""

import contextlib
import gc
import io
import logging
import os
import re
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from channel_runs import collectives, draw_mappings, exchange
from test_frame import assert_arrived, block_message
from torch.distributed import distributed_c10d as c10d

import onecast.comm
from onecast.comm import (
    BrokenChannel,
    Closed,
    FrameError,
    OutOfStep,
    PeerLost,
    ProcessGroupChannel,
    PublishTimeout,
    ReceiveTimeout,
    open_channel,
    peers,
    staging,
)
from onecast.comm.ladder import SMALLEST, WINDOW, Capacity, rung
from onecast.comm.region import POISON
from onecast.comm.testing import RankFailed, run_ranks
from onecast.telemetry.intercept import CollectiveInstrumentor

WORLD = 4
DRAWN = b""  # in a rank: what `draw_mappings` gave


# ---- what holds in a healthy world: each of these runs on all four ranks of one


def every_mapping_arrives(rank: int) -> None:
    channel = ProcessGroupChannel(src=1)
    drawn = torch.load(io.BytesIO(DRAWN), weights_only=False)
    for mapping in drawn:
        for _ in range(2):
            capacity, before = channel.capacity, collectives()
            with exchange(channel, mapping) as frame:
                assert_arrived(mapping, frame.mapping)
                assert collectives() - before == (1 if frame.nbytes <= capacity else 2)
                assert frame.sequence == channel.sequence - 1
    assert channel.sequence == 2 * len(drawn) >= 200
    channel.close()


def sizes_go_up_and_down(rank: int) -> list[tuple[int, int]]:
    channel = ProcessGroupChannel()
    steps = []
    for count in [0, 1, 5000, 20, 5000, 5001, 0, 300_000, 7, 299_000]:
        mapping = {"a": torch.arange(count), "text": "x" * (count % 3000)}
        before = channel.broadcasts
        with exchange(channel, mapping) as frame:
            assert_arrived(mapping, frame.mapping)
            steps.append((channel.broadcasts - before, frame.nbytes))
    channel.close()
    return steps


def capacity_follows_the_frames(rank: int) -> list[int]:
    channel = ProcessGroupChannel()
    capacities = [channel.capacity]
    counts = [10, 40_000, *[10] * 3 * WINDOW, 20, 40_000, *[10] * 5]
    for count in counts:
        mapping = {"a": torch.arange(count)}
        with exchange(channel, mapping) as frame:
            assert_arrived(mapping, frame.mapping)
        if channel.capacity != capacities[-1]:
            capacities.append(channel.capacity)
    channel.close()
    return capacities


class Recorder:
    """A probe that keeps what it is told, and fails when asked to."""

    def __init__(self) -> None:
        self.told: list[tuple[int, ...]] = []
        self.fails = False

    def published(self, *numbers: int) -> None:
        if self.fails:
            raise RuntimeError("the probe's own trouble")
        self.told.append(numbers)

    received = published


def the_probe_is_told(rank: int) -> list[tuple[int, ...]]:
    probe = Recorder()
    channel = ProcessGroupChannel(probe=probe)
    for count in [1, 1, 1000]:
        exchange(channel, {"a": torch.arange(count)})
    told = probe.told.copy()
    for numbers in told:
        assert numbers[4] <= numbers[5] <= numbers[6] <= time.perf_counter_ns()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("onecast").addHandler(handler)
    probe.fails = True
    for _ in range(3):
        assert exchange(channel, {"a": 1}).mapping == {"a": 1}
    logging.getLogger("onecast").removeHandler(handler)
    assert messages == ["the probe failed; it is removed"]
    channel.close()
    return [numbers[:4] for numbers in told]


def a_channel_does_not_keep_its_group(rank: int) -> None:
    group = dist.new_group()
    assert group is not None
    channel, alive = ProcessGroupChannel(group), weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert alive() is None
    with pytest.raises(onecast.comm.CommError, match="the process group was destroyed"):
        exchange_on = channel.publish if rank == 0 else lambda mapping: channel.receive()
        exchange_on({"a": 1})


class HostStream:
    """Stands for a CUDA stream; keeps what it was made to wait for."""

    def __init__(self) -> None:
        self.waited_for: list[HostStream] = []

    def wait_stream(self, other: "HostStream") -> None:
        self.waited_for.append(other)


class HostEvent:
    """Stands for a CUDA event of copies that are over at once, or only once it is let go."""

    held = False
    records: ClassVar[list[HostStream]] = []

    def record(self, stream: HostStream) -> None:
        self.records.append(stream)

    def synchronize(self) -> None:
        assert not self.held, "the host would wait without a time-out"

    def query(self) -> bool:
        return not self.held


@contextlib.contextmanager
def host_as_device() -> Iterator[list[HostStream]]:
    """The GPU path on host memory; the current stream is the last of the list."""
    streams = [HostStream()]
    zeros = staging._zeros
    HostEvent.records.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", HostEvent)
        patch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
        patch.setattr(staging, "_zeros", lambda nbytes, pinned: zeros(nbytes, pinned=False))
        yield streams


def device_staging_moves_the_same_bytes(rank: int) -> None:
    """The bookkeeping of the GPU path, on host memory in the place of a device's."""
    for by_stream in (False, True):
        with host_as_device():
            channel = ProcessGroupChannel()
            channel._staging = staging.DeviceStaging(torch.device("cpu"), by_stream)
            for mapping in [
                block_message(),
                block_message(),
                {"array": torch.arange(5).numpy(), "on device": torch.ones(3), "n": 1},
                {"array": torch.arange(5000).numpy(), "on device": torch.ones(3), "n": 2},
                {"metadata beyond the first copy": "x" * 10_000, **block_message()},
                {"metadata beyond the first copy": "y" * 10_000, **block_message()},
                {"small": torch.ones(1)},
            ]:
                for _ in range(2):
                    with exchange(channel, mapping) as frame:
                        assert_arrived(mapping, frame.mapping)
            channel.close()


def device_staging_orders_a_new_stream_behind_the_one_before(rank: int) -> None:
    with host_as_device() as streams:
        channel = ProcessGroupChannel()
        channel._staging = staging.DeviceStaging(torch.device("cpu"), by_stream=True)
        for step in range(6):
            if step % 2 == 0:
                streams.append(HostStream())
            exchange(channel, {"step": step}).release()
            assert HostEvent.records[-1] is streams[-1]  # the copy that the host asks about
        assert [stream.waited_for for stream in streams] == [[], *[[one] for one in streams[:-1]]]
        channel.close()


def device_staging_copies_once_each_way(rank: int) -> None:
    """One upload a frame, one broadcast, and of it the header and metadata alone come back."""
    with host_as_device():
        channel = ProcessGroupChannel()
        device = channel._staging = staging.DeviceStaging(torch.device("cpu"), by_stream=True)
        mapping = {"ids": torch.arange(4000), "step": 1}
        exchange(channel, mapping)
        address = exchange(channel, mapping).mapping["ids"].data_ptr()
        HostEvent.records.clear()
        device._pinned.tensor.fill_(POISON)
        before = channel.broadcasts
        with exchange(channel, mapping) as frame:
            assert frame.mapping["ids"].data_ptr() == address
            assert device.region.tensor.data_ptr() <= address
        assert len(HostEvent.records) == channel.broadcasts - before == 1
        if not channel.is_source:
            assert len(device._pinned.tensor) < 5000 < frame.nbytes
        channel.close()


def device_staging_never_waits_without_an_end(rank: int) -> str:
    """A stream that a dead peer holds up must not hold up the host."""
    with host_as_device():
        channel = ProcessGroupChannel(timeout_s=0.3)
        channel._staging = staging.DeviceStaging(torch.device("cpu"), by_stream=True)
        exchange(channel, {"a": 1})
        dist.barrier()
        HostEvent.held = True
        try:
            if channel.is_source:
                with pytest.raises(PublishTimeout, match="the other ranks to take frame 1") as late:
                    channel.publish({"a": 2})
                with pytest.raises(BrokenChannel, match="PublishTimeout"):
                    channel.publish({"a": 2})
                HostEvent.held = False
                dist.broadcast(torch.zeros(channel.capacity, dtype=torch.uint8), src=0)
                return str(late.value)
            with pytest.raises(ReceiveTimeout, match="in vain for frame 1 from rank 0"):
                channel.receive()
            HostEvent.held = False
            with pytest.raises(FrameError):
                channel.receive()
            return ""
        finally:
            HostEvent.held = False


HEALTHY: list[Callable[[int], Any]] = [
    every_mapping_arrives,
    sizes_go_up_and_down,
    capacity_follows_the_frames,
    the_probe_is_told,
    a_channel_does_not_keep_its_group,
    device_staging_moves_the_same_bytes,
    device_staging_orders_a_new_stream_behind_the_one_before,
    device_staging_copies_once_each_way,
    device_staging_never_waits_without_an_end,
]


def run_healthy(rank: int, drawn: bytes) -> dict[str, Any]:
    global DRAWN
    DRAWN = drawn
    results = {}
    for scenario in HEALTHY:
        results[scenario.__name__] = scenario(rank)
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def healthy() -> list[dict[str, Any]]:
    """What each scenario returned, by rank; a failed assertion of any fails all."""
    return run_ranks(run_healthy, WORLD, draw_mappings(150), timeout_s=120)


@pytest.mark.parametrize("scenario", HEALTHY, ids=lambda scenario: scenario.__name__)
def test_in_a_healthy_world(healthy, scenario):
    assert all(scenario.__name__ in results for results in healthy)


def test_a_frame_that_outgrows_the_capacity_costs_a_second_broadcast_once(healthy):
    steps = [results["sizes_go_up_and_down"] for results in healthy]
    assert steps == [steps[0]] * WORLD
    assert [broadcasts for broadcasts, _ in steps[0]] == [1, 1, 2, 1, 1, 1, 1, 2, 1, 1]


def test_capacity_shrinks_after_long_under_use_on_all_ranks_alike(healthy):
    capacities = [results["capacity_follows_the_frames"] for results in healthy]
    large = rung(40_000 * 8 + 64)
    assert capacities == [[SMALLEST, large, SMALLEST, large]] * WORLD


def test_the_probe_is_told_sequence_bytes_and_broadcasts_on_every_rank(healthy):
    told = [results["the_probe_is_told"] for results in healthy]
    assert told == [told[0]] * WORLD
    sequences, frame_bytes, metadata_bytes, broadcasts = zip(*told[0], strict=True)
    assert sequences == (0, 1, 2)
    assert frame_bytes == (64 + 8, 64 + 8, 64 + 8000)
    assert metadata_bytes[1:] == (32 + 2, 32 + 4)
    assert broadcasts == (1, 1, 2)


# ---- what is told when something breaks: each in a world of its own


def die() -> None:
    """End as by a crash, and leave word of the moment."""
    c10d._get_default_store().set("died", repr(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def lost_by(channel: ProcessGroupChannel) -> tuple[int | None, str, float]:
    """Use the channel until a peer is lost: which, the text, and the seconds since it died."""
    with pytest.raises(PeerLost) as lost:
        while True:
            exchange(channel, {"a": 1})
            if channel.is_source:
                time.sleep(0.05)
    now = time.monotonic()
    with pytest.raises(BrokenChannel, match="PeerLost"):
        exchange(channel, {"a": 1})
    channel.close()
    died = float(c10d._get_default_store().get("died"))
    return lost.value.rank, str(lost.value), now - died


def lose(rank: int, victim: int, hosts: list[int] | None) -> tuple[int | None, str, float]:
    if hosts is not None:
        peers._host_key = lambda: hosts[rank]
    channel = ProcessGroupChannel(timeout_s=30)
    for step in range(3):
        assert exchange(channel, {"step": step}).mapping == {"step": step}
    if rank == victim:
        die()
    return lost_by(channel)


@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (4, 3)])
def test_a_killed_rank_is_named_by_all_others_within_a_second(world_size, victim):
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose, world_size, victim, None)
    assert sorted(failed.value.results) == [rank for rank in range(world_size) if rank != victim]
    for rank, text, seconds in failed.value.results.values():
        assert rank == victim
        assert f"rank {victim} is lost: its process ended" in text
        assert seconds < 1


@pytest.mark.parametrize(
    ("hosts", "victim"),
    [([0, 0, 1, 1], 3), ([0, 0, 1, 1], 0), ([0, 1, 1], 2), ([0, 0, 1], 1)],
)
def test_ranks_on_other_hosts_learn_who_was_killed_from_those_that_saw_it(hosts, victim):
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose, len(hosts), victim, hosts)
    assert sorted(failed.value.results) == [rank for rank in range(len(hosts)) if rank != victim]
    for rank, text, seconds in failed.value.results.values():
        assert rank == victim
        assert "its process ended" in text
        assert seconds < 1.5


def test_the_only_rank_of_another_host_is_named_by_its_lost_connection():
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose, 3, 2, [0, 0, 1])
    assert {rank: lost for rank, (lost, _, _) in failed.value.results.items()} == {0: 2, 1: 2}


def part_across_hosts(rank: int) -> None:
    """Three channels between hosts: closed in order, given up, dropped."""
    peers._host_key = lambda: rank
    channel = ProcessGroupChannel(timeout_s=20)
    exchange(channel, {"a": 1})
    if rank == 0:
        channel.close()
    else:
        with pytest.raises(Closed):
            channel.receive()
        channel.close()
    assert channel._board is not None
    time.sleep(0.5)
    assert channel._board.heard is None

    channel = ProcessGroupChannel(timeout_s=20)
    if rank == 0:
        channel.sequence = 5
        channel.publish({"a": 1})
        text = r"rank 1 is lost: it gave up: OutOfStep\(.*before frame 6"
        with pytest.raises(PeerLost, match=text) as lost:
            publish_until_raised(channel)
        assert lost.value.rank == 1
    else:
        with pytest.raises(OutOfStep):
            channel.receive()
    dist.barrier()

    channel = ProcessGroupChannel(timeout_s=20)
    exchange(channel, {"a": 1})
    if rank == 0:
        del channel
        gc.collect()
    else:
        with pytest.raises(PeerLost, match="rank 0 is lost: it left without closing the channel"):
            channel.receive()


def publish_until_raised(channel: ProcessGroupChannel) -> None:
    """Look for bad news as a publish does, without a broadcast that nobody would take."""
    deadline = time.monotonic() + 10
    while channel._lookout.gone() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    channel._lookout._looked_ns = 0
    channel.publish({"a": 1})


def test_ranks_on_other_hosts_are_told_who_gave_up_or_left_without_closing():
    run_ranks(part_across_hosts, 2)


def silence_across_hosts(rank: int) -> str:
    peers._host_key = lambda: rank
    channel = ProcessGroupChannel(timeout_s=20)
    gate = dist.new_group()
    if rank == 0:
        dist.barrier(gate)
        channel.publish({"a": 1})
        channel.close()
        return ""
    with pytest.raises(ReceiveTimeout) as late:
        channel.receive(timeout_s=0.5)
    dist.barrier(gate)
    assert channel.receive().mapping == {"a": 1}
    channel.close()
    return str(late.value)


def test_a_time_out_tells_when_ranks_on_other_hosts_were_last_alive():
    _, text = run_ranks(silence_across_hosts, 2)
    assert re.fullmatch(
        r"waited 0\.\d+ s in vain for frame 0 from rank 0 "
        r"\(rank 0: on another host, last alive \d+\.\d s ago\)",
        text,
    )


def disturb(rank: int) -> str:
    channel = ProcessGroupChannel(timeout_s=20)
    exchange(channel, {"a": 1})
    exchange(channel, {"a": 1})
    if rank == 0:  # some other broadcast of this size, in the place of a frame
        dist.broadcast(torch.full((channel.capacity,), 7, dtype=torch.uint8), src=0)
        return ""
    with pytest.raises(FrameError, match="no frame of this version"):
        channel.receive()
    with pytest.raises(BrokenChannel, match="no frame of this version"):
        channel.receive()
    channel.close()
    return "told"


def fall_out_of_step(rank: int) -> list[tuple[str, int, int, int, bool]]:
    """What receivers say of frames that were not due; the group itself stays in step."""
    said = []
    for change in [5, 1, -1, -2]:
        channel = ProcessGroupChannel(timeout_s=20)
        for _ in range(3):
            exchange(channel, {"a": 1})
        if rank == 0:
            channel.sequence += change
            channel.publish({"a": 1})
        else:
            said.append(out_of_step(channel))
    ours, foreign = ProcessGroupChannel(timeout_s=20), ProcessGroupChannel(timeout_s=20)
    if rank == 0:
        foreign.publish({"a": 1})
    else:
        said.append(out_of_step(ours))
    dist.barrier()
    return said


def out_of_step(channel: ProcessGroupChannel) -> tuple[str, int, int, int, bool]:
    with pytest.raises(OutOfStep) as error:
        channel.receive()
    with pytest.raises(BrokenChannel, match="OutOfStep"):
        channel.receive()
    channel.close()
    found = error.value
    numbers = re.findall(r"channel (\d+)", str(found))
    return str(found), found.expected, found.received, found.sender, numbers[0] == numbers[1]


def test_missing_repeated_reordered_and_foreign_frames_are_told_by_name():
    said = run_ranks(fall_out_of_step, 2)[1]
    numbers = [(expected, received, sender) for _, expected, received, sender, _ in said]
    assert numbers == [(3, 8, 0), (3, 4, 0), (3, 2, 0), (3, 1, 0), (0, 0, 0)]
    assert [same for *_, same in said] == [True, True, True, True, False]
    assert re.fullmatch(
        r"out of step: frame 3 of channel \d+ from rank 0 was due, "
        r"frame 8 \(layout 0\) of channel \d+ from rank 0 arrived",
        said[0][0],
    )


def cut_frames(rank: int) -> None:
    """Frames whose end the source has lost: of the metadata, and all but a part of the header."""
    for kept in (40, 10):
        channel = ProcessGroupChannel(timeout_s=20)
        exchange(channel, {"a": 1, "b": "x" * 100})
        if rank == 0:
            staging, wire = channel._staging, channel._staging.wire

            def cut(begin: int, end: int) -> torch.Tensor:
                staging.region.tensor[kept:].zero_()  # noqa: B023
                return wire(begin, end)  # noqa: B023

            staging.wire = cut  # type: ignore[method-assign]
            channel.publish({"a": 1, "b": "x" * 100})
        else:
            with pytest.raises(FrameError, match=r"checksum|lengths"):
                channel.receive()
            with pytest.raises(BrokenChannel):
                channel.receive()


def test_a_truncated_frame_is_refused():
    run_ranks(cut_frames, 2)


def test_a_receiver_out_of_step_is_told_so_and_refuses_further_use():
    assert run_ranks(disturb, 2) == ["", "told"]


def stop_the_receiver(rank: int) -> str:
    pids: list[Any] = [None, None]
    dist.all_gather_object(pids, os.getpid())
    channel = ProcessGroupChannel(timeout_s=0.6)
    exchange(channel, {"a": 1})
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # until rank 0 has had enough of waiting
        assert channel.receive(timeout_s=20).mapping == {"a": 2}
        with pytest.raises(ReceiveTimeout, match=f"rank 0: process {pids[0]} is "):
            channel.receive(timeout_s=0.1)
        return ""
    while "stopped" not in channel._peers.describe(1):
        time.sleep(0.01)
    start = time.monotonic()
    with pytest.raises(PublishTimeout) as late:
        channel.publish({"a": 2})
    assert isinstance(late.value, TimeoutError)
    assert 0.6 <= time.monotonic() - start < 2
    with pytest.raises(BrokenChannel, match="PublishTimeout"):
        channel.publish({"a": 3})
    os.kill(pids[1], signal.SIGCONT)
    return str(late.value).replace(str(pids[1]), "PID")


def test_a_publish_that_nobody_takes_names_the_frame_and_the_state_of_every_rank():
    text, _ = run_ranks(stop_the_receiver, 2)
    assert re.fullmatch(
        r"waited 0\.\d+ s in vain for the other ranks to take frame 1; a broadcast is under way, "
        r"so the channel cannot be used any more \(rank 1: process PID is stopped\)",
        text,
    )


def spin_and_sleep(rank: int) -> None:
    for spin in (0, 0.5, 1):
        channel = ProcessGroupChannel(timeout_s=20, spin=spin)
        for step in range(20):
            if rank == 0:
                time.sleep(0.003 * (step % 3))
            assert exchange(channel, {"step": step}).mapping == {"step": step}
        channel.close()
    with pytest.raises(ValueError, match="spin is 2"):
        ProcessGroupChannel(spin=2)


def test_frames_arrive_whether_ranks_spin_or_sleep():
    run_ranks(spin_and_sleep, 2)


def idle(rank: int) -> float:
    channel = ProcessGroupChannel(timeout_s=20)
    exchange(channel, {"a": 1})
    start = time.thread_time()
    if rank == 0:
        time.sleep(2)
    exchange(channel, {"a": 1})
    return (time.thread_time() - start) / 2


def test_an_idle_receiver_takes_less_than_a_hundredth_of_a_core():
    assert run_ranks(idle, 2)[1] < 0.01


class Timer:
    """Keeps how operations ended, as whoever records them at their waits sees it."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def begin(self, meta: int, sequence: int, nbytes: int) -> int:
        return 0

    def end(self, ticket: int, status: int = 0) -> None:
        self.ended.append("ended" if status & 0xFF == 0 else "not waited for")

    def fail(self, ticket: int, error: BaseException) -> None:
        self.ended.append(repr(error))

    def intern(self, name: str) -> int:
        return 0

    def set_coverage(self, group: int, unrecorded: int) -> None: ...


def sleep_under_observation(rank: int) -> list[str]:
    channel = ProcessGroupChannel(timeout_s=20)
    timer, instrumentor = Timer(), CollectiveInstrumentor()
    instrumentor.instrument(timer)
    for step in range(30):
        if rank == 0:
            time.sleep(0.8 if step == 29 else 0.01)
        exchange(channel, {"step": step})
    instrumentor.uninstrument()
    channel.close()
    return timer.ended


def test_waiting_in_slices_leaves_every_broadcast_ended_once_and_well():
    assert run_ranks(sleep_under_observation, 2) == [["ended"] * 30] * 2


def count_descriptors(rank: int) -> list[int]:
    counts = []
    for _ in range(3):
        channel = ProcessGroupChannel(timeout_s=20)
        exchange(channel, {"a": 1})
        channel.close()
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts


def test_a_closed_channel_keeps_no_descriptor():
    for counts in run_ranks(count_descriptors, 2):
        assert counts[1:] == counts[:-1]


def exchange_on_gpu(rank: int, backend: str) -> None:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    channel = ProcessGroupChannel(device="cuda", timeout_s=30)
    addresses = set()
    for step in range(5):
        mapping = {**block_message(), "step": step, "there": torch.ones(7, device="cuda")}
        with exchange(channel, mapping) as frame:
            got = frame.mapping
            assert got["step"] == step
            assert all(got[key].is_cuda for key in (*block_message(), "there"))
            assert_arrived(block_message(), {key: got[key].cpu() for key in block_message()})
            if step:
                addresses.add(got["copy"].data_ptr())
    assert len(addresses) == 1
    channel.close()


def change_streams_on_gpu(rank: int) -> None:
    """Every step on a stream of its own, behind a long kernel of the step before."""
    channel = ProcessGroupChannel(device="cuda", timeout_s=30)
    sums = []
    for step in range(6):
        with torch.cuda.stream(torch.cuda.Stream()):
            got = exchange(channel, {"ids": torch.full((100_000,), step)}).mapping["ids"]
            torch.cuda._sleep(20_000_000)
            sums.append(got.sum())
    torch.cuda.synchronize()
    assert [int(one) for one in sums] == [step * 100_000 for step in range(6)]
    channel.close()


@pytest.mark.cuda
def test_a_frame_is_not_overwritten_while_the_stream_before_still_reads_it():
    if torch.cuda.device_count() < 1:
        pytest.skip("needs a GPU")
    run_ranks(change_streams_on_gpu, 2)


def lose_on_gpu(rank: int) -> tuple[int | None, str, float]:
    torch.cuda.set_device(rank)
    channel = ProcessGroupChannel(timeout_s=30)
    for step in range(3):
        exchange(channel, {"step": step})
    if rank == 1:
        die()
    return lost_by(channel)


@pytest.mark.cuda
def test_a_killed_rank_is_named_while_the_gpu_waits_for_it():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose_on_gpu, 2, backend="nccl")
    rank, _, seconds = failed.value.results[0]
    assert rank == 1
    assert seconds < 2


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_frames_arrive_on_the_gpu_at_stable_addresses(backend):
    if torch.cuda.device_count() < (2 if backend == "nccl" else 1):
        pytest.skip("needs a GPU, NCCL one per rank")
    run_ranks(exchange_on_gpu, 2, backend, backend=backend)


# ---- without ranks


def test_opening_without_a_process_group_is_refused():
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        ProcessGroupChannel()


def test_an_unknown_transport_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="transport is 'carrier-pigeon'; there are: auto, "):
        open_channel(transport="carrier-pigeon")


def test_rungs_hold_what_they_must_and_waste_a_quarter_at_most():
    for nbytes in [*range(1, 20_000), 10**6, 10**9, (1 << 32) - 1]:
        assert nbytes <= rung(nbytes)
        assert rung(nbytes) <= max(SMALLEST, nbytes * 1.25)
        assert rung(rung(nbytes)) == rung(nbytes)
        assert rung(nbytes) % 64 == 0


def test_capacity_does_not_shrink_while_frames_still_fill_half_of_it():
    capacity = Capacity()
    capacity.saw(100_000)
    large = capacity.nbytes
    for step in range(10 * WINDOW):
        capacity.saw(60_000 if step % WINDOW == 5 else 10)
        assert capacity.nbytes == large


def test_the_package_names_exactly_what_it_offers():
    offered = {
        name
        for name, value in vars(onecast.comm).items()
        if getattr(value, "__module__", "").startswith("onecast.comm") and name[0] != "_"
    }
    assert offered == set(onecast.comm.__all__)
    assert onecast.comm.__all__ == sorted(onecast.comm.__all__)
