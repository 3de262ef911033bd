"""The roll call: ranks of one attempt find each other whatever an earlier one has left behind."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch.distributed as dist

from onecast.runtime.config import RankEnvironment
from onecast.runtime.roll_call import Roll, RollCall, name_ranks

WORLD = 3


@pytest.fixture
def server() -> Iterator[dist.TCPStore]:
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def join(server: dist.TCPStore) -> Iterator[Callable[..., Future[Roll]]]:
    """Starts a rank's part; its result or error comes later."""
    with ThreadPoolExecutor(3 * WORLD) as pool:

        def start(
            rank: int,
            address: str = "",
            refusal: str = "",
            timeout_s: float = 10,
            terms: Mapping[str, str] | None = None,
        ) -> Future[Roll]:
            def part() -> Roll:
                call = RollCall(environment(rank, server.port), timeout_s=timeout_s)
                with call.refuses():
                    if refusal:
                        raise ValueError(refusal)
                return call.answer(address, terms)

            return pool.submit(part)

        yield start


def environment(rank: int, port: int) -> RankEnvironment:
    return RankEnvironment(
        rank=rank,
        local_rank=rank,
        world_size=WORLD,
        local_world_size=WORLD,
        node=rank,
        run_id="",
        run_dir=None,
        launcher_pid=None,
        several_ranks_per_gpu=False,
        master_addr="127.0.0.1",
        master_port=port,
        agent_store=True,
    )


def test_all_ranks_learn_the_same_call_and_every_address(join: Callable[..., Future[Roll]]) -> None:
    parts = [join(rank, f"host-{rank} 1") for rank in range(WORLD)]
    rolls = [part.result() for part in parts]
    assert len({roll.call for roll in rolls}) == 1
    assert all(roll.addresses == ["host-0 1", "host-1 1", "host-2 1"] for roll in rolls)
    rolls[0].store.set("key", "value")
    assert rolls[2].store.get("key") == b"value"


def test_ranks_started_again_do_not_take_part_in_the_attempt_before(
    join: Callable[..., Future[Roll]], server: dist.TCPStore
) -> None:
    first = [join(rank, "old") for rank in range(WORLD)]
    old = {part.result().call for part in first}
    late = [join(rank, "new") for rank in (2, 1)]
    answered = dist.PrefixStore("onecast", server)
    (call,) = old
    while b"new" not in answered.get(f"answer/{call}/2"):  # it saw what is there of the first
        pass
    assert not any(part.done() for part in late)
    rolls = [join(0, "new").result(), *(part.result() for part in late)]
    assert {roll.call for roll in rolls}.isdisjoint(old)
    assert all(roll.addresses == ["new"] * WORLD for roll in rolls)
    rolls[0].store.set("attempt", "2")
    assert not first[0].result().store.check(["attempt"]), "keys of attempts are kept apart"


def test_ranks_that_do_not_come_are_named(join: Callable[..., Future[Roll]]) -> None:
    alone = join(0, timeout_s=0.3)
    with pytest.raises(TimeoutError, match=r"waited 0.3 s for ranks 1 and 2 in vain"):
        alone.result()
    with pytest.raises(TimeoutError, match=r"waited 0.3 s for rank 0 in vain"):
        join(1, timeout_s=0.3).result()


def test_ranks_that_came_say_who_did_not_and_not_that_rank_0_did_not(
    join: Callable[..., Future[Roll]],
) -> None:
    came = join(1, timeout_s=0.3)
    with pytest.raises(TimeoutError, match=r"waited 0.6 s for rank 2 in vain"):
        join(0, timeout_s=0.6).result()
    with pytest.raises(TimeoutError, match=r"rank 0 waited for rank 2 in vain"):
        came.result()
    again = [join(rank) for rank in (1, 2)]  # what they find there is of the attempt before
    assert join(0).result().call == again[0].result().call


def test_nodes_that_were_told_different_things_are_refused_on_all_of_them(
    join: Callable[..., Future[Roll]],
) -> None:
    parts = [
        join(rank, terms={"--block-size": "32" if rank == 2 else "16", "--tp": "3"})
        for rank in range(WORLD)
    ]
    for part in parts:
        with pytest.raises(
            ValueError,
            match=r"^--block-size: 16 on nodes 0 and 1, 32 on node 2; all nodes need the same$",
        ):
            part.result()


@pytest.mark.parametrize("who", [0, 2])
def test_what_one_rank_refuses_all_raise(join: Callable[..., Future[Roll]], who: int) -> None:
    refusal = "--block-size: 0 is below 1"
    parts = [join(rank, refusal=refusal if rank == who else "") for rank in range(WORLD)]
    for part in parts:
        with pytest.raises(ValueError, match=refusal):
            part.result()


def test_rank_0_makes_the_store_where_the_launcher_has_none() -> None:
    free = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    rolls: dict[int, Roll] = {}

    def part(rank: int) -> None:
        own = replace(environment(rank, free), agent_store=False)
        rolls[rank] = RollCall(own, timeout_s=10).answer("")

    threads = [threading.Thread(target=part, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(rolls) == [0, 1, 2]


def test_ranks_are_named_as_in_a_sentence() -> None:
    assert [name_ranks(ranks) for ranks in ([3], [2, 3], [1, 2, 3])] == [
        "rank 3",
        "ranks 2 and 3",
        "ranks 1, 2 and 3",
    ]
