"""Frames that come to lie on the GPU: through every channel, at stable addresses, never torn.

The tests that need a GPU are marked so; before them stand their twins on the CPU, where `fake_gpu`
stands for it. Needs no package beyond torch, numpy, msgspec and pytest: machines with GPUs may have
no more.
"""

import contextlib
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_gpu import FakeGpu, FakeStream, fake_gpu

from onecast.comm import (
    PeerLost,
    PublishTimeout,
    ReceiveTimeout,
    open_channel,
    peers,
    staging,
)
from onecast.comm.region import POISON
from onecast.comm.testing import RankFailed, run_ranks
from onecast.runtime.bench.nccl import nccl_refusal

SLOTS = 4
LARGE = 200_000  # numbers of 8 bytes: more than the first slots hold
HOSTS = {"shared-memory": [0, 0, 0, 0], "two-level": [0, 0, 1, 1]}  # of each rank
WORLD = 4


def exchange(channel: Any, mapping: Any) -> Any:
    """The frame of `mapping`, on either side."""
    return channel.publish(mapping) if channel.is_source else channel.receive()


def make_step(step: int, count: int = 4000) -> dict[str, Any]:
    return {
        "step": step,
        "text": f"step {step}",
        "ids": torch.full((count,), step),
        "empty": torch.zeros(0, 2),
        "table": torch.arange(64, dtype=torch.int32).reshape(8, 8) + step,
    }


def assert_step(mapping: Any, step: int, count: int = 4000) -> None:
    expected = make_step(step, count)
    assert [*mapping] == [*expected]
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert mapping[key].dtype == value.dtype
            assert torch.equal(mapping[key].cpu(), value), key
        else:
            assert mapping[key] == value


@contextlib.contextmanager
def hosts_of(transport: str) -> Iterator[None]:
    """Pretend that the ranks are on the hosts that the channel is for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "_host_key", lambda: 100 + HOSTS[transport][dist.get_rank()])
        yield


def open_(transport: str, **options: Any) -> Any:
    with hosts_of(transport):
        channel = open_channel(transport=transport, **{"timeout_s": 20, **options})
    assert channel.name == transport
    return channel


# ---- on the CPU, for the bookkeeping: each of these runs on all ranks of a world


def frames_are_views_of_one_buffer(transport: str, gpu: FakeGpu) -> None:
    channel = open_(transport)
    addresses = []
    for step in range(3 * SLOTS):
        with exchange(channel, make_step(step)) as frame:
            assert_step(frame.mapping, step)
            assert gpu.owns(frame.mapping["ids"])
            addresses.append(frame.mapping["ids"].data_ptr())
    assert len(set(addresses[1:])) == 1  # the first frame brings its layout, and lies further back
    channel.close()


def the_buffer_follows_the_slots(transport: str, gpu: FakeGpu) -> None:
    channel = open_(transport)
    counts = [4000, 4000, LARGE, 4000, 10, LARGE, 3 * LARGE, 4000]
    addresses = []
    for step, count in enumerate(counts):
        with exchange(channel, make_step(step, count)) as frame:
            assert_step(frame.mapping, step, count)
            addresses.append(frame.mapping["ids"].untyped_storage().data_ptr())
    assert len(set(addresses[2:6])) == 1  # smaller frames leave it as it is
    assert len(gpu.locked) >= 1
    channel.close()


def a_slot_stays_until_its_copy_is_over(transport: str, gpu: FakeGpu) -> None:
    """Published ahead as far as it goes, while one receiver's GPU comes to nothing."""
    channel = open_(transport, timeout_s=0.4 if dist.get_rank() == 0 else 20)
    exchange(channel, make_step(0)).release()
    dist.barrier()
    late = WORLD - 1
    if channel.is_source:
        for step in range(1, 1 + SLOTS):
            channel.publish(make_step(step))
        with pytest.raises(PublishTimeout, match=f"rank {late} has taken 1 of 5") as timeout:
            channel.publish(make_step(1 + SLOTS))
        assert "rank 1 has" not in str(timeout.value)
        dist.barrier()
        channel._writer._timeout_s = 20
        channel.publish(make_step(1 + SLOTS))
    elif dist.get_rank() != late:
        for step in range(1, 1 + SLOTS):
            with channel.receive() as frame:
                assert_step(frame.mapping, step)
        dist.barrier()
        assert_step(channel.receive().mapping, 1 + SLOTS)
    else:
        gpu.busy = True
        with channel.receive() as frame:
            mapping = frame.mapping
        for _ in range(2):
            with pytest.raises(ReceiveTimeout, match=r"0\.1 s in vain for this rank's own GPU"):
                channel.receive(timeout_s=0.1)
        dist.barrier()
        gpu.finish()
        assert_step(mapping, 1)
        for step in range(2, 2 + SLOTS):
            with channel.receive() as frame:
                assert_step(frame.mapping, step)
    dist.barrier()
    channel.close()


def the_source_reads_its_own_slot_late(transport: str, gpu: FakeGpu) -> None:
    channel = open_(transport)
    for step in range(2 * SLOTS):
        if not channel.is_source:
            channel.receive().release()
            continue
        gpu.busy = step >= SLOTS
        own = channel.publish(make_step(step)).mapping
        if gpu.busy:
            gpu.finish()
        assert_step(own, step)
    dist.barrier()
    if channel.is_source:
        channel._timeout_s = 0.2
        gpu.busy = True
        channel.publish(make_step(100)).mapping  # noqa: B018 - to have it copied
        for step in range(101, 100 + SLOTS):
            channel.publish(make_step(step))
        with pytest.raises(PublishTimeout, match="in vain for this rank's own GPU"):
            channel.publish(make_step(100 + SLOTS))
        gpu.finish()
        channel.publish(make_step(100 + SLOTS))
    else:
        for step in range(100, 101 + SLOTS):
            with channel.receive() as frame:
                assert_step(frame.mapping, step)
    dist.barrier()
    channel.close()


def an_outgrown_ring_stays_locked_until_its_copies_are_over(transport: str, gpu: FakeGpu) -> None:
    channel = open_(transport)
    exchange(channel, make_step(0)).release()
    first = dict(gpu.locked)
    assert len(first) == 1
    gpu.busy = channel.is_source
    if channel.is_source:
        mapping = channel.publish(make_step(1)).mapping
    else:
        channel.receive().release()
    dist.barrier()
    for step in range(2, 3 + 2 * SLOTS):
        exchange(channel, make_step(step, LARGE)).release()
    dist.barrier()
    assert len(gpu.locked) == (2 if channel.is_source else 1)
    if channel.is_source:
        gpu.finish()
        assert_step(mapping, 1)  # the ring's memory was not given back before
    for step in range(3 * SLOTS):
        exchange(channel, make_step(step, LARGE)).release()
    assert len(gpu.locked) == 1
    assert gpu.locked.keys().isdisjoint(first)
    dist.barrier()
    channel.close()


def closing_waits_for_the_copy_before_the_slot_goes(transport: str, gpu: FakeGpu) -> None:
    channel = open_(transport)
    exchange(channel, make_step(0)).release()
    if channel.is_source:
        channel.publish(make_step(1))
        dist.barrier()
    elif dist.get_rank() > 1:  # leave the ring full of other frames
        for step in range(1, 2 + SLOTS):
            with channel.receive() as frame:
                assert_step(frame.mapping, step)
            if step == 1:
                dist.barrier()
    else:
        gpu.busy = True
        with channel.receive() as frame:
            mapping = frame.mapping
        dist.barrier()
        timer = threading.Timer(0.3, gpu.finish)
        timer.start()
        channel.close()
        assert not gpu.busy
        timer.join()
        assert_step(mapping, 1)
    if channel.is_source:
        for step in range(2, 2 + SLOTS):
            channel.publish(make_step(step))
    dist.barrier()
    channel.close()


def a_channel_that_goes_unlocks_its_memory(transport: str, gpu: FakeGpu) -> None:
    channel = open_(transport)
    for step in range(3):
        exchange(channel, make_step(step)).release()
    dist.barrier()
    assert gpu.locked
    channel.close()
    assert gpu.locked == {}
    channel = open_(transport)
    for step in range(3):
        exchange(channel, make_step(step)).release()
    dist.barrier()
    assert gpu.locked
    del channel
    gc.collect()
    assert gpu.locked == {}
    dist.barrier()


def what_is_still_read_is_not_unlocked(transport: str, gpu: FakeGpu) -> None:
    channel = open_(transport)
    gpu.busy = True
    mapping = exchange(channel, make_step(0)).mapping
    dist.barrier()
    del channel
    gc.collect()
    assert len(gpu.locked) == 1  # and mapped: the copy below reads it
    gpu.finish()
    assert_step(mapping, 0)
    gpu.locked.clear()
    dist.barrier()


def memory_that_cannot_be_locked_does_as_well(transport: str, gpu: FakeGpu) -> None:
    gpu.refuses = 801
    with log_of("onecast.comm.mirror") as lines:
        channel = open_(transport)
        for step in range(2 * SLOTS):
            with exchange(channel, make_step(step)) as frame:
                assert_step(frame.mapping, step)
        dist.barrier()
        channel.close()
    assert gpu.locked == {}
    assert len(lines) == 1 and lines[0].endswith("cannot be page-locked: error 801")


def another_stream_waits_for_the_one_before(transport: str, gpu: FakeGpu) -> None:
    channel = open_(transport)
    for step in range(6):
        if step % 2 == 0:
            gpu.streams.append(FakeStream())
        with exchange(channel, make_step(step)) as frame:
            assert_step(frame.mapping, step)
    waited_for = [stream.waited_for for stream in gpu.streams]
    assert waited_for == [[], *[[one] for one in gpu.streams[:-1]]]
    # The buffer, too, is freed only once the last stream is through with it.
    assert [stream for _, stream in gpu.used] == gpu.streams[1:]
    assert gpu.used[-1][0].untyped_storage().data_ptr() == gpu.used[1][0].data_ptr()
    dist.barrier()
    channel.close()


def a_released_frame_is_poisoned_after_its_copy(transport: str, gpu: FakeGpu) -> None:
    channel = open_(transport, poison=True)
    gpu.busy = True
    frame = exchange(channel, make_step(0))
    ids = frame.mapping["ids"]
    frame.release()
    gpu.finish()
    assert set(ids.view(torch.uint8).tolist()) == {POISON}
    with exchange(channel, make_step(1)) as frame:
        assert_step(frame.mapping, 1)
    dist.barrier()
    channel.close()


@contextlib.contextmanager
def log_of(name: str) -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


TWINS: list[Callable[[str, FakeGpu], None]] = [
    frames_are_views_of_one_buffer,
    the_buffer_follows_the_slots,
    a_slot_stays_until_its_copy_is_over,
    the_source_reads_its_own_slot_late,
    an_outgrown_ring_stays_locked_until_its_copies_are_over,
    closing_waits_for_the_copy_before_the_slot_goes,
    a_channel_that_goes_unlocks_its_memory,
    what_is_still_read_is_not_unlocked,
    memory_that_cannot_be_locked_does_as_well,
    another_stream_waits_for_the_one_before,
    a_released_frame_is_poisoned_after_its_copy,
]


# Of these the order of acknowledgements is the point, which leaders have in another way.
ONE_HOST = [a_slot_stays_until_its_copy_is_over, closing_waits_for_the_copy_before_the_slot_goes]
CASES = [
    pytest.param(transport, scenario, id=f"{transport}-{scenario.__name__}")
    for transport in HOSTS
    for scenario in TWINS
    if transport == "shared-memory" or scenario not in ONE_HOST
]


def run_twins(rank: int) -> list[tuple[str, str]]:
    done = []
    for case in CASES:
        transport, scenario = case.values
        with fake_gpu() as gpu:
            scenario(transport, gpu)
            gc.collect()
            assert gpu.locked == {}, f"{scenario.__name__} left memory locked"
        dist.barrier()
        done.append((transport, scenario.__name__))
    return done


@pytest.fixture(scope="module")
def twins() -> list[list[tuple[str, str]]]:
    """What each rank has done; a failed assertion of any fails all."""
    return run_ranks(run_twins, WORLD, timeout_s=120)


@pytest.mark.parametrize(("transport", "scenario"), CASES)
def test_with_a_gpu_made_of_host_memory(twins, transport, scenario):
    assert all((transport, scenario.__name__) in done for done in twins)


def lose_while_the_gpu_is_stuck(rank: int) -> tuple[int | None, float]:
    with fake_gpu() as gpu:
        channel = open_channel(transport="shared-memory", timeout_s=20)
        exchange(channel, make_step(0)).release()
        dist.barrier()
        if rank == 0:
            channel.publish(make_step(1))
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        gpu.busy = True  # as behind a collective that a dead rank does not come to
        channel.receive().release()
        start = time.monotonic()
        with pytest.raises(PeerLost) as lost:
            channel.receive()
        channel.close()
        return lost.value.rank, time.monotonic() - start


def test_a_dead_rank_is_named_while_the_gpu_does_not_end():
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose_while_the_gpu_is_stuck, 2)
    rank, seconds = failed.value.results[1]
    assert rank == 0
    assert seconds < 2


@pytest.mark.parametrize(
    ("backends", "place", "by_stream"),
    [
        ("cpu:gloo,cuda:gloo", "cuda", False),
        ("cuda:nccl", "cuda:1", True),
        ("cpu:gloo,cuda:nccl", "cuda:0", True),
        ("cpu:gloo,cuda:nccl", "cpu", False),
    ],
)
def test_a_host_waits_for_broadcasts_that_no_stream_orders(monkeypatch, backends, place, by_stream):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    assert staging.is_by_stream(dist.group.WORLD, torch.device(place)) is by_stream


# ---- on a GPU: every channel, ranks sharing GPUs where there are fewer of them

MIXED = "cpu:gloo,cuda:nccl"  # what the runtime's own groups are
CHANNELS = [
    "shared-memory",
    "two-level",
    "process-group gloo",
    "process-group nccl",
    f"process-group {MIXED}",
]
LONG = 40_000_000  # clock cycles of a kernel: 20 ms and more


def set_device(rank: int) -> torch.device:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def open_on_gpu(name: str, device: torch.device, **options: Any) -> Any:
    """With a warm-up frame behind it, so that nothing is done for the first time later."""
    transport, _, backend = name.partition(" ")
    group = dist.new_group(backend=backend) if backend else dist.group.WORLD
    with hosts_of(transport) if transport in HOSTS else contextlib.nullcontext():
        channel: Any = open_channel(
            group, transport=transport, device=device, **{"timeout_s": 30, **options}
        )
    assert channel.name == transport
    exchange(channel, make_step(0)).release()
    torch.cuda.synchronize()
    return channel


def arrive_on_gpu(rank: int, name: str) -> None:
    device = set_device(rank)
    channel = open_on_gpu(name, device)
    addresses = []
    for step in range(3 * SLOTS):
        mapping = {**make_step(step), "there": torch.full((7,), step, device=device)}
        with exchange(channel, mapping) as frame:
            got = dict(frame.mapping)
            tensors = {key: value for key, value in got.items() if isinstance(value, torch.Tensor)}
            assert tensors.keys() == {"ids", "empty", "table", "there"}
            assert all(tensor.device == device for tensor in tensors.values())
            assert got.pop("there").tolist() == [step] * 7
            assert_step(got, step)
            addresses.append([got[key].data_ptr() for key in ("ids", "table")])
    assert all(address == addresses[1] for address in addresses[1:])
    channel.close()


def grow_on_gpu(rank: int, name: str) -> None:
    channel = open_on_gpu(name, set_device(rank))
    counts = [10, LARGE, 4000, 3 * LARGE, 10, 9 * LARGE, LARGE, 1]
    for step, count in enumerate(counts):
        with exchange(channel, make_step(step, count)) as frame:
            assert_step(frame.mapping, step, count)
    channel.close()


def publish_ahead_on_gpu(rank: int, name: str) -> None:
    """Every frame is used behind a long kernel, which the copy of the next stands behind."""
    channel = open_on_gpu(name, set_device(rank))
    sums = []
    count = 100_000
    for step in range(3 * SLOTS):
        with exchange(channel, make_step(step, count)) as frame:
            torch.cuda._sleep(LONG)
            sums.append(frame.mapping["ids"].sum())
    channel.close()
    torch.cuda.synchronize()
    assert [int(one) for one in sums] == [step * count for step in range(3 * SLOTS)]


def change_streams_on_gpu(rank: int, name: str) -> None:
    channel = open_on_gpu(name, set_device(rank))
    sums = []
    for step in range(6):
        count = LARGE if step > 3 else 100_000  # a larger buffer while the one before is in use
        with torch.cuda.stream(torch.cuda.Stream()):
            got = exchange(channel, make_step(step, count)).mapping["ids"]
            torch.cuda._sleep(LONG)
            sums.append((got.sum(), step * count))
    torch.cuda.synchronize()
    assert [int(one) for one, _ in sums] == [expected for _, expected in sums]
    channel.close()


def poison_on_gpu(rank: int, name: str) -> None:
    channel = open_on_gpu(name, set_device(rank), poison=True)
    for step in range(3):
        frame = exchange(channel, make_step(step))
        ids = frame.mapping["ids"]
        torch.cuda._sleep(LONG)
        total = ids.sum()
        frame.release()
        assert set(ids.view(torch.uint8).unique().tolist()) == {POISON}
        assert int(total) == step * 4000
    channel.close()


ON_GPU = [
    arrive_on_gpu,
    grow_on_gpu,
    publish_ahead_on_gpu,
    change_streams_on_gpu,
    poison_on_gpu,
]


def skip_without_gpu(name: str = "", ranks: int = 2) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    refusal = nccl_refusal(ranks) if name.endswith("nccl") else None
    if refusal is not None:
        pytest.skip(refusal)


@pytest.mark.cuda
@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("scenario", ON_GPU, ids=lambda scenario: scenario.__name__)
def test_on_a_gpu(scenario, name):
    ranks = WORLD if name == "two-level" else 2
    skip_without_gpu(name, ranks)
    run_ranks(scenario, ranks, name, timeout_s=90)


def defer_on_gpu(rank: int) -> None:
    channel = open_on_gpu("shared-memory", set_device(rank))
    if channel.is_source:
        channel.publish(make_step(1))
        channel.publish(make_step(2))
    else:
        torch.cuda._sleep(50 * LONG)
        with channel.receive() as frame:
            ids = frame.mapping["ids"]
        assert channel._unread is not None and channel._reader.position == 1
        with pytest.raises(ReceiveTimeout, match="in vain for this rank's own GPU"):
            channel.receive(timeout_s=0.02)
        assert int(ids.sum()) == 4000
        assert_step(channel.receive().mapping, 2)
        assert channel._reader.position == 2
    dist.barrier()
    channel.close()


@pytest.mark.cuda
def test_a_slot_is_given_back_when_the_gpu_has_read_it():
    skip_without_gpu()
    run_ranks(defer_on_gpu, 2)


def lock_on_gpu(rank: int) -> None:
    cudart = torch.cuda.cudart()
    device = set_device(rank)
    with log_of("onecast.comm.mirror") as lines:
        for _ in range(3):
            channel = open_on_gpu("shared-memory", device)
            rings = [*channel._mirror._locked.values()]
            assert len(rings) == 1
            tensor = rings[0].regions[0].tensor
            assert tensor.is_pinned()
            dist.barrier()
            channel.close()
            assert not tensor.is_pinned()
            address, nbytes = tensor.data_ptr(), len(rings[0].memory)
            assert int(cudart.cudaHostRegister(address, nbytes, 0)) == 0
            # What is locked cannot be locked again: it is said, and does not fail what comes next.
            channel._mirror.lock(rings[0])
            assert torch.ones(3, device=device).sum().item() == 3
            assert int(cudart.cudaHostUnregister(address)) == 0
    assert len(lines) == 3 and all("cannot be page-locked" in line for line in lines)


@pytest.mark.cuda
def test_rings_are_page_locked_while_their_channel_is_open():
    skip_without_gpu()
    run_ranks(lock_on_gpu, 2)


def lose_on_gpu(rank: int, name: str) -> tuple[int | None, float]:
    channel = open_on_gpu(name, set_device(rank))
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(PeerLost) as lost:
        while True:
            channel.publish(make_step(1))
            time.sleep(0.05)
    return lost.value.rank, time.monotonic() - start


@pytest.mark.cuda
@pytest.mark.parametrize("name", CHANNELS)
def test_a_killed_rank_is_named_by_the_source(name):
    skip_without_gpu(name)
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose_on_gpu, 2, name)
    rank, seconds = failed.value.results[0]
    assert rank == 1
    assert seconds < 2
