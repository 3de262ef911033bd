"""The meetings of an all-reduce in every interleaving: nothing torn, no wake-up lost, no deadlock.

And every fence, order, second look and wake-up is there for a reason: without it, the search finds
what goes wrong, on x86-64 (TSO) or only where memory is ordered more weakly.

Each segment stands for the functions of `onecast.comm.meeting` named in its docstring and makes the
same accesses in the same order; left out are signs of life and the reasons for leaving. What a rank
lays down for the others is one word, the number of its operation + 1, so that a stale and an
overwritten one both show.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from state_search import Verdict, check
from weak_machine import (
    ANYTHING,
    TSO,
    WEAK,
    Action,
    Broken,
    End,
    Fence,
    Gone,
    Load,
    Machine,
    Segment,
    Sleep,
    State,
    Store,
    Use,
    Wake,
)

from onecast.comm.meeting import Meeting, control_bytes
from onecast.comm.peers import Peers
from onecast.comm.segment import Segment as Memory


@dataclass(frozen=True)
class World:
    ranks: int
    operations: int
    dying: frozenset[int] = frozenset()


class MeetingModel:
    """The programs of the ranks, and what they promise. `without`: steps that are left out."""

    def __init__(self, world: World, model: str, without: frozenset[str] = frozenset()) -> None:
        self.world = world
        self.model = model
        self.without = without
        ranks = range(world.ranks)
        names = [f"arrivals of {r}" for r in ranks] + [f"sleeper {r}" for r in ranks]
        self.arrivals = list(ranks)
        self.sleepers = [world.ranks + r for r in ranks]
        turns = 1 if self.is_off("two turns") else 2
        self.slots = [[len(names) + r * turns + turn % turns for turn in range(2)] for r in ranks]
        names += [f"slot of {r}, turn {turn}" for r in ranks for turn in range(turns)]
        self.names = names

    def machine(self) -> Machine:
        ranks = range(self.world.ranks)
        return Machine(
            model=self.model,
            words=self.names,
            memory=(0,) * len(self.names),
            names=[f"rank {r}" for r in ranks],
            starts=[(self.lay_down, r, 0) for r in ranks],
            judge=self.judge,
            mortal=self.world.dying,
        )

    def is_off(self, step: str) -> bool:
        return step in self.without

    def fence(self, kind: str, name: str) -> list[Action]:
        return [] if self.is_off(name) else [Fence(kind)]

    def others(self, rank: int) -> Iterator[int]:
        return (r for r in range(self.world.ranks) if r != rank)

    def lay_down(self, rank: int, operation: int) -> Segment:
        """SharedMemoryAllReduce._sum up to Meeting.arrive, without its end."""
        if operation == self.world.operations:
            return End("done")
        slot = Store(self.slots[rank][operation % 2], operation + 1)
        arrival = Store(self.arrivals[rank], operation + 1 << 1)
        if self.is_off("slot before arrival"):
            slot, arrival = arrival, slot
        yield slot
        yield from self.fence("release", "release before the arrival")
        yield arrival
        return self.wake_others, rank, operation

    def wake_others(self, rank: int, operation: int) -> Segment:
        """Meeting._wake_others."""
        yield from self.fence("full", "fence before the sleepers are looked at")
        for other in self.others(rank):
            if (yield Load(self.sleepers[other])):
                if not self.is_off("wake"):
                    yield Wake(self.arrivals[rank])
                break
        return self.await_all, rank, operation

    def await_all(self, rank: int, operation: int) -> Segment:
        """Meeting.await_all, and Meeting._await once around, up to its sleep."""
        want = operation + 1 << 1
        for other in self.others(rank):
            slots = tuple(self.slots[r][operation % 2] for r in self.others(rank))
            if (yield Load(self.arrivals[other], ahead=slots)) < want:
                return self.sleep, rank, operation
        return self.add_up, rank, operation

    def sleep(self, rank: int, operation: int) -> Segment:
        """Meeting._sleep."""
        want = operation + 1 << 1
        again = self.await_all, rank, operation
        if not self.is_off("says that it sleeps"):
            yield Store(self.sleepers[rank], 1)
        yield from self.fence("full", "fence after it says that it sleeps")
        why = "woken"
        for other in self.others(rank):
            found = yield Load(self.arrivals[other])
            if found < want:
                expected = ANYTHING if self.is_off("sleep compares") else found
                why = yield Sleep(self.arrivals[other], expected)
                break
        yield Store(self.sleepers[rank], 0)
        if why == "slice" and not self.is_off("looks around"):
            return self.look, rank, operation
        return again

    def look(self, rank: int, operation: int) -> Segment:
        """Meeting._look."""
        want = operation + 1 << 1
        gone = yield Gone(tuple(self.others(rank)))
        if gone is not None:
            missing = False
            for other in self.others(rank):
                missing |= (yield Load(self.arrivals[other])) < want
            if missing or self.is_off("looks again at who arrived"):
                return End(f"lost {gone}")
        return self.await_all, rank, operation

    def add_up(self, rank: int, operation: int) -> Segment:
        """Meeting.await_all, its end; then SumSlots.add_up."""
        yield from self.fence("acquire", "acquire before the slots are read")
        for other in self.others(rank):
            yield Use(self.slots[other][operation % 2], operation + 1)
        return self.lay_down, rank, operation + 1

    def judge(self, machine: Machine, state: State) -> None:
        ends = [machine.outcome(process) for process in state.processes]
        dead = [rank for rank, end in enumerate(ends) if end == "dead"]
        for rank, end in enumerate(ends):
            if end.startswith("lost"):
                gave_up = [r for r in self.others(rank) if ends[r].startswith(("dead", "lost"))]
                if int(end[5:]) not in gave_up:
                    raise Broken(f"rank {rank} has {end}: {ends}")
            elif end != "dead" and end != "done":
                raise Broken(f"a lost wake-up: {ends}")
        if not dead and set(ends) != {"done"}:
            raise Broken(f"nobody died: {ends}")


TWO = World(2, 3)
DYING = World(2, 2, frozenset({1}))
WORLDS = [
    pytest.param(World(2, 4), TSO, id="two ranks, TSO"),
    pytest.param(World(2, 4), WEAK, id="two ranks, WEAK"),
    pytest.param(DYING, TSO, id="a rank that dies, TSO"),
    pytest.param(DYING, WEAK, id="a rank that dies, WEAK"),
    pytest.param(World(3, 2), TSO, id="three ranks, TSO"),
    pytest.param(World(3, 1), WEAK, id="three ranks, WEAK", marks=pytest.mark.slow),
    pytest.param(World(3, 1, frozenset({2})), TSO, id="one of three dies, TSO"),
    pytest.param(
        World(3, 1, frozenset({2})), WEAK, id="one of three dies, WEAK", marks=pytest.mark.slow
    ),
]
TORN, ASLEEP = "finds .* where it reads", "lost wake-up|no end can be reached"
NEEDED = {
    ("slot before arrival", TSO): (TWO, TORN),
    ("two turns", TSO): (TWO, TORN),
    ("fence before the sleepers are looked at", TSO): (TWO, ASLEEP),
    ("fence after it says that it sleeps", TSO): (TWO, ASLEEP),
    ("says that it sleeps", TSO): (TWO, ASLEEP),
    ("sleep compares", TSO): (TWO, ASLEEP),
    ("wake", TSO): (TWO, ASLEEP),
    ("looks around", TSO): (DYING, ASLEEP),
    ("release before the arrival", WEAK): (TWO, TORN),
    ("acquire before the slots are read", WEAK): (TWO, TORN),
}


def verdict_on(world: World, model: str, *without: str) -> Verdict:
    return check(MeetingModel(world, model, frozenset(without)).machine())


@pytest.mark.parametrize(("world", "model"), WORLDS)
def test_every_interleaving_keeps_the_promise(world: World, model: str) -> None:
    verdict = verdict_on(world, model)
    assert verdict.broken is None, str(verdict)
    assert verdict.states > 100


@pytest.mark.parametrize(("step", "model"), NEEDED)
def test_without_any_of_its_steps_it_breaks(step: str, model: str) -> None:
    world, shows = NEEDED[step, model]
    verdict = verdict_on(world, model, step)
    assert verdict.broken is not None, f"{step} is not needed"
    assert re.search(shows, verdict.broken), str(verdict)


@pytest.mark.parametrize("step", [step for step, model in NEEDED if model == WEAK])
def test_x86_needs_no_fence_but_the_two_for_sleepers(step: str) -> None:
    assert verdict_on(TWO, TSO, step).broken is None


# ---- the code makes the accesses of the model, in the same order


class Recorder:
    """Stands for a rank's view of the words and bytes, its fence and its futexes."""

    def __init__(self, words: Any, names: dict[int, str], log: list[str]) -> None:
        self.log = log
        self.words = words
        self.names = names

    def __getitem__(self, word: int) -> int:
        self._note("load", word)
        return cast(int, self.words[word])

    def __setitem__(self, word: int, value: int) -> None:
        self._note("store", word)
        self.words[word] = value

    def _note(self, what: str, word: int) -> None:
        if word in self.names:  # signs of life are not
            self.log.append(f"{what} {self.names[word]}")


class RecordedPair:
    """Two ranks in one process: what rank 0 does is written down, as on a weakly ordered CPU."""

    def __init__(self) -> None:
        segment = Memory.create(control_bytes(2))
        self.first, self.second = (
            Meeting(segment, [0, 1], cast(Peers, SimpleNamespace(own=own, gone=lambda: None)), 0.0)
            for own in (SimpleNamespace(rank=0), SimpleNamespace(rank=1))
        )
        self.log: list[str] = []
        self.while_asleep: Callable[[], object] = lambda: None
        own, other = self.first._lines
        first: Any = self.first
        sleepers = first._sleepers[0]
        names = {own: "arrivals of 0", other: "arrivals of 1", sleepers: "sleepers"}
        first._words = Recorder(first._words, names, self.log)
        first._bytes = Recorder(first._bytes, {first._sleeper: "sleeper 0"}, self.log)
        first._fence, first._weak = lambda: self.log.append("fence"), True
        first._futexes = {
            line: SimpleNamespace(wait=self._wait, wake=lambda: self.log.append("wake"))
            for line in first._lines
        }

    def _wait(self, found: int, timeout_ns: int) -> None:
        assert timeout_ns > 0
        self.log.append(f"sleep while arrivals of 1 are {found}")
        self.while_asleep()

    def lay_down_and_arrive(self) -> None:
        self.log.append("store slot of 0")
        self.first.arrive()

    def add_up(self) -> None:
        self.first.await_all(5.0)
        self.log.append("load slot of 1")


def test_a_rank_makes_the_accesses_of_its_model_in_the_same_order() -> None:
    pair = RecordedPair()
    pair.second.arrive()
    pair.lay_down_and_arrive()
    pair.add_up()
    arrives = ["store slot of 0", "fence", "store arrivals of 0", "fence", "load sleepers"]
    assert pair.log == [*arrives, "load arrivals of 1", "fence", "load slot of 1"]


def test_a_rank_that_sleeps_makes_the_accesses_of_its_model_in_the_same_order() -> None:
    pair = RecordedPair()
    pair.lay_down_and_arrive()
    pair.log.clear()
    pair.while_asleep = pair.second.arrive
    pair.add_up()
    looked = ["load arrivals of 1"]
    says = ["store sleeper 0", "fence"]
    asleep = ["sleep while arrivals of 1 are 0", "store sleeper 0"]
    assert [entry for entry, before in pairwise([*pair.log, ""]) if entry != before] == [
        *looked,
        *says,
        *looked,
        *asleep,
        *looked,
        "fence",
        "load slot of 1",
    ]
    pair.log.clear()
    sleeper = pair.second._sleeper
    pair.second._bytes[sleeper] = 1
    pair.lay_down_and_arrive()
    assert pair.log[-3:] == ["fence", "load sleepers", "wake"]
