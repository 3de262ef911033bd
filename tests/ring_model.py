"""The protocol of the frame ring, small enough to look at every interleaving of it.

Each segment below stands for the function of `onecast.comm.ring_writer` or `ring_reader` named in
its docstring, and makes the same accesses in the same order (`test_ring_trace` holds the code to
it); left out are the signs of life and what no other process sees. A frame is two words that both
hold its position + 1, so that a torn, a stale and an erased frame all show. Of a ring's line in the
table, offset, slot bytes and slots are one word, the ring's number. Spinning is no step of its own:
it is a reader that looks late. Counters do not wrap here, and the writer looks at one sleeper after
the other instead of at eight at once.

    published << 1 | closed   readers sleep on it      taken by reader i   the writer sleeps on it
    writer waits   lost       sleeper i                rings 0...: their slots, of two words each

`without` names steps to leave out, or to do otherwise: the search then finds what they are for.
"""

from dataclasses import dataclass, field
from typing import Any

from weak_machine import (
    ANYTHING,
    TSO,
    Action,
    Broken,
    Choose,
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

NEVER = LEFT = 99
WRITER = 0  # processes: the writer, then the readers


@dataclass(frozen=True)
class World:
    """How large, and what may happen."""

    readers: int
    slots: tuple[int, ...]  # of each ring; the writer moves on to the next one when it likes
    frames: int
    leaving: bool = False  # readers may leave in order
    dying: frozenset[int] = frozenset()  # processes that may die
    lines: int = 9  # of the table of rings


@dataclass(frozen=True)
class Words:
    """Where what lies."""

    names: list[str] = field(default_factory=list)
    values: list[int] = field(default_factory=list)

    def add(self, name: str, value: int = 0) -> int:
        self.names.append(name)
        self.values.append(value)
        return len(self.names) - 1


class RingModel:
    """The programs of the writer and of its readers, and what they promise."""

    def __init__(
        self, world: World, model: str = TSO, without: frozenset[str] = frozenset()
    ) -> None:
        self.world = world
        self.model = model
        self.without = without
        words = Words()
        self.published = words.add("published")
        self.waits = words.add("writer waits")
        self.lost = words.add("lost")
        self.closed = words.add("closed") if self.is_off("closed in published") else -1
        readers = range(world.readers)
        self.sleepers = [words.add(f"sleeper {i}") for i in readers]
        self.takens = [words.add(f"taken {i}") for i in readers]
        self.lefts = [words.add(f"left {i}") for i in readers if self.is_off("left in taken")]
        lines = range(min(world.lines, len(world.slots) + 1))
        self.table = [
            (words.add(f"base in line {n}", 0 if n == 0 else NEVER), words.add(f"ring in line {n}"))
            for n in lines
        ]
        self.slots = [
            [
                (words.add(f"ring {r} slot {s} front"), words.add(f"ring {r} slot {s} back"))
                for s in range(count)
            ]
            for r, count in enumerate(world.slots)
        ]
        self.words = words
        self.readers = tuple(range(1, 1 + world.readers))  # processes

    def machine(self) -> Machine:
        world = self.world
        return Machine(
            model=self.model,
            words=self.words.names,
            memory=tuple(self.words.values),
            names=["writer", *(f"reader {i}" for i in range(world.readers))],
            starts=[
                (self.write, 0, (0,), 0, 0),
                *((self.next, i, 0, -1, 0, 0) for i in range(world.readers)),
            ],
            judge=self.judge,
            mortal=world.dying,
        )

    def is_off(self, step: str) -> bool:
        return step in self.without

    def fence(self, kind: str, name: str) -> list[Action]:
        return [] if self.is_off(name) else [Fence(kind)]

    def sleep(self, word: int, expected: int) -> Sleep:
        return Sleep(word, ANYTHING if self.is_off("sleep compares") else expected)

    def line(self, generation: int) -> tuple[int, int]:
        """Words of a ring's line: base, ring."""
        return self.table[generation % len(self.table)]

    def slot(self, ring: int, base: int, position: int) -> tuple[int, int]:
        slots = self.slots[ring]
        return slots[(position - base) % len(slots)]

    # The writer. `bases` of all rings so far, `oldest` of those not given back, `room` as
    # RingWriter._room_until.

    def write(self, position: int, bases: tuple[int, ...], oldest: int, room: int) -> Segment:
        """What the caller does next: RingWriter.reserve, publish, close, or nothing more."""
        options = ["close"]
        if position < self.world.frames:
            options.append("publish")
            if len(bases) < len(self.world.slots):
                options.append("resize")
        if self.world.dying or self.world.leaving:
            options.append("look")
        match (yield Choose(tuple(options))):
            case "publish" if position >= room:
                return self.make_room, position, bases, oldest
            case "publish":
                return self.publish, position, bases, oldest, room
            case "resize":
                return self.resize, position, bases, oldest
            case "look":
                return (
                    self.look,
                    self.readers,
                    (self.write, position, bases, oldest, room),
                    position,
                )
        return self.close, position, End("closed")

    def resize(self, position: int, bases: tuple[int, ...], oldest: int) -> Segment:
        """RingWriter._resize."""
        number, lines = len(bases), len(self.table)
        go_on = (self.write_line, position, bases, oldest)
        if number >= lines - 1 and not self.is_off("wait for the line"):
            return self.await_taken, position, bases[number - lines + 1] + 1, go_on
        return (*go_on, 0)
        yield

    def write_line(
        self, position: int, bases: tuple[int, ...], oldest: int, slowest: int
    ) -> Segment:
        """RingWriter._resize, after its wait."""
        number = len(bases)
        if not self.is_off("reset of the next line"):
            yield Store(self.line(number + 1)[0], NEVER)
        base, ring = self.line(number)
        yield Store(ring, number)
        yield Store(base, position)
        return self.make_room, position, (*bases, position), oldest

    def make_room(self, position: int, bases: tuple[int, ...], oldest: int) -> Segment:
        """RingWriter._make_room, up to its wait."""
        base, slots = bases[-1], self.world.slots[len(bases) - 1]
        if self.is_off("exact room"):
            slots += 1
        target = max(position - slots, base - 1) + 1
        if position - slots < base and self.is_off("a new ring waits for the old one"):
            target = 0
        return self.await_taken, position, target, (self.have_room, position, bases, oldest)
        yield

    def have_room(
        self, position: int, bases: tuple[int, ...], oldest: int, slowest: int
    ) -> Segment:
        """RingWriter._make_room, after its wait."""
        slots = self.world.slots[len(bases) - 1] + self.is_off("exact room")
        room = max(slowest, bases[-1]) + slots
        yield from self.fence("acquire", "acquire before the slot is written")
        if self.is_off("old rings stay until read"):
            slowest = position
        while oldest < len(bases) - 1 and slowest >= bases[oldest + 1]:
            for front, back in self.slots[oldest]:
                yield Store(front, 0)
                yield Store(back, 0)
            oldest += 1
        return self.publish, position, bases, oldest, room

    def await_taken(self, position: int, target: int, go_on: tuple[Any, ...]) -> Segment:
        """RingWriter._await_taken, once around. `position` is the writer's."""
        taken = []
        for index, word in enumerate(self.takens):
            if self.lefts and (yield Load(self.lefts[index])):
                taken.append(LEFT)
            else:
                taken.append((yield Load(word)))
        slowest = min(taken)
        if slowest >= target:
            return (*go_on, slowest)
        return self.sleep_for_room, position, target, go_on, taken.index(slowest), slowest

    def sleep_for_room(
        self, position: int, target: int, go_on: tuple[Any, ...], index: int, slowest: int
    ) -> Segment:
        """RingWriter._await_taken, the sleep at the end of its loop."""
        word = self.takens[index]
        again = (self.await_taken, position, target, go_on)
        if not self.is_off("writer says that it waits"):
            yield Store(self.waits, 1)
        yield from self.fence("full", "fence after the writer says that it waits")
        if not self.is_off("writer looks again"):
            if self.lefts and (yield Load(self.lefts[index])):
                return again
            if (yield Load(word)) != slowest:
                yield Store(self.waits, 0)
                return again
        why = yield self.sleep(word, slowest)
        yield Store(self.waits, 0)
        if why == "slice" and not self.is_off("writer looks around"):
            return self.look, self.readers, again, position
        return again

    def look(self, watched: tuple[int, ...], go_on: tuple[Any, ...], position: int) -> Segment:
        """RingWriter._look; then what SharedMemoryChannel._end does of it."""
        gone = yield Gone(watched)
        if gone is not None:
            left = yield Load((self.lefts or self.takens)[gone - 1])
            if left != LEFT or self.is_off("reader that left is excused"):
                return self.abandon, position, gone
            return self.look, tuple(i for i in watched if i != gone), go_on, position
        for word in self.lefts or self.takens:
            if (yield Load(word)) != LEFT:
                return go_on
        return End("all have left")

    def publish(self, position: int, bases: tuple[int, ...], oldest: int, room: int) -> Segment:
        """What is written to the reserved memory, then RingWriter.publish."""
        ring = len(bases) - 1
        announce = Store(self.published, position + 1 << 1)
        if self.is_off("frame before its announcement"):
            yield announce
        for word in self.slot(ring, bases[-1], position):
            yield Store(word, position + 1)
        yield from self.fence("release", "release before the announcement")
        if not self.is_off("frame before its announcement"):
            yield announce
        if not self.is_off("wake after publishing"):
            yield from self.wake_readers()
        return self.write, position + 1, bases, oldest, room

    def wake_readers(self) -> Segment:
        """RingWriter._wake_readers."""
        yield from self.fence("full", "fence before the writer looks for sleepers")
        for word in self.sleepers:
            if (yield Load(word)):
                yield Wake(self.published)
                return

    def close(self, position: int, end: End) -> Segment:
        """RingWriter.close."""
        if self.closed >= 0:
            yield Store(self.closed, 1)
        else:
            yield Store(self.published, position << 1 | 1)
        if not self.is_off("wake after closing"):
            yield from self.wake_readers()
        return end

    def abandon(self, position: int, lost: int) -> Segment:
        """RingWriter.abandon."""
        yield Store(self.lost, lost)
        yield from self.fence("release", "release before giving up")
        return self.close, position, End(f"lost {lost}")

    # Reader `me`, at `position`; `generation`, `base` and `ring` are of its current ring.

    def next(self, me: int, position: int, generation: int, base: int, ring: int) -> Segment:
        """What the caller does next; RingReader.next up to a wait."""
        here = (me, position, generation, base, ring)
        if self.world.leaving and (yield Choose(("next", "leave"))) == "leave":
            return self.leave, me
        published = yield Load(self.published, self.ahead(*here), optional=True)
        if published >= position + 1 << 1:
            return self.take, *here
        return self.wait, *here

    def ahead(
        self, me: int, position: int, generation: int, base: int, ring: int
    ) -> tuple[int, ...]:
        """What the processor may read before `published` if no fence forbids it."""
        words: tuple[int, ...] = ()
        if self.is_off("acquire after the announcement"):
            words += (*self.slot(ring, base, position), *self.line(generation + 1))
        if self.is_off("acquire before the reason is read"):
            words += (self.lost,)
        return words

    def wait(self, me: int, position: int, generation: int, base: int, ring: int) -> Segment:
        """RingReader._await, once around, and _sleep."""
        here = (me, position, generation, base, ring)
        idle = position << 1
        if not self.is_off("reader says that it sleeps"):
            yield Store(self.sleepers[me], 1)
        yield from self.fence("full", "fence after the reader says that it sleeps")
        why = "woken"
        if self.closed >= 0 and (yield Load(self.closed)):
            return self.finish, *here
        if self.is_off("reader looks again") or (yield Load(self.published)) == idle:
            why = yield self.sleep(self.published, idle)
        yield Store(self.sleepers[me], 0)
        published = yield Load(self.published, self.ahead(*here))
        if published > idle | 1:
            return self.take, *here
        if published != idle or (self.closed >= 0 and (yield Load(self.closed))):
            return self.finish, *here
        if why == "slice" and not self.is_off("reader looks around"):
            watched = (WRITER, *(i for i in self.readers if i != 1 + me))
            return self.look_around, watched, *here
        return self.wait, *here

    def look_around(
        self,
        watched: tuple[int, ...],
        me: int,
        position: int,
        generation: int,
        base: int,
        ring: int,
    ) -> Segment:
        """RingReader._look."""
        here = (me, position, generation, base, ring)
        gone = yield Gone(watched)
        if gone is None:
            return self.wait, *here
        if not self.is_off("reader looks again at what the dead published"):
            if (yield Load(self.published)) != position << 1:
                return self.wait, *here
        if gone == WRITER or (yield Load(self.takens[gone - 1])) != LEFT:
            return End(f"lost {gone} at {position}")
        return self.look_around, tuple(i for i in watched if i != gone), *here

    def finish(self, me: int, position: int, generation: int, base: int, ring: int) -> Segment:
        """RingReader._end."""
        yield from self.fence("acquire", "acquire before the reason is read")
        lost = yield Load(self.lost)
        return End(f"lost {lost} at {position}" if lost else f"closed at {position}")

    def take(self, me: int, position: int, generation: int, base: int, ring: int) -> Segment:
        """RingReader.next after a wait."""
        yield from self.fence("acquire", "acquire after the announcement")
        return self.follow, me, position, generation, base, ring

    def follow(self, me: int, position: int, generation: int, base: int, ring: int) -> Segment:
        """RingReader.next, its last lines, and _follow; then the caller has the frame."""
        if position >= (yield Load(self.line(generation + 1)[0])):
            generation += 1
            if generation == len(self.world.slots):
                raise Broken(f"reader {me} follows to a ring that is not there")
            while position >= (yield Load(self.line(generation + 1)[0])):
                generation += 1
                if generation == len(self.world.slots):
                    raise Broken(f"reader {me} follows to a ring that is not there")
            own_base, own_ring = self.line(generation)
            base = yield Load(own_base)
            ring = yield Load(own_ring)
        if self.is_off("frame is read before it is given back"):
            yield Store(self.takens[me], position + 1)
        for word in self.slot(ring, base, position):
            yield Use(word, position + 1)
        return self.hold, me, position, generation, base, ring

    def hold(self, me: int, position: int, generation: int, base: int, ring: int) -> Segment:
        """RingReader.release."""
        yield from self.fence("release", "release before the slot is given back")
        yield Store(self.takens[me], position + 1)
        yield from self.wake_writer(me)
        return self.next, me, position + 1, generation, base, ring

    def leave(self, me: int) -> Segment:
        """RingReader.leave."""
        yield Store((self.lefts or self.takens)[me], LEFT)
        yield from self.wake_writer(me)
        return End("left")

    def wake_writer(self, me: int) -> Segment:
        """RingReader._tell_taken, after its store."""
        yield from self.fence("full", "fence before the reader looks for the writer")
        if (yield Load(self.waits)) and not self.is_off("wake after taking"):
            yield Wake(self.takens[me])

    # The promise.

    def judge(self, machine: Machine, state: State) -> None:
        """Nothing goes on any more: is that right?"""
        outcomes = [machine.outcome(process) for process in state.processes]
        memory = state.memory
        published, closed = memory[self.published] >> 1, memory[self.published] & 1
        dead = outcomes.index("dead") if "dead" in outcomes else None
        taken = [
            LEFT if self.lefts and memory[self.lefts[i]] else memory[word]
            for i, word in enumerate(self.takens)
        ]
        for index, (process, outcome) in enumerate(zip(state.processes, outcomes, strict=True)):
            name = machine.names[index]
            if outcome == "sleep":
                arguments = machine.arguments(process)
                if index == WRITER and min(taken) >= arguments[1]:
                    raise Broken("the writer sleeps although there is room: a lost wake-up")
                is_over = closed or (self.closed >= 0 and memory[self.closed])
                if index != WRITER and (published > arguments[1] or is_over):
                    raise Broken(f"{name} sleeps although there is something: a lost wake-up")
            elif outcome.startswith("closed at") and outcome != f"closed at {published}":
                raise Broken(f"{name} {outcome} although {published} frames were published")
            elif outcome.startswith("closed at") and memory[self.lost]:
                raise Broken(f"{name} is told of an orderly end, but there was a death")
            elif outcome.startswith("lost") and dead is None:
                raise Broken(f"{name} {outcome}, but nobody died")
            elif outcome.startswith("lost") and not outcome.startswith(f"lost {dead}"):
                raise Broken(f"{name} {outcome}, but it was {dead} that died")
            elif outcome.startswith("lost") and dead == WRITER:
                if index != WRITER and outcome != f"lost 0 at {published}":
                    raise Broken(f"{name} {outcome}, but {published} frames were published")
