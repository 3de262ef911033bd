"""The choices of requests with `n > 1` that wait for their prompt.

Owns who computes the prompt of such a request (its leader) and who will be forked off it. Knows
nothing of queues or blocks; a request is forgotten here as soon as it has forked.
"""

from collections.abc import Iterable

from .request import Request, Sequence, Status


class Forks:
    """Leader -> the FORKING choices of its request, in order."""

    __slots__ = ("_choices",)

    def __init__(self) -> None:
        self._choices: dict[Sequence, list[Sequence]] = {}

    def add(self, request: Request) -> Sequence:
        """The leader of a new request; its other choices wait as FORKING."""
        for sequence in request.sequences[1:]:
            sequence.status = Status.FORKING
        return self._lead(request.sequences)

    def leads(self, sequence: Sequence) -> bool:
        """Whether others will be forked off it."""
        return sequence in self._choices

    def pop(self, leader: Sequence) -> list[Sequence]:
        """The choices to fork off a leader whose prompt is computed; none for other sequences."""
        return self._choices.pop(leader, []) if self._choices else []

    def remove(self, sequence: Sequence) -> Sequence | None:
        """Forget a sequence that has ended; if it led, who has to begin the prompt anew."""
        if sequence in self._choices:
            return self._lead(self._choices.pop(sequence))
        for leader in sequence.request.sequences:
            others = self._choices.get(leader, [])
            if sequence in others:
                others.remove(sequence)
                if not others:
                    del self._choices[leader]
        return None

    def places(self, sequences: Iterable[Sequence]) -> int:
        """How many sequences these are once they have forked."""
        return sum(1 + len(self._choices.get(sequence, ())) for sequence in sequences)

    def draw(self, rows: list[Sequence]) -> tuple[list[Sequence], list[int]]:
        """Who draws a token, and from which row, where row i has the logits of `rows[i]`."""
        if not self._choices:
            return rows, list(range(len(rows)))
        drawing: list[Sequence] = []
        drawn_rows: list[int] = []
        for row, sequence in enumerate(rows):
            choices = [sequence, *self._choices.get(sequence, ())]
            drawing += choices
            drawn_rows += [row] * len(choices)
        return drawing, drawn_rows

    def __len__(self) -> int:
        return sum(map(len, self._choices.values()))

    def _lead(self, choices: list[Sequence]) -> Sequence:
        leader, *others = choices
        if others:
            self._choices[leader] = others
        return leader
