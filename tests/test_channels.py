"""What every channel promises, on real ranks: one suite, run over each of them.

What only one of them promises stands in the tests named after it.
"""

import gc
import io
import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from channel_runs import draw_mappings, exchange
from cli_runs import stray_segments
from test_frame import assert_arrived, block_message

from onecast.comm import (
    BrokenChannel,
    Closed,
    OutOfStep,
    PeerLost,
    ReceiveTimeout,
    UnsupportedTypeError,
    open_channel,
    peers,
)
from onecast.comm.channel import TRANSPORTS
from onecast.comm.prior_art import PROTOCOLS, open_prior_channel
from onecast.comm.region import POISON
from onecast.comm.testing import RankFailed, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

CHANNELS = [name for name in TRANSPORTS if name != "auto"]
WORLD = 4
LOST_S = 2.0  # a second is the promise; these tests may share their cores with others

Open = Callable[..., Any]  # a channel, from what `open_channel` takes
DRAWN: list[Any] = []  # in a rank: what `draw_mappings` gave


def opener(name: str) -> Open:
    if name in PROTOCOLS:
        return partial(open_prior_channel, name, metadata_limit=1 << 16)
    return partial(open_channel, transport=name)


def pretend_hosts(name: str, rank: int) -> None:
    """Two levels need two hosts: ranks 0 and 1 are on one, the others on another."""
    if name == "two-level":
        peers._host_key = lambda: 100 + (rank >= 2)


# ---- what holds in a healthy world: each of these runs on all four ranks of one


def every_mapping_arrives(rank: int, open_: Open) -> None:
    channel = open_(src=1)
    for mapping in DRAWN:
        for _ in range(2):
            with exchange(channel, mapping) as frame:
                assert_arrived(mapping, frame.mapping)
                assert frame.sequence == channel.sequence - 1
    assert channel.sequence == 2 * len(DRAWN) >= 100
    channel.close()


def frames_come_in_order_whoever_is_slow(rank: int, open_: Open) -> None:
    channel = open_(src=2)
    for step in range(200):
        mapping = {"step": step, "ids": torch.full((64,), step), "text": str(step)}
        if step % 50 == 10 * rank:
            time.sleep(0.02)
        with exchange(channel, mapping) as frame:
            assert frame.mapping["step"] == frame.sequence == step
            assert frame.mapping["text"] == str(step)
            assert frame.mapping["ids"].tolist() == [step] * 64
    channel.close()


def sizes_go_up_and_down(rank: int, open_: Open) -> None:
    channel = open_()
    for count in [0, 1, 5000, 20, 5001, 0, 300_000, 7, 2_000_000, 299_000, 3]:
        mapping = {"a": torch.arange(count), "text": "x" * (count % 3000)}
        with exchange(channel, mapping) as frame:
            assert_arrived(mapping, frame.mapping)
            assert frame.nbytes > 8 * count
    channel.close()


def metadata_alone_may_be_large(rank: int, open_: Open) -> None:
    channel = open_()
    mapping = {f"a key of some length {i}": torch.tensor([i]) for i in range(500)}
    for _ in range(2):
        assert_arrived(mapping, exchange(channel, mapping).mapping)
    for length in (200_000, 3_000_000):
        mapping = {"text": "x" * length}
        assert_arrived(mapping, exchange(channel, mapping).mapping)
    channel.close()


def more_layouts_than_are_kept_arrive(rank: int, open_: Open) -> None:
    channel = open_()
    for number in [*range(150), 3, 149, 4]:
        mapping = {f"key {number}": torch.tensor([number]), "n": number}
        assert_arrived(mapping, exchange(channel, mapping).mapping)
    channel.close()


def frames_cross_inference_mode(rank: int, open_: Open) -> None:
    channel = open_()
    for step in range(6):
        with torch.inference_mode(step % 3 == rank % 2):
            mapping = {"ids": torch.arange(6) + step}
            with exchange(channel, mapping) as frame:
                assert_arrived(mapping, frame.mapping)
    channel.close()


class Foo:
    """What no frame can carry."""


def what_cannot_travel_leaves_the_ranks_in_step(rank: int, open_: Open) -> None:
    channel = open_()
    for _ in range(3):
        before = channel.sequence, channel.broadcasts
        if channel.is_source:
            unknown = r"^sampling\.params\[3\]: object of type test_channels\.Foo"
            with pytest.raises(UnsupportedTypeError, match=unknown):
                big = torch.arange(100_000)
                channel.publish({"big": big, "sampling": {"params": [1, 2.0, "x", Foo()]}})
            with pytest.raises(UnsupportedTypeError, match=r"^b: "):
                channel.publish({"a": torch.ones(1), "b": torch.empty(1, device="meta")})
            with pytest.raises(ValueError):
                channel.publish([1])
        assert (channel.sequence, channel.broadcasts) == before
        assert_arrived(block_message(), exchange(channel, block_message()).mapping)
    channel.close()


def released_frames_are_gone(rank: int, open_: Open) -> None:
    channel = open_(poison=True)
    for step in range(6):
        with exchange(channel, {"ids": torch.arange(8), "step": step}) as frame:
            ids = frame.mapping["ids"]
            assert ids.tolist() == list(range(8))
        assert set(ids.view(torch.uint8).tolist()) == {POISON}, "a stale view must show"
        with pytest.raises(ValueError, match=f"frame {step} was released"):
            _ = frame.mapping
        frame.release()
    kept = exchange(channel, {"ids": torch.arange(8), "step": 6})
    after = exchange(channel, {"ids": torch.arange(8), "step": 7})
    with pytest.raises(ValueError, match="frame 6 was released"):
        _ = kept.mapping
    assert after.mapping["step"] == 7
    channel.close()
    with pytest.raises(ValueError, match="frame 7 was released"):
        _ = after.mapping


def a_view_changed_in_place_changes_no_later_frame(rank: int, open_: Open) -> None:
    changes: list[Callable[[torch.Tensor], object]] = [
        lambda view: view.unsqueeze_(0),
        lambda view: view.requires_grad_(),
        lambda view: view.resize_(2),
        lambda view: view.t_(),
        lambda view: view.set_(torch.ones(1, 3)),  # type: ignore[call-overload]
    ]
    channel = open_()
    for change in changes:
        for step in range(10):
            mapping = {"x": torch.full((1, 3), step * 1.0), "y": torch.full((3,), -step), "n": step}
            frame = exchange(channel, mapping)
            assert_arrived(mapping, frame.mapping)
            change(frame.mapping["x"])
            if step % 2:
                frame.release()
    channel.close()


def a_default_device_changes_nothing(rank: int, open_: Open) -> None:
    torch.set_default_device("meta")
    try:
        channel = open_()
        for step in range(3):
            mapping = {"x": torch.full((3,), step, device="cpu"), "n": step}
            with exchange(channel, mapping) as frame:
                assert frame.mapping["x"].tolist() == [step] * 3
        channel.close()
    finally:
        torch.set_default_device(None)


def a_forked_child_takes_nothing_along(rank: int, open_: Open) -> None:
    channel = open_()
    for step in range(3):
        if step == 1:
            child = os.fork()
            if child == 0:
                del channel
                gc.collect()
                os._exit(0)
            os.waitpid(child, 0)
        with exchange(channel, {"step": step}) as frame:
            assert frame.mapping == {"step": step}
    channel.close()


def a_group_of_some_ranks(rank: int, open_: Open) -> str:
    """Of one host and across hosts, where there are two."""
    for members in ([1, 3], [2, 3], [0, 2, 3]):
        group = dist.new_group(members)
        if rank not in members:
            with pytest.raises(ValueError, match=f"rank {rank} is not in the group"):
                open_(group, src=members[0])
            continue
        with pytest.raises(ValueError, match=r"src is 9, a global rank; the group has the ranks"):
            open_(group, src=9)
        there, back = open_(group, src=members[-1]), open_(group, src=members[0])
        for step in range(12):
            assert exchange(there, {"step": step}).mapping == {"step": step}
            assert exchange(back, {"answer": -step}).mapping == {"answer": -step}
        there.close()
        back.close()


def closing_is_orderly(rank: int, open_: Open) -> None:
    channel = open_()
    if rank == 0:
        for step in range(40):
            channel.publish({"a": step})
        channel.close()
        with pytest.raises(Closed):
            channel.publish({"a": 40})
    else:
        for step in range(1 if rank == 1 else 40):  # rank 1 closes after the first
            assert channel.receive().mapping == {"a": step}
        if rank != 1:
            for _ in range(2):
                with pytest.raises(Closed):
                    channel.receive()
            assert channel.sequence == 40
        channel.close()
        with pytest.raises(Closed):
            channel.receive()
    channel.close()


def a_receiver_is_told_who_closed(rank: int, open_: Open) -> None:
    channel = open_(src=3)
    exchange(channel, {"a": 1})
    if not channel.is_source:
        with pytest.raises(Closed, match="rank 3 closed the channel after 1 frames"):
            channel.receive()
    channel.close()


def each_side_has_its_call(rank: int, open_: Open) -> None:
    channel = open_()
    with pytest.raises(ValueError, match=f"the source is rank 0: rank {rank} "):
        if rank == 0:
            channel.receive()
        else:
            channel.publish({})
    if rank:
        for timeout_s in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"timeout_s is {timeout_s}"):
                channel.receive(timeout_s=timeout_s)
    assert exchange(channel, {}).mapping == {}
    channel.close()


def arguments_that_cannot_be_are_refused_on_all_ranks(rank: int, open_: Open) -> None:
    with pytest.raises(ValueError, match=r"disagree about src: \{0: 0, 1: 0, 2: 1, 3: 0\}"):
        open_(src=int(rank == 2))
    for timeout_s in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"timeout_s is {timeout_s}"):
            open_(timeout_s=timeout_s)
    with pytest.raises(ValueError, match="spin is 2"):
        open_(spin=2)
    with pytest.raises(ValueError, match="device is meta"):
        open_(device="meta")


def waits_are_bounded_and_can_be_taken_up_again(rank: int, open_: Open) -> None:
    gate = dist.new_group()  # on the channel's own group a broadcast may be under way
    channel = open_(dist.new_group(), timeout_s=20)
    if rank == 0:
        channel.publish({"a": 1})
        dist.barrier(gate)
        channel.publish({"a": torch.arange(1000)})
        channel.close()
        return
    assert channel.receive(timeout_s=20).mapping == {"a": 1}
    for timeout_s in (0, 0.3):
        start = time.monotonic()
        with pytest.raises(ReceiveTimeout, match="in vain for frame 1 from rank 0") as late:
            channel.receive(timeout_s=timeout_s)
        assert isinstance(late.value, TimeoutError)
        assert timeout_s <= time.monotonic() - start < 5
    dist.barrier(gate)
    frame = channel.receive()
    assert (frame.sequence, len(frame.mapping["a"])) == (1, 1000)
    with pytest.raises(Closed):
        channel.receive(timeout_s=10)
    channel.close()


def a_frame_that_was_not_due_is_named(rank: int, open_: Open) -> None:
    for shift in (5, -1):  # frames are missing, a frame comes again
        channel = open_(dist.new_group(), timeout_s=20)
        for _ in range(2):
            exchange(channel, {"a": 1})
        if rank == 0:
            channel.sequence += shift
            channel.publish({"a": 1})
            dist.barrier()
            continue
        text = (
            rf"frame 2 of channel \d+ from rank 0 was due, "
            rf"frame {2 + shift} \(layout \d+\) of channel \d+ from rank 0 arrived"
        )
        with pytest.raises(OutOfStep, match=text) as told:
            channel.receive()
        assert (told.value.expected, told.value.received) == (2, 2 + shift)
        assert told.value.sender == 0
        for _ in range(2):
            with pytest.raises(BrokenChannel, match="OutOfStep"):
                channel.receive()
        channel.close()
        dist.barrier()


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


def the_probe_is_told(rank: int, open_: Open) -> list[tuple[int, ...]]:
    probe = Recorder()
    channel = open_(probe=probe)
    before = channel.broadcasts
    started = time.perf_counter_ns()
    for count in [1, 1, 1000]:
        frame = exchange(channel, {"a": torch.arange(count)})
        numbers = probe.told[-1]
        assert numbers[:3] == (frame.sequence, frame.nbytes, frame.metadata_bytes)
        assert started <= numbers[4] <= numbers[5] <= numbers[6] <= time.perf_counter_ns()
    told = probe.told.copy()
    assert sum(numbers[3] for numbers in told) == channel.broadcasts - before
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
    return [numbers[:3] for numbers in told]


BASIC: list[Callable[[int, Open], Any]] = [
    every_mapping_arrives,
    frames_come_in_order_whoever_is_slow,
    closing_is_orderly,
    a_receiver_is_told_who_closed,
    each_side_has_its_call,
]
HEALTHY: list[Callable[[int, Open], Any]] = [
    *BASIC,
    sizes_go_up_and_down,
    metadata_alone_may_be_large,
    more_layouts_than_are_kept_arrive,
    frames_cross_inference_mode,
    what_cannot_travel_leaves_the_ranks_in_step,
    released_frames_are_gone,
    a_view_changed_in_place_changes_no_later_frame,
    a_default_device_changes_nothing,
    a_forked_child_takes_nothing_along,
    a_group_of_some_ranks,
    arguments_that_cannot_be_are_refused_on_all_ranks,
    waits_are_bounded_and_can_be_taken_up_again,
    the_probe_is_told,
    a_frame_that_was_not_due_is_named,
]


def run_scenarios(rank: int, names: list[str], drawn: bytes) -> dict[tuple[str, str], Any]:
    DRAWN.extend(torch.load(io.BytesIO(drawn), weights_only=False))
    results = {}
    for name in names:
        pretend_hosts(name, rank)
        for scenario in BASIC if name in PROTOCOLS else HEALTHY:
            results[name, scenario.__name__] = scenario(rank, opener(name))
            dist.barrier()
    return results


@pytest.fixture(scope="module", params=[*CHANNELS, "prior protocols"])
def healthy(request) -> list[dict[tuple[str, str], Any]]:
    """What each scenario returned, by rank; a failed assertion of any fails all of the channel."""
    names = list(PROTOCOLS) if request.param == "prior protocols" else [request.param]
    return run_ranks(run_scenarios, WORLD, names, draw_mappings(100), timeout_s=120)


def test_in_a_healthy_world(healthy):
    for results in healthy:
        for name in {name for name, _ in results}:
            expected = BASIC if name in PROTOCOLS else HEALTHY
            assert [key for key in results if key[0] == name] == [
                (name, scenario.__name__) for scenario in expected
            ]


def test_the_probe_is_told_of_the_same_frames_on_every_rank(healthy):
    told = [
        value
        for results in healthy
        for key, value in results.items()
        if key[1] == "the_probe_is_told"
    ]
    if told:
        assert told == [told[0]] * WORLD
        assert [numbers[0] for numbers in told[0]] == [0, 1, 2]
        assert [numbers[1] for numbers in told[0]] == [64 + 8, 64 + 8, 64 + 8000]
        assert [numbers[2] for numbers in told[0][1:]] == [32 + 2, 32 + 4]


# ---- what is told when ranks die, one after the other, of channels opened before

# Who is in the channel, and who of them dies. With two hosts: the last of its host, the first of
# its host, the source.
DEATHS = [([0, 1, 2, 3, 4], 4), ([0, 1, 2, 3], 2), ([0, 1, 3], 0)]


def die(folder: str, rank: int) -> None:
    Path(folder, f"death-{rank}").write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def lose_one_after_another(rank: int, name: str, folder: str) -> list[tuple[int | None, float]]:
    """Who was lost, and when this rank was told, of each channel."""
    pretend_hosts(name, rank)
    open_ = opener(name)
    channels = []
    gates = []
    for members, victim in DEATHS:
        group = dist.new_group(members)
        gates.append(dist.new_group([member for member in members if member != victim]))
        channels.append(open_(group, timeout_s=30) if rank in members else None)
    told = []
    for (_, victim), gate, channel in zip(DEATHS, gates, channels, strict=True):
        for step in range(10):
            assert exchange(channel, {"step": step}).mapping == {"step": step}
        if rank == victim:
            if channel.is_source:
                time.sleep(0.3)  # the others are waiting by then, and asleep
            die(folder, rank)
        with pytest.raises(PeerLost) as lost:
            if channel.is_source:
                publish_until_lost(channel, pauses=victim == 2)
            while True:
                channel.receive()
        told.append((lost.value.rank, time.monotonic()))
        assert f"rank {victim} is lost" in str(lost.value)
        for _ in range(2):
            with pytest.raises(BrokenChannel, match="PeerLost"):
                exchange(channel, {})
        channel.close()
        with pytest.raises(BrokenChannel, match="PeerLost"):
            exchange(channel, {})
        if victim != 0:
            dist.barrier(gate)
    return told


def publish_until_lost(channel: Any, pauses: bool) -> None:
    """A source that goes on, or one that first has nothing to publish for a while."""
    if pauses:
        time.sleep(0.7)
        channel.publish({})
        channel.publish({})
        raise AssertionError("two frames were published for a rank that had ended")
    for _ in range(1000):
        channel.publish({"a": 1})
        time.sleep(0.005)


@pytest.mark.parametrize("name", CHANNELS)
def test_the_death_of_any_rank_is_told_by_name_to_all_others(name, tmp_path):
    segments = stray_segments()
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose_one_after_another, 5, name, str(tmp_path))
    assert sorted(failed.value.results) == [1, 3], failed.value.details
    deaths = [float(Path(tmp_path, f"death-{victim}").read_text()) for _, victim in DEATHS]
    for results in failed.value.results.values():
        assert [lost for lost, _ in results] == [victim for _, victim in DEATHS]
        seconds = [told - death for (_, told), death in zip(results, deaths, strict=True)]
        print(name, [f"{one:.3f} s" for one in seconds])
        assert max(seconds) < LOST_S, seconds
    assert stray_segments() <= segments


def want_different_transports(rank: int) -> None:
    with pytest.raises(ValueError, match="the ranks disagree about transport"):
        open_channel(transport=("shared-memory", "process-group")[rank])


def test_ranks_that_want_different_transports_are_told_so():
    run_ranks(want_different_transports, 2)
