"""The protocols that a frame replaces: what they cost, and that they carry the same mappings."""

import os
import pickle
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from channel_runs import collectives, exchange
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_frame import assert_arrived, block_message, mappings

from onecast.comm import (
    BrokenChannel,
    Closed,
    FrameError,
    PeerLost,
    PublishTimeout,
    ReceiveTimeout,
    UnsupportedTypeError,
)
from onecast.comm.prior_art import DEFAULT_METADATA_LIMIT, PROTOCOLS, open_prior_channel
from onecast.comm.prior_metadata import CachedSize, FixedMetadata, MetadataProtocol, TwoBroadcasts
from onecast.comm.testing import RankFailed, run_ranks

WORLD = 3
STEADY = {"two-broadcasts": 2, "fixed-metadata": 1, "cached-size": 1}  # and one per tensor


# ---- the metadata's own broadcasts, without ranks


def sent_and_received(
    source: MetadataProtocol, receiver: MetadataProtocol, metadata: bytes
) -> list[int]:
    """The lengths of the broadcasts that bring `metadata` over."""
    messages = source.outgoing(metadata)
    incoming = receiver.incoming()
    expected = next(incoming)
    for message in messages:
        assert len(message) == expected
        try:
            expected = incoming.send(memoryview(message))
        except StopIteration as over:
            assert message is messages[-1] and bytes(over.value) == metadata
            return [len(message) for message in messages]
    raise AssertionError("the receiver waits for one more")


def new_protocol(name: str) -> MetadataProtocol:
    if name == "fixed-metadata":
        return FixedMetadata(limit=5000)
    return TwoBroadcasts() if name == "two-broadcasts" else CachedSize()


@pytest.mark.parametrize("name", PROTOCOLS)
@given(st.lists(st.binary(min_size=1, max_size=5000), max_size=8))
def test_metadata_of_any_length_arrives_whole(name, all_metadata):
    source, receiver = new_protocol(name), new_protocol(name)
    for metadata in all_metadata:
        lengths = sent_and_received(source, receiver, metadata)
        assert STEADY[name] <= len(lengths) <= 2


def test_the_cached_size_is_repeated_when_outgrown_and_padded_when_not():
    source, receiver = CachedSize(), CachedSize()
    lengths = [sent_and_received(source, receiver, bytes(n)) for n in (100, 100, 60, 101, 100)]
    assert lengths == [[8, 108], [108], [108], [108, 109], [109]]


def test_fixed_metadata_is_padded_to_its_limit_and_refused_beyond():
    protocol = FixedMetadata(limit=64)
    assert [len(message) for message in protocol.outgoing(b"x")] == [72]
    assert [len(message) for message in protocol.outgoing(bytes(64))] == [72]
    with pytest.raises(ValueError, match=r"is 65 bytes; the size fixed .* is 64"):
        protocol.outgoing(bytes(65))
    with pytest.raises(ValueError, match="metadata_limit is 63, at least 64"):
        FixedMetadata(63)


def test_an_unknown_protocol_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'carrier-pigeon'; there are: two-broadcasts, fixed-"):
        open_prior_channel("carrier-pigeon")


# ---- what holds in a healthy world: each of these runs for every protocol on the ranks of one


def every_mapping_arrives(rank: int, name: str) -> None:
    channel = open_prior_channel(name, src=1, metadata_limit=1 << 16)

    # Derandomised, every rank draws the same mappings: the others know what rank 1 sends.
    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=60,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mappings)
    def check(mapping: Any) -> None:
        with exchange(channel, mapping) as frame:
            assert_arrived(mapping, frame.mapping)
            assert frame.sequence == channel.sequence - 1

    check()
    assert channel.sequence == 60
    channel.close()


def steps_of_an_engine_arrive(rank: int, name: str) -> None:
    """Arrays and ints, as the runtime publishes them; what arrives outlives its frame."""
    channel = open_prior_channel(name)
    kept = []
    for step in range(3):
        mapping = {
            "step": step,
            "swap_in": np.zeros((0, 2), dtype=np.int64),
            "block_tables": np.full((4, 3), step, dtype=np.int32),
            "strided": np.arange(20)[::-3],
            "input_ids": np.arange(step + 1),
        }
        with exchange(channel, mapping) as frame:
            assert_arrived(mapping, frame.mapping)
            kept.append(frame.mapping["block_tables"])
        with pytest.raises(ValueError, match=f"frame {step} was released"):
            _ = frame.mapping
    assert [int(table[0, 0]) for table in kept] == [0, 1, 2]
    channel.close()


def broadcasts_are_counted(rank: int, name: str) -> list[int]:
    """At the process group; the channel's own count and the probe's agree with it."""
    probe = Recorder()
    channel = open_prior_channel(name, probe=probe)
    longer = {"a longer name of a tensor": torch.arange(3), **block_message()}
    counts = []
    for mapping in [
        block_message(),  # 3 tensors
        block_message(),
        longer,  # 4
        longer,
        {**block_message(), "swap_in": torch.zeros(0, 2, dtype=torch.int64)},  # 2 and an empty one
        {"step": 7},
        {},
    ]:
        before = collectives(), channel.broadcasts
        frame = exchange(channel, mapping)
        counts.append(collectives() - before[0])
        assert counts[-1] == channel.broadcasts - before[1]
        sequence, nbytes, metadata_bytes, broadcasts, first, second, end = probe.told[-1]
        assert (sequence, broadcasts) == (frame.sequence, counts[-1])
        assert (nbytes, metadata_bytes) == (frame.nbytes, frame.metadata_bytes)
        assert first <= second <= end <= time.perf_counter_ns()
        tensor_bytes = sum(value.nbytes for value in mapping.values() if type(value) is not int)
        assert frame.nbytes >= metadata_bytes + tensor_bytes
    sizes = [numbers[1:3] for numbers in probe.told]
    told: list[Any] = [None] * WORLD
    dist.all_gather_object(told, sizes)
    assert told == [sizes] * WORLD
    before = collectives(), channel.broadcasts
    channel.close()
    assert collectives() - before[0] == STEADY[name]
    return counts


class Recorder:
    """A probe that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, ...]] = []

    def published(self, *numbers: int) -> None:
        self.told.append(numbers)

    received = published


def order_and_nesting_survive(rank: int, name: str) -> None:
    channel = open_prior_channel(name)
    mapping = {
        "z": 1,
        "a": torch.ones(2),
        7: [1, (torch.zeros(1), {"deep": torch.full((), 3.0), "b": None})],
        "m": ("x", b"y", torch.float16, torch.device("cpu")),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "transposed": torch.arange(6).reshape(2, 3).T,
        "empty": torch.zeros(0, 4),
    }
    with exchange(channel, mapping) as frame:
        assert list(frame.mapping) == list(mapping)
        assert_arrived(mapping, frame.mapping)
    channel.close()


def what_cannot_travel_leaves_the_ranks_in_step(rank: int, name: str) -> None:
    channel = open_prior_channel(name)
    for _ in range(2):
        before = collectives(), channel.sequence
        if channel.is_source:
            with pytest.raises(UnsupportedTypeError, match="a: object of type list that pickle"):
                channel.publish({"big": torch.arange(100), "a": [1, lambda: 0]})
            with pytest.raises(UnsupportedTypeError, match=r"b\[1\]: tensor on the meta device"):
                channel.publish({"b": [torch.ones(1), torch.empty(1, device="meta")]})
            with pytest.raises(UnsupportedTypeError, match="c: numpy array of dtype '<U1'"):
                channel.publish({"c": np.array(["x"])})
            with pytest.raises(ValueError, match="not an object of type list"):
                channel.publish([1])  # type: ignore[arg-type]
        assert (collectives(), channel.sequence) == before
        assert_arrived(block_message(), exchange(channel, block_message()).mapping)
    channel.close()


def metadata_of_any_size_but_the_fixed_one_travels(rank: int, name: str) -> None:
    channel = open_prior_channel(name)
    long = {"text": "x" * DEFAULT_METADATA_LIMIT}
    pickled = len(pickle.dumps(list(long.items())))
    if name == "fixed-metadata":
        before = collectives(), channel.sequence
        if channel.is_source:
            with pytest.raises(ValueError, match=rf"{pickled} bytes; .* is 8192"):
                channel.publish(long)
        assert (collectives(), channel.sequence) == before
    else:
        assert_arrived(long, exchange(channel, long).mapping)
    assert_arrived(block_message(), exchange(channel, block_message()).mapping)
    channel.close()


def closing_is_orderly(rank: int, name: str) -> None:
    channel = open_prior_channel(name)
    if rank == 0:
        channel.publish({"a": 1})
        channel.publish({"a": torch.arange(1000)})
        channel.close()
        with pytest.raises(Closed):
            channel.publish({"a": 3})
    elif rank == 1:  # leaves after one frame: waits for the goodbye, past the other frame
        channel.receive()
        channel.close()
        assert channel.sequence == 2
        with pytest.raises(Closed):
            channel.receive()
    else:
        channel.receive()
        channel.receive()
        for _ in range(2):
            with pytest.raises(Closed):
                channel.receive()
        assert channel.sequence == 2
    channel.close()


def wrong_calls_are_told(rank: int, name: str) -> None:
    channel = open_prior_channel(name, src=2)
    with pytest.raises(ValueError, match="the source is rank 2"):
        _ = channel.receive() if channel.is_source else channel.publish({})
    if not channel.is_source:
        with pytest.raises(ValueError, match="timeout_s is -1"):
            channel.receive(timeout_s=-1)
    channel.close()
    with pytest.raises(ValueError, match="timeout_s is 0"):
        open_prior_channel(name, timeout_s=0)
    with pytest.raises(ValueError, match=r"disagree about protocol: \{0: 0, 1: 1, 2: 2\}"):
        open_prior_channel(PROTOCOLS[rank])


SCENARIOS: list[Callable[[int, str], Any]] = [
    every_mapping_arrives,
    steps_of_an_engine_arrive,
    broadcasts_are_counted,
    order_and_nesting_survive,
    what_cannot_travel_leaves_the_ranks_in_step,
    metadata_of_any_size_but_the_fixed_one_travels,
    closing_is_orderly,
    wrong_calls_are_told,
]


def run_scenarios(rank: int) -> dict[tuple[str, str], Any]:
    results = {}
    for scenario in SCENARIOS:
        for name in PROTOCOLS:
            results[scenario.__name__, name] = scenario(rank, name)
            dist.barrier()
    return results


@pytest.fixture(scope="module")
def healthy() -> list[dict[tuple[str, str], Any]]:
    """What each scenario returned, by rank; a failed assertion of any fails all."""
    return run_ranks(run_scenarios, WORLD, timeout_s=120)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_in_a_healthy_world(healthy, scenario, name):
    assert all((scenario.__name__, name) in results for results in healthy)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("two-broadcasts", [5, 5, 6, 6, 4, 2, 2]),
        ("fixed-metadata", [4, 4, 5, 5, 3, 1, 1]),
        ("cached-size", [5, 4, 6, 5, 3, 1, 1]),  # the first and the third outgrow the size
    ],
)
def test_each_protocol_costs_what_its_description_says(healthy, name, expected):
    counts = [results["broadcasts_are_counted", name] for results in healthy]
    assert counts == [expected] * WORLD


# ---- what is told when something breaks: each in a world of its own, every protocol in it


def time_out(rank: int) -> None:
    gate = dist.new_group()  # on the channel's own group a broadcast is under way
    for name in PROTOCOLS:
        channel = open_prior_channel(name, dist.new_group(), timeout_s=20)
        if rank == 0:
            channel.publish({"a": 1})
            dist.barrier(gate)
            channel.publish({"b": torch.arange(5), "text": "x" * 3000})
            dist.barrier(gate)
            channel._timeout_s = 0.3  # type: ignore[attr-defined]
            with pytest.raises(PublishTimeout, match="for the other ranks to take frame 2"):
                channel.publish({"a": 1})
            with pytest.raises(BrokenChannel, match="PublishTimeout"):
                channel.publish({})
            channel.close()
            dist.barrier(gate)
        else:
            assert channel.receive().mapping == {"a": 1}
            for timeout_s in (0, 0.3):
                start = time.monotonic()
                with pytest.raises(ReceiveTimeout, match="in vain for frame 1 from rank 0"):
                    channel.receive(timeout_s=timeout_s)
                assert timeout_s <= time.monotonic() - start < 5
            dist.barrier(gate)
            # Gone on with: the frame that was awaited in vain comes with a later call.
            frame = channel.receive()
            assert frame.mapping["b"].tolist() == list(range(5))
            assert frame.sequence == 1
            dist.barrier(gate)
            dist.barrier(gate)


def test_waits_are_bounded_and_a_receiver_can_go_on_with_its_own():
    run_ranks(time_out, 2)


def lose_the_source(rank: int, name: str) -> tuple[int | None, float]:
    channel = open_prior_channel(name, timeout_s=30)
    if rank == 0:
        channel.publish({"a": torch.ones(3)})
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(PeerLost) as lost:
        while True:
            channel.receive()
    with pytest.raises(BrokenChannel, match="PeerLost"):
        channel.receive()
    channel.close()
    return lost.value.rank, time.monotonic() - start


def test_a_killed_source_is_named():
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose_the_source, 2, "cached-size")
    rank, seconds = failed.value.results[1]
    assert rank == 0 and seconds < 10


def disturb(rank: int) -> None:
    for name in PROTOCOLS:
        channel = open_prior_channel(name, timeout_s=20)
        exchange(channel, {"a": 1})
        if rank == 0:
            broken = bytearray(b"no pickle")
            for message in channel._metadata.outgoing(broken):  # type: ignore[attr-defined]
                dist.broadcast(torch.frombuffer(message, dtype=torch.uint8), src=0)
            continue
        with pytest.raises(FrameError, match="cannot be unpickled"):
            channel.receive()
        with pytest.raises(BrokenChannel, match="cannot be unpickled"):
            channel.receive()
        channel.close()


def test_metadata_that_is_no_pickle_breaks_the_channel():
    run_ranks(disturb, 2)
