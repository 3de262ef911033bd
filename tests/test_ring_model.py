"""The ring's protocol in every interleaving: no frame lost or torn, no wake-up lost, no deadlock.

And every fence, order, second look and wake-up of it is there for a reason: without it, the search
finds what goes wrong, on x86-64 (TSO) or only where memory is ordered more weakly.
"""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import pytest
from ring_model import RingModel, World
from state_search import Verdict, check
from weak_machine import (
    TSO,
    WEAK,
    End,
    Fence,
    Load,
    Machine,
    Segment,
    State,
    Store,
    Use,
)

from onecast.comm import ring_reader, ring_writer, shared_memory

ONE = World(readers=1, slots=(1,), frames=3)
GROWING = World(readers=1, slots=(1, 2, 1), frames=3, lines=2)
LEAVING = World(readers=1, slots=(1,), frames=2, leaving=True)
WRITER_DIES = World(readers=1, slots=(1,), frames=2, dying=frozenset({0}))
READER_DIES = World(readers=1, slots=(2,), frames=3, dying=frozenset({1}))
ONE_OF_TWO_DIES = World(readers=2, slots=(1,), frames=0, dying=frozenset({1}))

WORLDS = {
    "one slot": ONE,
    "two slots": World(readers=1, slots=(2,), frames=5),
    "three slots": World(readers=1, slots=(3,), frames=5),
    "two readers": World(readers=2, slots=(1,), frames=1),
    "larger slots": World(readers=1, slots=(1, 2), frames=4),
    "a table of rings that wraps": GROWING,
    "a reader that leaves": World(readers=1, slots=(1, 2), frames=3, leaving=True),
    "a writer that dies": World(readers=1, slots=(2,), frames=3, dying=frozenset({0})),
    "a reader that dies": READER_DIES,
    "a death while slots grow": World(readers=1, slots=(1, 1), frames=2, dying=frozenset({0, 1})),
    "one of two readers that dies": ONE_OF_TWO_DIES,
}
LARGE_WORLDS = {
    "two readers, one slot": World(readers=2, slots=(1,), frames=2),
    "two readers, two slots": World(readers=2, slots=(2,), frames=3),
    "two readers, larger slots": World(readers=2, slots=(1, 1), frames=1),
    "two readers that leave": World(readers=2, slots=(1,), frames=1, leaving=True),
    "two readers, one dies": World(readers=2, slots=(1,), frames=1, dying=frozenset({1})),
    "two readers, the writer dies": World(readers=2, slots=(1,), frames=1, dying=frozenset({0})),
}

# Step of the protocol: a world in which it shows that it is missing, and what shows.
TORN, ASLEEP = "finds .* where it reads", "a lost wake-up"
NEEDED_EVERYWHERE = {
    "frame before its announcement": (ONE, TORN),
    "frame is read before it is given back": (ONE, TORN),
    "exact room": (ONE, TORN),
    "fence before the writer looks for sleepers": (ONE, ASLEEP),
    "fence after the reader says that it sleeps": (ONE, ASLEEP),
    "fence after the writer says that it waits": (ONE, ASLEEP),
    "fence before the reader looks for the writer": (ONE, ASLEEP),
    "reader says that it sleeps": (ONE, ASLEEP),
    "writer says that it waits": (ONE, ASLEEP),
    "sleep compares": (ONE, ASLEEP),
    "wake after publishing": (ONE, ASLEEP),
    "wake after taking": (ONE, ASLEEP),
    "wake after closing": (ONE, ASLEEP),
    "closed in published": (ONE, ASLEEP),
    "left in taken": (LEAVING, ASLEEP),
    "reader that left is excused": (LEAVING, "but nobody died"),
    "reader looks around": (WRITER_DIES, "no end can be reached"),
    "writer looks around": (READER_DIES, "no end can be reached"),
    "reader looks again at what the dead published": (WRITER_DIES, "lost 0"),
    "wait for the line": (GROWING, TORN),
    "reset of the next line": (GROWING, "a ring that is not there|" + TORN),
}
NEEDED_ONLY_WHERE_WEAK = {
    "release before the announcement": (ONE, TORN),
    "acquire after the announcement": (ONE, TORN),
    "release before the slot is given back": (ONE, TORN),
    "release before giving up": (ONE_OF_TWO_DIES, "told of an orderly end"),
    "acquire before the reason is read": (ONE_OF_TWO_DIES, "told of an orderly end"),
}
# The first: a processor never makes a store before it knows that it comes to it. The next two save
# a system call: the kernel compares once more. The last two: either alone suffices.
NEVER_NEEDED = {
    "acquire before the slot is written": ONE,
    "reader looks again": ONE,
    "writer looks again": ONE,
    "old rings stay until read": GROWING,
    "a new ring waits for the old one": GROWING,
}


def search(world: World, model: str, *without: str) -> Verdict:
    verdict = check(RingModel(world, model, frozenset(without)).machine())
    print(f"{model} {world} without {without or 'nothing'}: {verdict}")
    return verdict


def assert_holds(world: World, model: str, *without: str) -> Verdict:
    verdict = search(world, model, *without)
    assert verdict.broken is None, str(verdict)
    assert verdict.states > 100 and verdict.steps > verdict.states and verdict.outcomes
    return verdict


@pytest.mark.parametrize("model", [TSO, WEAK])
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_every_interleaving_of_a_small_ring_keeps_the_promise(world: World, model: str) -> None:
    assert_holds(world, model)


@pytest.mark.slow
@pytest.mark.parametrize("model", [TSO, WEAK])
@pytest.mark.parametrize("world", LARGE_WORLDS.values(), ids=LARGE_WORLDS)
def test_every_interleaving_with_two_readers_keeps_the_promise(world: World, model: str) -> None:
    assert_holds(world, model)


def test_the_search_comes_to_every_kind_of_end() -> None:
    ends = assert_holds(World(1, (2,), 2, dying=frozenset({0})), TSO).outcomes
    assert {("dead", f"lost 0 at {n}") for n in range(3)} <= ends
    assert {("closed", f"closed at {n}") for n in range(3)} <= ends
    assert ("choose", "sleep") in ends, "an idle writer, a reader asleep for good"
    ends = assert_holds(ONE, TSO).outcomes
    assert ("sleep", "load") in ends, "a reader that never comes back, a writer asleep for good"
    ends = assert_holds(LEAVING, TSO).outcomes
    assert {("all have left", "left"), ("closed", "left")} <= ends
    ends = assert_holds(ONE_OF_TWO_DIES, TSO).outcomes
    assert ("lost 1", "dead", "lost 1 at 0") in ends


@pytest.mark.parametrize("model", [TSO, WEAK])
@pytest.mark.parametrize("step", NEEDED_EVERYWHERE)
def test_without_this_step_the_promise_breaks(step: str, model: str) -> None:
    world, what = NEEDED_EVERYWHERE[step]
    verdict = search(world, model, step)
    assert verdict.broken and re.search(what, verdict.broken), str(verdict)
    assert verdict.trace


@pytest.mark.parametrize("step", NEEDED_ONLY_WHERE_WEAK)
def test_without_this_fence_the_promise_breaks_only_where_memory_is_weakly_ordered(
    step: str,
) -> None:
    world, what = NEEDED_ONLY_WHERE_WEAK[step]
    verdict = search(world, WEAK, step)
    assert verdict.broken and re.search(what, verdict.broken), str(verdict)
    assert_holds(world, TSO, step)


def test_x86_can_leave_out_all_of_those_fences_at_once() -> None:
    for world in (ONE, GROWING, ONE_OF_TWO_DIES):
        assert_holds(world, TSO, *NEEDED_ONLY_WHERE_WEAK, "acquire before the slot is written")


@pytest.mark.parametrize("model", [TSO, WEAK])
@pytest.mark.parametrize("step", NEVER_NEEDED)
def test_without_this_step_the_promise_holds(step: str, model: str) -> None:
    assert_holds(NEVER_NEEDED[step], model, step)


@pytest.mark.parametrize("model", [TSO, WEAK])
def test_old_rings_are_erased_too_early_if_nobody_waits_for_their_readers(model: str) -> None:
    without = ("old rings stay until read", "a new ring waits for the old one")
    verdict = search(GROWING, model, *without)
    assert verdict.broken and re.search(TORN, verdict.broken), str(verdict)


def test_a_counterexample_reads_as_a_story() -> None:
    verdict = search(World(1, (1,), 1), TSO, "fence after the reader says that it sleeps")
    assert verdict.broken == "reader 0 sleeps although there is something: a lost wake-up"
    story = "\n".join(verdict.trace)
    assert "reader 0  sleeps on published while it is 0" in story
    assert "writer    reads sleeper 0: 0" in story
    assert re.search(r"writer    published = \d reaches memory", story)


def test_the_model_names_functions_that_exist() -> None:
    owners = {
        "RingWriter": ring_writer.RingWriter,
        "RingReader": ring_reader.RingReader,
        "SharedMemoryChannel": shared_memory.SharedMemoryChannel,
    }
    named = re.findall(rf"({'|'.join(owners)})\.(\w+)", inspect.getsource(RingModel))
    assert len(named) > 12
    for owner, name in named:
        assert callable(getattr(owners[owner], name, None)) or name == "_room_until", name


# The machine itself, by the classic litmus tests.


def litmus(model: str, *programs: Sequence[Any]) -> set[tuple[str, ...]]:
    """How two processes on the words x and y may end; the accesses of each, one after another."""

    def run(program: Sequence[Any]) -> Segment:
        values = []
        for action in program:
            value = yield action
            if isinstance(action, Load):
                values.append(value)
        return End(str(values))

    def accept(machine: Machine, state: State) -> None:
        pass

    starts = [(run, tuple(program)) for program in programs]
    names = [f"process {i}" for i in range(len(programs))]
    verdict = check(Machine(model, ["x", "y"], (0, 0), names, starts, accept))
    assert verdict.broken is None
    return verdict.outcomes


X, Y = 0, 1


@pytest.mark.parametrize("model", [TSO, WEAK])
def test_a_load_overtakes_an_own_store_unless_a_full_fence_stands_between(model: str) -> None:
    left, right = (Store(X, 1), Load(Y)), (Store(Y, 1), Load(X))
    assert ("[0]", "[0]") in litmus(model, left, right)
    for kind, both_zero in (("full", False), ("release", True), ("acquire", True)):
        fenced = [(store, Fence(kind), load) for store, load in (left, right)]
        assert (("[0]", "[0]") in litmus(model, *fenced)) is both_zero


def test_a_message_may_be_seen_before_its_content_only_where_memory_is_weakly_ordered() -> None:
    early = Load(Y, ahead=(X,))
    for model, release, acquire, torn in (
        (TSO, False, False, False),
        (WEAK, False, False, True),
        (WEAK, True, False, True),
        (WEAK, False, True, True),
        (WEAK, True, True, False),
    ):
        send = (Store(X, 1), *[Fence("release")] * release, Store(Y, 1))
        receive = (
            Load(Y) if acquire else early,
            *[Fence("acquire")] * acquire,
            Load(X),
        )
        assert (("[]", "[1, 0]") in litmus(model, send, receive)) is torn


@pytest.mark.parametrize("model", [TSO, WEAK])
def test_a_process_reads_its_own_stores_and_no_value_goes_back(model: str) -> None:
    assert litmus(model, (Store(X, 1), Store(X, 2), Load(X))) == {("[2]",)}
    ends = litmus(model, (Store(X, 1), Store(X, 2)), (Load(X), Load(X)))
    assert {end[1] for end in ends if end[1][1] > end[1][4]} == set()


def test_a_late_load_waits_for_no_store_but_for_a_release() -> None:
    """As in load buffering: what was read may come from after an own later store."""
    late = (Use(X, 0), Store(Y, 1))
    answer = (Load(Y), Store(X, 1))

    def breaks(model: str, *fence: Fence) -> bool:
        def first() -> Segment:
            yield late[0]
            yield from fence
            yield late[1]
            return End("")

        def second() -> Segment:
            if (yield answer[0]):
                yield answer[1]
            return End("")

        starts = [(first,), (second,)]
        machine = Machine(model, ["x", "y"], (0, 0), ["a", "b"], starts, lambda *_: None)
        return check(machine).broken is not None

    assert breaks(WEAK)
    assert not breaks(WEAK, Fence("release"))
    assert not breaks(TSO)
