"""Ranks that are killed at any moment of an all-reduce, and ranks that are stopped for a while.

As with channels: every narrow window is met for certain, by a rank that is held there first. All
others must be told by name, soon, and be able to go on, and nothing may be left behind.
"""

import contextlib
import gc
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from statistics import median

import pytest
import torch
import torch.distributed as dist
from cli_runs import stray_segments
from test_channel_kills import (
    LOST_S,
    OPEN,
    OPENING,
    OPENING_ERRORS,
    OVER,
    WORLD_S,
    Board,
    Fate,
    Hold,
    Kill,
    hold_still,
    kept_memory,
    kill_ranks,
    seeded,
)
from zygote import Ended, Zygote

from onecast.comm import (
    BrokenChannel,
    Closed,
    CommError,
    PeerLost,
    open_all_reduce,
    shared_all_reduce,
)

RANKS = 3
OPENING_LOST_S = 20.0  # the group's own time-out, while it is asked for a collective
SIZES = (1, 100, 20_000)  # words; the last is summed by shares
_SHARED_BYTES = 64 << 10

HOLDS = (
    Hold("before the segment is made", "opening", "shared_all_reduce.make_sum_segment"),
    Hold("when the segment is made", "opening", "shared_all_reduce.make_sum_segment", after=True),
    Hold("before it attaches", "opening", "segment.Segment.attach"),
    Hold("when it has attached", "opening", "segment.Segment.attach", after=True),
    Hold("before it arrives", "steady", "meeting.Meeting.arrive", call=30),
    Hold("with nobody woken", "steady", "meeting.Meeting._wake_others", call=30),
    Hold("having arrived", "steady", "meeting.Meeting.arrive", after=True, call=30),
    Hold("with all there", "steady", "meeting.Meeting.await_all", after=True, call=30),
    Hold("with the sum made", "steady", "sum_slots.SumSlots.add_up", after=True, call=20),
    Hold("before it adds its share", "steady", "sum_slots.SumSlots.add_up_own", call=9),
    Hold("with its share added", "steady", "sum_slots.SumSlots.add_up_own", after=True, call=9),
    Hold("before it collects shares", "steady", "sum_slots.SumSlots.collect", call=9),
    Hold("before it leaves", "closing", "meeting.Meeting.leave"),
    Hold("having left", "closing", "meeting.Meeting.leave", after=True),
)
PHASES = ("opening", "steady", "closing")


def plan(count: int, seed: int, holds: Sequence[Hold]) -> list[Kill]:
    """Every hold and every phase first, in random order, then whatever comes."""
    rng = random.Random(seed)
    moments: list[Hold | str] = [*holds, *PHASES]
    rng.shuffle(moments)
    moments += rng.choices(["steady", *PHASES, *holds], k=max(count - len(moments), 0))
    kills = []
    for number, moment in enumerate(moments[:count]):
        hold = moment if isinstance(moment, Hold) else None
        phase = moment.phase if isinstance(moment, Hold) else moment
        first = rng.randrange(RANKS)
        if hold is not None and "segment" in hold.function:
            first = rng.randrange(1, RANKS) if "attach" in hold.function else 0
        others = [rank for rank in range(RANKS) if rank != first]
        more = rng.choices((0, 1, RANKS - 1), (80, 15, 5))[0]
        delay_s = rng.uniform(0, {"opening": 0.02, "closing": 0.002}.get(phase, 0.1))
        hasty = rng.random() < 0.5
        kills.append(
            Kill(
                number,
                phase,
                (first, *rng.sample(others, more)),
                delay_s,
                hold,
                hasty,
                not hasty and phase != "opening",
                seed,
            )
        )
    return kills


# ---- in the ranks


def live(rank: int, kill: Kill, board_path: str) -> Fate:
    """Sum until somebody is lost, or, in the phase that is about the end, twenty times."""
    shared_all_reduce._SHARED_BYTES = _SHARED_BYTES
    board = Board(board_path, RANKS)
    if kill.hold is not None and rank == kill.victims[0]:
        kill.hold.arm(lambda: hold_still(board, rank))
    fate = Fate()
    reduce_until_lost(rank, kill, board, fate)
    gc.collect()
    assert not kept_memory(), "an all-reduce that is gone keeps its memory"
    board.reach(rank, OVER)
    if not fate.opened or kill.hasty:
        return fate
    left = [one for one in range(RANKS) if one not in kill.victims]
    for one in left:
        board.await_stage(one, OVER)
    if kill.renews:
        renew(rank, left)
        fate.renewed = True
    return fate


def reduce_until_lost(rank: int, kill: Kill, board: Board, fate: Fate) -> None:
    board.reach(rank, OPENING)
    reducer = None
    try:
        reducer = open_all_reduce(transport="shared-memory", timeout_s=WORLD_S)
        fate.opened = True
        if kill.phase != "closing":
            board.reach(rank, OPEN)
        rng = random.Random(kill.seed * 1000 + kill.number)
        while kill.phase != "closing" or fate.frames < 20:
            numel, number = rng.choice(SIZES), fate.frames
            tensor = torch.full((numel,), number * RANKS + rank)
            pause_s = rng.choice((0, 0, 0, 0.001))
            if pause_s and number % RANKS == rank:
                time.sleep(pause_s)
            reducer.all_reduce(tensor)
            assert bool((tensor == number * RANKS**2 + sum(range(RANKS))).all()), "torn"
            fate.frames += 1
        board.reach(rank, OPEN)
        reducer.close()
    except (CommError, RuntimeError) as error:  # Gloo's own are RuntimeErrors
        fate.told_ns = time.monotonic_ns()
        fate.error = type(error).__name__
        fate.text = str(error)
        fate.lost = error.rank if isinstance(error, PeerLost) else None
    if reducer is not None:
        if fate.error == "PeerLost":
            with pytest.raises(BrokenChannel, match="PeerLost"):
                reducer.all_reduce(torch.zeros(1))
        if not kill.hasty:
            reducer.close()


def renew(rank: int, left: list[int]) -> None:
    """The ranks that are left begin anew."""
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    store = dist.PrefixStore("again", store)
    dist.init_process_group("gloo", store=store, rank=left.index(rank), world_size=len(left))
    reducer = open_all_reduce(transport="shared-memory", timeout_s=WORLD_S)
    for _ in range(5):
        tensor = torch.ones(3)
        reducer.all_reduce(tensor)
        assert tensor.tolist() == [len(left)] * 3
    reducer.close()


# ---- in the test


def strike(zygote: Zygote, kill: Kill) -> list[float]:
    """Do it; the seconds after which each rank that was left was told."""
    with tempfile.NamedTemporaryFile() as file:
        board = Board(file.name, RANKS)
        with zygote.start(live, RANKS, kill, file.name) as world:
            killed_ns = kill_ranks(world, board, kill)
            ends = world.join(WORLD_S)
    for pid in world.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return judge(kill, ends, killed_ns)


def judge(kill: Kill, ends: list[Ended], killed_ns: int) -> list[float]:
    seconds = []
    fates = {rank: end.value for rank, end in enumerate(ends) if rank not in kill.victims}
    # Opening can fail on some ranks only; the others then lose those too.
    gone = [*kill.victims, *(rank for rank, fate in fates.items() if not fate.opened)]
    for rank, end in enumerate(ends):
        if rank in kill.victims:
            # One that was quick to come to its end is none that was killed.
            assert end.code == -signal.SIGKILL or kill.phase == "closing", end
            continue
        assert end.code == 0, end
        fate = fates[rank]
        if not fate.opened:
            assert kill.phase == "opening" and fate.error in OPENING_ERRORS, fates
        elif fate.error == "PeerLost":
            assert fate.lost in gone and f"rank {fate.lost} is lost" in fate.text, fates
        else:
            assert kill.phase == "closing" and fate.error in ("", "Closed"), fates
        assert fate.renewed == kill.renews, fates
        if fate.error:
            seconds.append((fate.told_ns - killed_ns) / 1e9)
            limit_s = OPENING_LOST_S if kill.phase == "opening" else LOST_S
            assert seconds[-1] < limit_s, (seconds, fates)
    return seconds


def strike_all(kills: list[Kill], lanes: int) -> None:
    """All kills, some at a time."""
    before = stray_segments()
    seconds: list[float] = []
    failures: list[str] = []
    queue = iter(kills)
    lock = threading.Lock()

    def work() -> None:
        with Zygote() as zygote:
            while not failures:
                with lock:
                    kill = next(queue, None)
                if kill is None:
                    return
                try:
                    seconds.extend(strike(zygote, kill))
                except BaseException as error:
                    notes = getattr(error, "__notes__", [])
                    failures.append("\n".join([str(kill), repr(error), *notes]))

    threads = [threading.Thread(target=work) for _ in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "\n".join(failures)
    assert stray_segments() <= before
    print(
        f"{len(kills)} kills, {len(seconds)} ranks told, in the median after "
        f"{median(seconds):.3f} s, the last after {max(seconds):.3f} s"
    )


def test_whoever_is_killed_is_named_to_the_others_and_they_go_on() -> None:
    seed = seeded()
    holds = random.Random(seed).sample(HOLDS, 4)
    strike_all(plan(7, seed, holds), lanes=2)


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments_leave_nothing_behind() -> None:
    strike_all(plan(100, seeded(), HOLDS), lanes=3)


def reduce_until_over(rank: int, board_path: str) -> int:
    """Sums until the test said that it is over."""
    shared_all_reduce._SHARED_BYTES = _SHARED_BYTES
    board = Board(board_path, RANKS)
    reducer = open_all_reduce(transport="shared-memory", timeout_s=WORLD_S)
    rng = random.Random(1)
    number = 0
    with contextlib.suppress(Closed):
        while not (rank == 0 and board.has_reached(RANKS, OVER)):
            tensor = torch.full((rng.choice(SIZES),), number * RANKS + rank)
            reducer.all_reduce(tensor)
            assert bool((tensor == number * RANKS**2 + sum(range(RANKS))).all()), "torn"
            number += 1
            board.reach(rank, number)
    reducer.close()
    return number


def test_ranks_that_are_stopped_for_a_while_lose_nothing() -> None:
    rng = random.Random(seeded())
    with Zygote() as zygote, tempfile.NamedTemporaryFile() as file:
        board = Board(file.name, RANKS)
        with zygote.start(reduce_until_over, RANKS, file.name) as world:
            board.await_stage(0, 100)
            for turn in range(15):
                ranks = [rng.randrange(RANKS)] if rng.random() < 0.8 else range(RANKS)
                for rank in ranks:
                    os.kill(world.pids[rank], signal.SIGSTOP)
                time.sleep(0.7 if turn == 0 else rng.uniform(0, 0.1))
                for rank in ranks:
                    os.kill(world.pids[rank], signal.SIGCONT)
                goal = board.reached(0) + rng.randrange(100)
                for rank in range(RANKS):
                    board.await_stage(rank, goal)
            board.reach(RANKS, OVER)
            ends = world.join(WORLD_S)
    assert [end.code for end in ends] == [0] * RANKS
    assert len({end.value for end in ends}) == 1, ends
