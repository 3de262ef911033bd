"""Ranks that are killed at any moment, and ranks that are stopped for a while.

A kill hits a rank at a random moment of a phase, or holds it at a named line first, so that every
narrow window is met for certain. All others must be told by name, soon, and be able to go on; and
nothing of a world may be left behind.
"""

import contextlib
import gc
import importlib
import mmap
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cli_runs import stray_segments
from zygote import Ended, World, Zygote

from onecast.comm import BrokenChannel, Closed, CommError, PeerLost, open_channel, peers
from onecast.comm.channel import TRANSPORTS

LOST_S = 3.0  # a second is promised to a machine that has time
WORLD_S = 40.0
# Leaders of hosts that connect to one who has died wait for all of the channel's time-out; and the
# store of torch at times answers nobody for 5 s when ranks connect to it at once.
TWO_LEVEL_TIMEOUT_S, TWO_LEVEL_LOST_S = 8.0, 20.0
RANKS = 3
SOURCE = 0

OPENING, OPEN, HELD, OVER = 1, 2, 3, 4  # how far a rank is
OPENING_ERRORS = ("RuntimeError", "PeerLost", "CannotShare")  # the first is the group's own
PHASES = ("opening", "steady", "growing", "full", "closing")


@dataclass(frozen=True)
class Hold:
    """Where a rank is stopped to be killed: before or after a call of a function."""

    name: str
    phase: str
    function: str  # module, class and name
    after: bool = False
    call: int = 1

    @property
    def by_source(self) -> bool:
        return "attach" not in self.function and "Reader" not in self.function

    def arm(self, held: Callable[[], None]) -> None:
        module, *outer, name = self.function.split(".")
        owner: Any = importlib.import_module(f"onecast.comm.{module}")
        for part in outer:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        calls = 0

        def stopping(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call and not self.after:
                held()
            result = original(*args, **options)
            if calls == self.call and self.after:
                held()
            return result

        plain = not isinstance(owner, type) or not isinstance(owner.__dict__[name], classmethod)
        setattr(owner, name, stopping if plain else staticmethod(stopping))


HOLDS = (
    Hold("before the segment is made", "opening", "sharing.make_ring_segment"),
    Hold("when the segment is made", "opening", "sharing.make_ring_segment", after=True),
    Hold("before it attaches", "opening", "segment.Segment.attach"),
    Hold("when it has attached", "opening", "segment.Segment.attach", after=True),
    Hold("with a frame not announced", "steady", "ring_writer.RingWriter.publish", call=9),
    Hold("with nobody woken", "steady", "ring_writer.RingWriter._wake_readers", call=9),
    Hold("with a frame in hand", "steady", "ring_reader.RingReader.release", call=9),
    Hold("having released it", "steady", "ring_reader.RingReader.release", after=True, call=9),
    Hold("before memory is added", "growing", "segment.Segment.extend", call=3),
    Hold("with memory of no ring", "growing", "segment.Segment.extend", after=True, call=3),
    Hold("before a new ring", "growing", "ring_writer.RingWriter._resize", call=3),
    Hold("with an empty ring", "growing", "ring_writer.RingWriter._resize", after=True, call=3),
    Hold("before it follows", "growing", "ring_reader.RingReader._follow", call=3),
    Hold("before it waits for room", "full", "ring_writer.RingWriter._await_taken", call=6),
    Hold("before it says the end", "closing", "ring_writer.RingWriter.close"),
    Hold("having said the end", "closing", "ring_writer.RingWriter.close", after=True),
    Hold("before it leaves", "closing", "ring_reader.RingReader.leave"),
    Hold("having left", "closing", "ring_reader.RingReader.leave", after=True),
)


@dataclass(frozen=True)
class Kill:
    """What is done to one world."""

    number: int
    phase: str
    victims: tuple[int, ...]  # die together; one that is held comes first
    delay_s: float
    hold: Hold | None
    hasty: bool  # the others end as soon as they know, without closing
    renews: bool  # the others open a new channel
    seed: int

    def __str__(self) -> str:
        where = self.hold.name if self.hold else f"{self.delay_s * 1e3:.1f} ms into it"
        return (
            f"kill {self.number} of seed {self.seed}: ranks {self.victims}, {self.phase}, {where}"
        )


def plan_kills(count: int, seed: int, size: int, holds: Sequence[Hold]) -> list[Kill]:
    """Every hold and every phase first, in random order, then whatever comes."""
    rng = random.Random(seed)
    moments: list[Hold | str] = [*holds, *PHASES]
    rng.shuffle(moments)
    moments += rng.choices([*PHASES, *PHASES, *holds], k=max(count - len(moments), 0))
    kills = []
    for number, moment in enumerate(moments[:count]):
        if isinstance(moment, Hold):
            phase, hold = moment.phase, moment
            first = SOURCE if hold.by_source else rng.randrange(1, size)
        else:
            phase, hold = moment, None
            first = rng.randrange(size)
        others = [rank for rank in range(size) if rank != first]
        more = rng.choices((0, 1, size - 1), (80, 15, 5))[0]
        victims = (first, *rng.sample(others, more))
        delay_s = rng.uniform(0, {"opening": 0.02, "closing": 0.002}.get(phase, 0.1))
        # Over a process group, which has no word of its own for this, the first rank to end is
        # blamed, and a broadcast that is under way keeps torch from destroying the group.
        hasty = bool(holds) and rng.random() < 0.5
        renews = bool(holds) and not hasty and phase != "opening"  # that fails on some ranks only
        kills.append(Kill(number, phase, victims, delay_s, hold, hasty, renews, seed))
    return kills


class Board:
    """A word of shared memory per rank, by which a test sees how far each is."""

    def __init__(self, path: str, size: int) -> None:
        with open(path, "ab+") as file:
            file.truncate(4096)
            self._words = memoryview(mmap.mmap(file.fileno(), 4096)).cast("Q")
        self._size = size

    def reach(self, rank: int, stage: int) -> None:
        self._words[rank] = stage

    def reached(self, rank: int) -> int:
        return self._words[rank]

    def has_reached(self, rank: int, stage: int) -> bool:
        return self._words[rank] >= stage

    def await_stage(self, rank: int, stage: int, timeout_s: float = WORLD_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.has_reached(rank, stage):
            assert time.monotonic() < deadline, f"rank {rank} never came to stage {stage}"
            time.sleep(0.0002)


@dataclass
class Fate:
    """What became of a rank that was not killed."""

    error: str = ""  # the name of its class; "": none, it closed
    lost: int | None = None
    text: str = ""
    told_ns: int = 0
    frames: int = 0
    opened: bool = False
    renewed: bool = False  # the ones left have opened a channel of their own and used it


# ---- in the ranks


def live(rank: int, size: int, transport: str, kill: Kill, board_path: str) -> Fate:
    """Exchange frames as the kill's phase wants it until somebody is lost."""
    if transport == "two-level":
        peers._host_key = lambda: rank * 2 // size  # pretend
    board = Board(board_path, size)
    if kill.hold is not None and rank == kill.victims[0]:
        kill.hold.arm(lambda: hold_still(board, rank))
    fate = Fate()
    exchange(rank, transport, kill, board, fate)
    gc.collect()
    if transport == "shared-memory":
        assert not kept_memory(), "a channel that is gone keeps its memory"
    board.reach(rank, OVER)
    if not fate.opened or kill.hasty:
        return fate  # others may wait in a collective of the opening: they see the end of this rank
    left = [one for one in range(size) if one not in kill.victims]
    for one in left:
        board.await_stage(one, OVER)
    if kill.renews:
        renew(rank, left, transport)
        fate.renewed = True
    return fate


def hold_still(board: Board, rank: int) -> None:
    board.reach(rank, HELD)
    time.sleep(WORLD_S * 2)


def exchange(rank: int, transport: str, kill: Kill, board: Board, fate: Fate) -> None:
    board.reach(rank, OPENING)
    channel: Any = None
    try:
        timeout_s = TWO_LEVEL_TIMEOUT_S if transport == "two-level" else WORLD_S
        channel = open_channel(transport=transport, timeout_s=timeout_s)
        fate.opened = True
        if kill.phase != "closing":
            board.reach(rank, OPEN)
        use(channel, rank, kill, fate)
        board.reach(rank, OPEN)
        channel.close()
    except (CommError, RuntimeError) as error:  # Gloo's own are RuntimeErrors
        fate.told_ns = time.monotonic_ns()
        fate.error = type(error).__name__
        fate.text = str(error)
        fate.lost = error.rank if isinstance(error, PeerLost) else None
    if channel is not None:
        if fate.error == "PeerLost":
            with pytest.raises(BrokenChannel, match="PeerLost"):
                channel.publish({}) if channel.is_source else channel.receive(0)
        if not kill.hasty:
            channel.close()


def use(channel: Any, rank: int, kill: Kill, fate: Fate) -> None:
    rng = random.Random(kill.seed * 1000 + kill.number)
    rng_here = random.Random(kill.seed * 1000 + kill.number * 10 + rank)
    for number, size in enumerate(sizes(kill.phase, rng)):
        fate.frames = number
        if channel.is_source:
            channel.publish({"number": number, "words": torch.full((size,), number)})
            if kill.phase == "steady" and number % 8 == 0:
                time.sleep(rng_here.choice((0, 0, 0.001, 0.005)))
        else:
            with channel.receive() as frame:
                mapping = frame.mapping
                assert mapping["number"] == number
                words = mapping["words"]
                assert len(words) == size and bool((words == number).all()), "torn"
                if kill.phase == "full" and rank == 1:
                    time.sleep(0.05)
                    assert bool((words == number).all()), "changed while it was held"


def sizes(phase: str, rng: random.Random) -> Iterator[int]:
    """Words of each frame; for ever, but for the phase that is about the end."""
    if phase == "closing":
        yield from [100] * 20
        return
    while True:
        if phase == "growing":
            nbytes = 100_000
            while nbytes < 20_000_000:
                yield nbytes // 8
                nbytes = int(nbytes * rng.uniform(1.2, 2.5))
            yield from [10] * 600  # the slots get small again
        else:
            yield rng.choice((0, 10, 2000))


def kept_memory() -> list[str]:
    """Descriptors and mappings of ring segments that this process still has."""
    kept = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that reads the folder
            kept.append(os.readlink(f"/proc/self/fd/{fd}"))
    with open("/proc/self/maps") as file:
        kept += file.read().splitlines()
    return [one for one in kept if "memfd:onecast" in one]


def renew(rank: int, left: list[int], transport: str) -> None:
    """The ranks that are left begin anew, as a launcher that does not start processes again."""
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    store = dist.PrefixStore("again", store)
    dist.init_process_group("gloo", store=store, rank=left.index(rank), world_size=len(left))
    channel: Any = open_channel(transport=transport, timeout_s=WORLD_S)
    for number in range(5):
        if channel.is_source:
            channel.publish({"number": number})
        else:
            assert channel.receive().mapping == {"number": number}
    channel.close()


# ---- in the test


def strike(zygote: Zygote, transport: str, size: int, kill: Kill) -> list[float]:
    """Do it; the seconds after which each rank that was left was told."""
    with tempfile.NamedTemporaryFile() as file:
        board = Board(file.name, size)
        with zygote.start(live, size, size, transport, kill, file.name) as world:
            killed_ns = kill_ranks(world, board, kill)
            ends = world.join(WORLD_S)
    for pid in world.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return judge(kill, transport, ends, killed_ns)


def kill_ranks(world: World, board: Board, kill: Kill) -> int:
    stage = OPENING if kill.phase == "opening" else OPEN
    if kill.hold is not None:
        board.await_stage(kill.victims[0], HELD)
    else:
        for victim in kill.victims:
            board.await_stage(victim, stage)
    time.sleep(kill.delay_s)
    for victim in kill.victims:
        os.kill(world.pids[victim], signal.SIGKILL)
    return time.monotonic_ns()


def judge(kill: Kill, transport: str, ends: list[Ended], killed_ns: int) -> list[float]:
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
            # Gloo that was connecting to the victim waits for all of the group's own time-out.
            slow = transport == "two-level" or kill.phase == "opening"
            limit_s = TWO_LEVEL_LOST_S if slow else LOST_S
            assert seconds[-1] < limit_s, (seconds, fates)
    return seconds


def strike_all(transport: str, size: int, kills: list[Kill], lanes: int) -> None:
    """All kills, some at a time; prints how soon they were told of."""
    before = stray_segments()
    seconds: list[float] = []
    failures: list[str] = []
    queue = iter(kills)
    lock = threading.Lock()

    def work() -> None:
        with Zygote() as zygote:
            while True:
                with lock:
                    kill = next(queue, None)
                if kill is None or failures:
                    return
                try:
                    seconds.extend(strike(zygote, transport, size, kill))
                except BaseException as error:
                    notes = getattr(error, "__notes__", [])
                    failures.append("\n".join([str(kill), repr(error), *notes]))
                    return

    threads = [threading.Thread(target=work) for _ in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "\n".join(failures)
    assert stray_segments() <= before
    seconds.sort()
    late = sum(one > 1 for one in seconds)
    print(
        f"{transport}: {len(kills)} kills, {len(seconds)} ranks told, in the median after "
        f"{median(seconds):.3f} s, the last after {seconds[-1]:.3f} s, {late} after more than 1 s"
    )


def seeded() -> int:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return seed


def test_a_rank_that_is_killed_is_named_to_all_others_who_can_go_on():
    rng = random.Random(seed := seeded())
    holds = rng.sample(HOLDS, 5)
    strike_all("shared-memory", RANKS, plan_kills(10, seed, RANKS, holds), lanes=2)


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments_leave_nothing_behind():
    strike_all("shared-memory", RANKS, plan_kills(100, seeded(), RANKS, HOLDS), lanes=3)


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "size"), [("process-group", 3), ("two-level", 4)])
def test_kills_at_random_moments_are_told_over_a_process_group_too(transport, size):
    if transport not in TRANSPORTS:
        pytest.skip(f"there is no transport {transport!r}")
    strike_all(transport, size, plan_kills(20, seeded(), size, ()), lanes=2)


# ---- stopped, not killed


def exchange_until_over(rank: int, size: int, board_path: str) -> int:
    """Frames that were exchanged until the test said that it is over."""
    board = Board(board_path, size)
    channel: Any = open_channel(transport="shared-memory", timeout_s=WORLD_S)
    rng = random.Random(1)
    number = 0
    with contextlib.suppress(Closed):
        while not (channel.is_source and board.has_reached(size, OVER)):
            words = rng.choice((0, 10, 500, 20_000)) if number % 1000 else 300_000
            if channel.is_source:
                channel.publish({"number": number, "words": torch.full((words,), number)})
                time.sleep(rng.choice((0, 0, 0, 0.001)))
            else:
                mapping = channel.receive().mapping
                rng.choice((0, 0, 0, 0.001))  # to draw on alike
                assert mapping["number"] == number
                assert len(mapping["words"]) == words
                assert bool((mapping["words"] == number).all()), "torn"
            number += 1
            board.reach(rank, number)
    channel.close()
    return number


def test_ranks_that_are_stopped_for_a_while_lose_nothing():
    rng = random.Random(seeded())
    with Zygote() as zygote, tempfile.NamedTemporaryFile() as file:
        board = Board(file.name, RANKS)
        with zygote.start(exchange_until_over, RANKS, RANKS, file.name) as world:
            board.await_stage(SOURCE, 100)
            for turn in range(25):
                ranks = [rng.randrange(RANKS)] if rng.random() < 0.8 else range(RANKS)
                for rank in ranks:
                    os.kill(world.pids[rank], signal.SIGSTOP)
                time.sleep(1.2 if turn == 0 else rng.uniform(0, 0.15))
                for rank in ranks:
                    os.kill(world.pids[rank], signal.SIGCONT)
                goal = board.reached(SOURCE) + rng.randrange(100)
                for rank in range(RANKS):
                    board.await_stage(rank, goal)
            board.reach(RANKS, OVER)
            ends = world.join(WORLD_S)
    assert [end.code for end in ends] == [0] * RANKS
    frames = {end.value for end in ends}
    assert len(frames) == 1 and frames.pop() > 500, ends
