"""What two levels alone promise: one broadcast among hosts, none inside, whoever leads.

What they promise as every channel does stands in test_channels.py. Hosts are pretended by ranks
that read another host's key, except at the end, where they are two (`hosts`).
"""

import gc
import io
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from channel_runs import draw_mappings, exchange
from hosts import NoHosts, two_hosts
from test_frame import assert_arrived
from torch.distributed import distributed_c10d as c10d

from onecast.comm import (
    BrokenChannel,
    CannotShare,
    Closed,
    CommError,
    PeerLost,
    ReceiveTimeout,
    TwoLevelChannel,
    open_channel,
    peers,
    two_level,
)
from onecast.comm.obituaries import Obituaries
from onecast.comm.testing import RankFailed, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

WORLD = 4
LOST_S = 2.0  # a second is the promise; these tests may share their cores with others
DRAWN: list[Any] = []  # in a rank: what `draw_mappings` gave

# The host of each rank, the source, and who leads.
LAYOUTS = [
    ("aabb", 0, [0, 2]),
    ("aabb", 3, [0, 3]),  # neither rank 0 nor the lowest of its host
    ("aaab", 1, [1, 3]),
    ("aaab", 3, [0, 3]),  # alone on its host
    ("abca", 2, [0, 1, 2]),
    ("abcd", 1, [0, 1, 2, 3]),
]


def pretend_hosts(rank: int, layout: str) -> None:
    peers._host_key = lambda: ord(layout[rank])


# ---- what holds in a healthy world: each of these runs on all four ranks of one


def every_mapping_arrives_whoever_leads(rank: int) -> None:
    for layout, src, _ in LAYOUTS:
        pretend_hosts(rank, layout)
        channel = TwoLevelChannel(src=src, timeout_s=20)
        for mapping in DRAWN:
            for _ in range(2):
                with exchange(channel, mapping) as frame:
                    assert_arrived(mapping, frame.mapping)
        channel.close()


def one_broadcast_a_frame_goes_to_leaders_alone(rank: int) -> None:
    issued: list[int] = []
    broadcast = dist.broadcast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast", lambda *a, **k: issued.append(1) or broadcast(*a, **k))
        for layout, src, leaders in LAYOUTS:
            pretend_hosts(rank, layout)
            channel = TwoLevelChannel(src=src, timeout_s=20)
            groups = [group for group in c10d._world.pg_map if group is not dist.group.WORLD]
            assert len(groups) == (rank in leaders)
            counts = []
            for count in [1, 1, 5000, 5001, 3, 300_000, 299_000]:  # two outgrow the broadcast
                issued.clear()
                numbers = [group._get_sequence_number_for_group() for group in groups]
                before = channel.broadcasts
                exchange(channel, {"a": torch.arange(count)})
                counts.append(len(issued))
                assert channel.broadcasts - before == len(issued)
                for group, number in zip(groups, numbers, strict=True):
                    assert group._get_sequence_number_for_group() - number == len(issued)
            assert counts == ([1, 1, 2, 1, 1, 2, 1] if rank in leaders else [0] * 7)
            channel.close()
            gc.collect()
            assert len(c10d._world.pg_map) == 1, "the leaders' group went with the channel"


def on_one_host_nothing_is_broadcast(rank: int) -> None:
    pretend_hosts(rank, "aaaa")
    channel = TwoLevelChannel(src=2, timeout_s=20)
    for step in range(20):
        assert exchange(channel, {"step": step}).mapping == {"step": step}
    assert (channel.broadcasts, len(c10d._world.pg_map)) == (0, 1)
    channel.close()


def frames_larger_than_slots_pass_through_both_levels(rank: int) -> None:
    for layout, src in (("aabb", 0), ("aaab", 2)):
        pretend_hosts(rank, layout)
        channel = TwoLevelChannel(src=src, timeout_s=30)
        for step, count in enumerate([10, 100_000, 20, 1_300_000, 1_310_720, 30, 3_000_000, 40]):
            ids = torch.arange(count) + step
            with exchange(channel, {"ids": ids, "step": step}) as frame:
                assert torch.equal(frame.mapping["ids"], ids)
                assert frame.mapping["step"] == step
            if rank == step % WORLD:
                time.sleep(0.01)
        channel.close()


def the_source_may_be_ahead_of_slow_members(rank: int) -> None:
    pretend_hosts(rank, "aabb")
    channel = TwoLevelChannel(timeout_s=20)
    for step in range(60):
        if rank in (1, 3) and step % 8 == rank:
            time.sleep(0.03)
        count = 200_000 if step % 20 == 7 else step
        with exchange(channel, {"step": step, "ids": torch.full((count,), step)}) as frame:
            if rank in (1, 3) and step % 8 == 5:
                time.sleep(0.03)  # while it reads, nobody may write there
            assert frame.mapping["step"] == step
            assert bool((frame.mapping["ids"] == step).all())
    channel.close()


def a_member_waits_for_its_leader(rank: int) -> None:
    pretend_hosts(rank, "aabb")
    channel = TwoLevelChannel(timeout_s=20)
    if rank == 3:
        late = r"in vain for frame 0 from rank 0 by way of rank 2: .* process \d+ is "
        with pytest.raises(ReceiveTimeout, match=late):
            channel.receive(timeout_s=0.3)
    dist.barrier()
    if rank == 2:
        for _ in range(2):
            with pytest.raises(ReceiveTimeout, match="in vain for frame 0 from rank 0"):
                channel.receive(timeout_s=0.1)
    dist.barrier()
    assert exchange(channel, {"a": 1}).mapping == {"a": 1}
    channel.close()


def a_leader_waits_for_its_members(rank: int) -> None:
    """Frames that nobody reads fill the ring; no frame is lost by the time-out."""
    pretend_hosts(rank, "aabb")
    channel = TwoLevelChannel(timeout_s=20)
    large = [torch.arange(100_000 * (1 + step // 6)) for step in range(12)]
    if rank == 2:
        received = 0
        with pytest.raises(ReceiveTimeout, match=r"has no room: .*rank 3 has taken 0 of \d frames"):
            while True:
                assert channel.receive(timeout_s=0.5).mapping["step"] == received
                received += 1
        assert 2 <= received <= 4
        Path(os.environ["GATE"]).touch()
        for step in range(received, 12):
            assert torch.equal(channel.receive().mapping["a"], large[step])
    elif rank == 3:
        while not Path(os.environ["GATE"]).exists():
            time.sleep(0.01)
        for step in range(12):
            assert torch.equal(channel.receive().mapping["a"], large[step])
    else:
        for step in range(12):
            exchange(channel, {"step": step, "a": large[step]})
    channel.close()


def members_and_leaders_may_leave_early(rank: int) -> None:
    pretend_hosts(rank, "aabb")
    channel = TwoLevelChannel(timeout_s=20)
    for step in range(30):
        if (rank, step) in ((1, 3), (2, 5)):
            channel.close()  # of the leader, rank 2: it passes all frames on until the goodbye
            break
        assert exchange(channel, {"step": step}).mapping == {"step": step}
    channel.close()
    with pytest.raises(Closed):
        exchange(channel, {})


def groups_that_only_some_ranks_have_do_no_harm(rank: int) -> None:
    pretend_hosts(rank, "abab")
    if rank == 1:
        extra = dist.new_group([1], use_local_synchronization=True)
    channels = [TwoLevelChannel(src=src, timeout_s=20) for src in (0, 1, 0)]
    for step in range(20):
        for channel in channels:
            assert exchange(channel, {"step": step}).mapping == {"step": step}
    for channel in channels:
        channel.close()
    if rank == 1:
        dist.destroy_process_group(extra)


def who_drops_a_channel_is_told_to_all(rank: int) -> None:
    """Without closing it, and be it with a broadcast under way."""
    pretend_hosts(rank, "aabb")
    for dropper in (3, 2, 1, 0):
        channel = TwoLevelChannel(timeout_s=20)
        exchange(channel, {"a": 1})
        if rank == dropper != 0:
            with pytest.raises(ReceiveTimeout):
                channel.receive(timeout_s=0.05)
        dist.barrier()
        if rank == dropper:
            del channel
        else:
            start = time.monotonic()
            with pytest.raises(PeerLost, match=f"rank {dropper} is lost"):
                while True:
                    if rank == 0:
                        time.sleep(0.05)
                        channel.publish({})
                    else:
                        channel.receive()
            assert time.monotonic() - start < LOST_S
            with pytest.raises(BrokenChannel, match="PeerLost"):
                exchange(channel, {})
            channel.close()
        dist.barrier()


def leaders_that_cannot_connect_are_told_to_all(rank: int) -> None:
    pretend_hosts(rank, "aabb")

    def refuse(*_: Any) -> None:
        raise RuntimeError("no route to host")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_level, "PrivateGroup", refuse)
        with pytest.raises(CannotShare, match=r"rank 2: the leaders .* \[0, 2\], cannot connect"):
            TwoLevelChannel(timeout_s=20)
        channel = open_channel(timeout_s=20)
    assert channel.name == "process-group"
    channel.close()


def what_suits_is_found_by_itself(rank: int) -> list[str]:
    names = []
    for layout in ("aaaa", "aabb", "abcc", "abcd"):
        pretend_hosts(rank, layout)
        channel = open_channel(src=1, timeout_s=20)
        names.append(channel.name)
        assert exchange(channel, {"a": 1}).mapping == {"a": 1}
        channel.close()
    return names


HEALTHY: list[Callable[[int], Any]] = [
    every_mapping_arrives_whoever_leads,
    one_broadcast_a_frame_goes_to_leaders_alone,
    on_one_host_nothing_is_broadcast,
    frames_larger_than_slots_pass_through_both_levels,
    the_source_may_be_ahead_of_slow_members,
    a_member_waits_for_its_leader,
    a_leader_waits_for_its_members,
    members_and_leaders_may_leave_early,
    groups_that_only_some_ranks_have_do_no_harm,
    who_drops_a_channel_is_told_to_all,
    leaders_that_cannot_connect_are_told_to_all,
    what_suits_is_found_by_itself,
]


def run_healthy(rank: int, drawn: bytes) -> dict[str, Any]:
    DRAWN.extend(torch.load(io.BytesIO(drawn), weights_only=False))
    results = {}
    for scenario in HEALTHY:
        results[scenario.__name__] = scenario(rank)
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> list[dict[str, Any]]:
    """What each scenario returned, by rank; a failed assertion of any fails all."""
    gate = str(tmp_path_factory.mktemp("gate") / "open")
    return run_ranks(run_healthy, WORLD, draw_mappings(40), timeout_s=120, env={"GATE": gate})


@pytest.mark.parametrize("scenario", HEALTHY, ids=lambda scenario: scenario.__name__)
def test_in_a_healthy_world(healthy, scenario):
    assert all(scenario.__name__ in results for results in healthy)


def test_auto_takes_what_suits_the_hosts(healthy):
    names = ["shared-memory", "two-level", "two-level", "process-group"]
    assert [results["what_suits_is_found_by_itself"] for results in healthy] == [names] * WORLD


# ---- what is told when ranks die

# The hosts, the source, who dies, and whom the others must name.
DEATHS: list[tuple[str, int, int, Sequence[int | None]]] = [
    ("aabb", 0, 2, [2]),  # a leader
    ("aabb", 0, 3, [3]),  # a member, far from the source
    ("aabb", 3, 2, [2]),  # a member, near the source
    ("aabb", 3, 3, [3]),  # the source, neither rank 0 nor the lowest of its host
    ("aaab", 3, 3, [3]),  # the source, alone on its host
    ("abc", 0, 1, [1, None]),  # nobody saw it end, and it may have been the other one
]


def lose_one(rank: int, layout: str, src: int, victim: int, folder: str) -> tuple[Any, float]:
    """Who was lost, and when this rank was told."""
    if len(layout) > 1:
        pretend_hosts(rank, layout)
    channel = TwoLevelChannel(src=src, timeout_s=30)
    for step in range(10):
        assert exchange(channel, {"step": step}).mapping == {"step": step}
    if rank == victim:
        time.sleep(0.3)  # the others are waiting by then, and asleep
        Path(folder, "death").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLost) as lost:
        while True:
            if channel.is_source:
                time.sleep(0.01)
            exchange(channel, {})
    told = lost.value.rank, time.monotonic()
    for _ in range(2):
        with pytest.raises(BrokenChannel, match="PeerLost"):
            exchange(channel, {})
        channel.close()
    return told


def assert_all_are_told(
    failed: RankFailed, world: int, victim: int, names: Any, folder: Any
) -> None:
    results = failed.results
    assert sorted(results) == [rank for rank in range(world) if rank != victim], failed.details
    death = float((folder / "death").read_text())
    for lost, told in results.values():
        assert lost in names
        assert told - death < LOST_S


@pytest.mark.parametrize(("layout", "src", "victim", "names"), DEATHS)
def test_a_death_on_any_host_is_told_to_all_ranks(layout, src, victim, names, tmp_path):
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose_one, len(layout), layout, src, victim, str(tmp_path))
    assert_all_are_told(failed.value, len(layout), victim, names, tmp_path)


def lose_one_by_a_slow_store(rank: int, victim: int, folder: str) -> tuple[Any, float]:
    connect = Obituaries._connect

    def slow(board: Any) -> Any:
        time.sleep(1.5)  # a name server that does not answer takes longer
        return connect(board)

    Obituaries._connect = slow  # type: ignore[method-assign]
    return lose_one(rank, "aabb", 0, victim, folder)


def test_nobody_is_blamed_for_passing_the_news_on_while_the_store_is_slow(tmp_path):
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose_one_by_a_slow_store, 4, 3, str(tmp_path))
    results = failed.value.results
    assert [results[rank][0] for rank in (0, 1, 2)] == [3, 3, 3], failed.value.details


def outlive_the_groups(rank: int) -> None:
    pretend_hosts(rank, "ab")
    channel = TwoLevelChannel(timeout_s=20)
    exchange(channel, {"a": 1})
    dist.barrier()
    dist.destroy_process_group()
    with pytest.raises(CommError, match="process groups were destroyed before the channel was"):
        exchange(channel, {"a": 2})
    with pytest.raises(BrokenChannel):
        exchange(channel, {"a": 2})
    channel.close()


def test_a_channel_that_outlives_the_process_groups_says_so():
    run_ranks(outlive_the_groups, 2)


def end_with_a_broadcast_under_way(rank: int) -> None:
    pretend_hosts(rank, "ab")
    channel = TwoLevelChannel(timeout_s=20)
    if rank == 1:
        with pytest.raises(ReceiveTimeout):
            channel.receive(timeout_s=0.1)
        dist.destroy_process_group()
        del channel
        gc.collect()
    else:
        time.sleep(1)


def test_a_broadcast_under_way_keeps_no_process_from_ending():
    run_ranks(end_with_a_broadcast_under_way, 2, timeout_s=20)


# ---- on two hosts


def exchange_across_hosts(rank: int, drawn: bytes) -> tuple[str, int, list[int]]:
    channel = open_channel(src=1, timeout_s=30)
    for mapping in torch.load(io.BytesIO(drawn), weights_only=False):
        with exchange(channel, mapping) as frame:
            assert_arrived(mapping, frame.mapping)
    exchange(channel, {"a": torch.arange(100_000)})
    before = channel.broadcasts
    for step in range(100):
        mapping = {"ids": torch.arange(2000) + step, "step": step}
        with exchange(channel, mapping) as frame:
            assert_arrived(mapping, frame.mapping)
    steady = channel.broadcasts - before
    with pytest.raises(Closed):
        if channel.is_source:
            channel.close()
            channel.publish({})
        channel.receive()
    names = peers.Peers.exchange(dist.group.WORLD, torch.device("cpu"), {})
    return channel.name, steady, [peer.rank for peer in names.neighbours]


@pytest.fixture
def hosts():
    try:
        with two_hosts() as both:
            yield both
    except NoHosts as error:
        pytest.skip(f"two hosts cannot be made: {error}")


def test_frames_cross_from_host_to_host(hosts):
    results = run_ranks(exchange_across_hosts, WORLD, draw_mappings(40), hosts=hosts)
    assert [name for name, _, _ in results] == ["two-level"] * WORLD
    assert [neighbours for _, _, neighbours in results] == [[1], [0], [3], [2]]
    assert [steady for _, steady, _ in results] == [0, 100, 100, 0]


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_death_is_told_from_host_to_host(hosts, victim, tmp_path):
    with pytest.raises(RankFailed, match="SIGKILL") as failed:
        run_ranks(lose_one, WORLD, "", 0, victim, str(tmp_path), hosts=hosts)
    assert_all_are_told(failed.value, WORLD, victim, [victim], tmp_path)
