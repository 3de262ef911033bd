"""Every state that a machine can come to, in every interleaving of its processes.

Owns the search and its verdict: a promise broken on the way or at an end, or a state from which no
end can be reached. What may happen next is `weak_machine`'s.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

from weak_machine import Broken, Machine, State


@dataclass
class Verdict:
    states: int = 0
    steps: int = 0
    outcomes: set[tuple[str, ...]] = field(default_factory=set)  # of all ends
    broken: str | None = None
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{self.states} states, {self.steps} steps: {self.broken or 'holds'}"
        return "\n".join([head, *self.trace])


def check(machine: Machine, most_states: int = 1_000_000) -> Verdict:
    """Breadth first, so that the trace of what breaks is a shortest one."""
    verdict = Verdict()
    start = machine.start()
    numbers = {start: 0}
    parents = [0]
    backwards: list[list[int]] = [[]]  # edges that count as progress, from their ends
    ends: list[int] = []
    queue = deque([start])
    states = [start]
    broken_at = None
    while queue and broken_at is None:
        state = queue.popleft()
        number = numbers[state]
        assert len(states) < most_states, f"over {most_states} states: choose a smaller world"
        goes_on = False
        try:
            for _, what, after in machine.steps(state):
                verdict.steps += 1
                known = numbers.get(after)
                if known is None:
                    known = numbers[after] = len(states)
                    states.append(after)
                    parents.append(number)
                    backwards.append([])
                    queue.append(after)
                if what[0] != "(":
                    goes_on = True
                    backwards[known].append(number)
            if not goes_on:
                verdict.outcomes.add(tuple(machine.outcome(p) for p in state.processes))
                machine.judge(machine, state)
                ends.append(number)
        except Broken as error:
            verdict.broken = str(error)
            broken_at = number
    verdict.states = len(states)
    if broken_at is None:
        broken_at = _dead_end(backwards, ends)
        if broken_at is not None:
            verdict.broken = "no end can be reached from here"
    if broken_at is not None:
        verdict.trace = _trace(machine, states, parents, broken_at)
    return verdict


def _dead_end(backwards: list[list[int]], ends: list[int]) -> int | None:
    reached = bytearray(len(backwards))
    stack = list(ends)
    while stack:
        number = stack.pop()
        if not reached[number]:
            reached[number] = 1
            stack.extend(backwards[number])
    place = reached.find(0)
    return None if place < 0 else place


def _trace(machine: Machine, states: list[State], parents: list[int], last: int) -> list[str]:
    path = [last]
    while path[-1]:
        path.append(parents[path[-1]])
    path.reverse()
    lines: list[str] = []
    for before, after in pairwise(path):
        for index, what, found in machine.steps(states[before]):
            if found == states[after]:
                lines.append(f"{machine.names[index]:9s} {what}")
                break
    return lines
