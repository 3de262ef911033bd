"""A machine that reorders memory accesses, and a few small processes on it.

Owns what may happen next in any state (`state_search` looks at all states); knows nothing of any
protocol. A process is a chain of segments:
generator functions that yield what they do to shared memory, receive what came of it, and return
the next segment as `(function, *arguments)`, or `End(outcome)`. All that a process remembers from
one segment to the next is in the arguments.

The machine has words, each written by whole stores, and two memory models:

    TSO   stores wait in a buffer and reach memory in order; loads do not wait for them (x86-64)
    WEAK  besides, stores to different words reach memory in any order, and loads may be done
          early (`Load(ahead=...)`) or late (`Use`) (more than what arm64 does to these programs)

A process that sleeps on a word (futex) goes on when somebody wakes it. It may wake for no reason
as well, but nothing may depend on that: from every state that can be reached, an end must be
reachable without it. Only after a death sleeps end by themselves, as they do when sleeping in
slices to look after the others. A process that dies leaves any part of its latest stores undone.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

TSO, WEAK = "TSO", "WEAK"


class Load(NamedTuple):
    """Gives the value of a word. `ahead`: words whose later loads may be done before this one.

    `optional`: as with Choose, the process may never come to it.
    """

    word: int
    ahead: tuple[int, ...] = ()
    optional: bool = False


class Use(NamedTuple):
    """A load whose value is looked at later: it may be done late. It must then be `expected`."""

    word: int
    expected: int


class Store(NamedTuple):
    word: int
    value: int


class Fence(NamedTuple):
    """Release: earlier accesses before later stores. Acquire: earlier loads before later accesses.

    Full: everything before everything.
    """

    kind: str


class Sleep(NamedTuple):
    """FUTEX_WAIT: sleep if the word's value is `expected`, one atomic step.

    Gives "woken", or "slice" if nobody woke it.
    """

    word: int
    expected: int


class Wake(NamedTuple):
    """FUTEX_WAKE: all that sleep on the word."""

    word: int


class Gone(NamedTuple):
    """Gives the first of some processes that has ended or died, or None (poll of pidfds).

    All that it has stored is in memory then.
    """

    processes: tuple[int, ...]


class Choose(NamedTuple):
    """Gives any of the options; or the process pauses here, for good."""

    options: tuple[Any, ...]


class End(NamedTuple):
    outcome: str


Action = Load | Use | Store | Fence | Sleep | Wake | Gone | Choose | End
Segment = Generator[Action, Any, Any]
RUNNING, ASLEEP, DEAD = range(3)
ANYTHING = -1  # what a sleep may expect that does not compare
FENCE = (-1, 0)  # in a store buffer: what comes after it waits for what comes before it


class Process(NamedTuple):
    node: int  # where in its program
    buffer: tuple[tuple[int, int], ...] = ()  # stores on their way to memory: word, value
    late: tuple[tuple[int, int], ...] = ()  # loads not done yet: word, expected value
    early: tuple[tuple[int, int], ...] = ()  # loads done already: word, value
    status: int = RUNNING


class State(NamedTuple):
    memory: tuple[int, ...]
    processes: tuple[Process, ...]


class Broken(Exception):
    """Raised by a process, or by who judges the end: what was promised does not hold."""


@dataclass
class Machine:
    """Words, processes and the promise.

    `judge(machine, state)` raises Broken if a state in which nothing goes on is no proper end.
    """

    model: str
    words: list[str]  # their names
    memory: tuple[int, ...]  # their first values
    names: list[str]  # of the processes
    starts: Sequence[tuple[Any, ...]]  # their first segments
    judge: Callable[["Machine", State], None]
    mortal: frozenset[int] = frozenset()  # processes that may die; one does at most

    def __post_init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], int] = {}  # segment, what it received: node
        self._keys: list[tuple[Any, ...]] = []
        self._actions: list[Action] = []
        self._next: dict[tuple[int, Any], int] = {}

    # Programs: a node is a segment and what it has received so far.

    def _node(self, segment: tuple[Any, ...], received: tuple[Any, ...]) -> int:
        key = (segment, received)
        node = self._nodes.get(key)
        if node is None:
            running = segment[0](*segment[1:])
            try:
                action = next(running)
                for result in received:
                    action = running.send(result)
            except StopIteration as stop:
                if isinstance(stop.value, End):
                    action = stop.value
                else:
                    return self._node(stop.value, ())
            running.close()
            node = len(self._actions)
            self._nodes[key] = node
            self._keys.append(key)
            self._actions.append(action)
        return node

    def _after(self, node: int, result: Any = None) -> int:
        following = self._next.get((node, result))
        if following is None:
            segment, received = self._keys[node]
            following = self._node(segment, (*received, result))
            self._next[node, result] = following
        return following

    def action(self, process: Process) -> Action:
        return self._actions[process.node]

    def arguments(self, process: Process) -> tuple[Any, ...]:
        """Of the segment that the process is in."""
        return tuple(self._keys[process.node][0][1:])

    # Steps.

    def _settle(self, process: Process) -> Process:
        """Go on to the next thing that others could notice or that has to wait for something."""
        node, buffer, late, early, status = process
        if status == DEAD:
            return process
        while True:
            action = self._actions[node]
            if isinstance(action, Store):
                buffer = (*buffer, tuple(action))
            elif isinstance(action, Use) and self.model == WEAK:
                late = (*late, tuple(action))
            elif isinstance(action, Fence):
                if action.kind == "full":
                    if buffer or late:
                        break
                    early = ()
                elif self.model == WEAK:
                    if late:
                        break
                    if action.kind == "acquire":
                        early = ()
                    elif buffer and buffer[-1] != FENCE:
                        buffer = (*buffer, FENCE)
            else:
                break
            node = self._after(node)
        return Process(node, buffer, late, early, status)

    def start(self) -> State:
        nodes = [self._node(start, ()) for start in self.starts]
        return State(self.memory, tuple(self._settle(Process(node)) for node in nodes))

    def steps(self, state: State) -> Iterator[tuple[int, str, State]]:
        """All that may happen next: process, what, the state afterwards.

        `what` begins with "(" if nothing may depend on it.
        """
        memory, processes = state
        any_dead = any(process.status == DEAD for process in processes)
        for index, process in enumerate(processes):
            yield from self._drain(state, index, process)
            if process.status == DEAD:
                continue
            for word, expected in process.late:
                value = dict(process.early).get(word, memory[word])
                if value != expected:
                    raise Broken(self._torn(index, word, value, expected))
                rest = tuple(item for item in process.late if item[0] != word)
                yield self._step(state, index, f"reads {self.words[word]}", late=rest)
            action = self._actions[process.node]
            if index in self.mortal and not any_dead and not isinstance(action, End):
                for kept in range(len(process.buffer) + 1):
                    dead = process._replace(
                        buffer=process.buffer[:kept], late=(), early=(), status=DEAD
                    )
                    yield index, "(dies)", self._with(state, index, dead)
            if process.status == ASLEEP:
                end = "wakes to look around" if any_dead else "(wakes for no reason)"
                node = self._after(process.node, "slice")
                yield self._step(state, index, end, node=node, status=RUNNING)
            else:
                yield from self._act(state, index, process, action)

    def _drain(
        self, state: State, index: int, process: Process
    ) -> Iterator[tuple[int, str, State]]:
        seen: set[int] = set()
        for place, (word, value) in enumerate(process.buffer):
            if (word, value) == FENCE:
                break
            if word not in seen:
                memory = list(state.memory)
                memory[word] = value
                rest = process.buffer[:place] + process.buffer[place + 1 :]
                if rest and rest[0] == FENCE:
                    rest = rest[1:]
                drained = self._settle(process._replace(buffer=rest))
                after = self._with(State(tuple(memory), state.processes), index, drained)
                yield index, f"{self.words[word]} = {value} reaches memory", after
            seen.add(word)
            if self.model == TSO:
                break

    def _act(
        self, state: State, index: int, process: Process, action: Action
    ) -> Iterator[tuple[int, str, State]]:
        memory = state.memory
        if isinstance(action, Load):
            for word in action.ahead if self.model == WEAK else ():
                if word not in dict(process.early):
                    early = (*process.early, (word, memory[word]))
                    what = f"(reads {self.words[word]} ahead: {memory[word]})"
                    yield index, what, self._with(state, index, process._replace(early=early))
            own = dict(process.buffer)
            ahead = dict(process.early)
            value = own.get(action.word, ahead.pop(action.word, memory[action.word]))
            node = self._after(process.node, value)
            what = f"reads {self.words[action.word]}: {value}"
            what = f"({what})" if action.optional else what
            yield self._step(state, index, what, node=node, early=tuple(ahead.items()))
        elif isinstance(action, Use):
            if memory[action.word] != action.expected:
                raise Broken(self._torn(index, action.word, memory[action.word], action.expected))
            what = f"reads {self.words[action.word]}"
            yield self._step(state, index, what, node=self._after(process.node))
        elif isinstance(action, Sleep):
            if action.expected in (memory[action.word], ANYTHING):
                what = f"sleeps on {self.words[action.word]} while it is {action.expected}"
                yield index, what, self._with(state, index, process._replace(status=ASLEEP))
            else:
                what = f"does not sleep: {self.words[action.word]} is {memory[action.word]}"
                yield self._step(state, index, what, node=self._after(process.node, "woken"))
        elif isinstance(action, Wake):
            everyone = list(state.processes)
            for other, sleeper in enumerate(everyone):
                sleeps_on = self._actions[sleeper.node]
                if sleeper.status == ASLEEP and sleeps_on[0] == action.word:
                    node = self._after(sleeper.node, "woken")
                    everyone[other] = self._settle(sleeper._replace(node=node, status=RUNNING))
            what = f"wakes who sleeps on {self.words[action.word]}"
            awake = State(memory, tuple(everyone))
            yield self._step(awake, index, what, node=self._after(process.node))
        elif isinstance(action, Gone):
            gone = next((i for i in action.processes if self._is_gone(state.processes[i])), None)
            what = "looks around: " + ("none" if gone is None else self.names[gone]) + " is gone"
            yield self._step(state, index, what, node=self._after(process.node, gone))
        elif isinstance(action, Choose):
            for option in action.options:
                node = self._after(process.node, option)
                yield self._step(state, index, f"(does next: {option})", node=node)

    def _step(self, state: State, index: int, what: str, **changes: Any) -> tuple[int, str, State]:
        process = self._settle(state.processes[index]._replace(**changes))
        return index, what, self._with(state, index, process)

    def _with(self, state: State, index: int, process: Process) -> State:
        processes = state.processes
        return State(state.memory, (*processes[:index], process, *processes[index + 1 :]))

    def _is_gone(self, process: Process) -> bool:
        ended = process.status == DEAD or isinstance(self._actions[process.node], End)
        return ended and not process.buffer

    def _torn(self, index: int, word: int, value: int, expected: int) -> str:
        return f"{self.names[index]} finds {value} in {self.words[word]} where it reads {expected}"

    def outcome(self, process: Process) -> str:
        """How it ended; what it waits for, if it sleeps."""
        if process.status == DEAD:
            return "dead"
        action = self._actions[process.node]
        return action.outcome if isinstance(action, End) else type(action).__name__.lower()
