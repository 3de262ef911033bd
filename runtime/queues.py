"""The sequences of all unfinished requests, by what they wait for.

Owns the queues and the moves between them, with the status that says in which of them a sequence
is. Decides nothing: who moves is up to `scheduler.py` and `progress.py`, blocks are no matter here.
"""

from collections import deque

from .forks import Forks
from .request import Request, Sequence, Status
from .step import ScheduledSequence


class Queues:
    """Every unfinished sequence is in exactly one of the queues or `forks`.

    But for those that are ENDING: only their request is still here. Running are the `decodes`,
    which compute one token in every step, and the `prefills`: all that have more to compute,
    lead forks, or have only just come to the device.
    """

    __slots__ = ("_arrivals", "decodes", "forks", "prefills", "requests", "swapped", "waiting")

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}  # those with an unfinished sequence
        self.waiting: deque[Sequence] = deque()  # recomputations, then new ones as they came
        # Dicts in the order of entry: whoever leaves is found at once, and a step's list of decodes
        # is a copy of the values. An entry says the same in every step.
        self.decodes: dict[Sequence, ScheduledSequence] = {}
        self.prefills: dict[Sequence, None] = {}
        self.swapped: deque[Sequence] = deque()  # as they left
        self.forks = Forks()
        self._arrivals = 0

    def add(self, request: Request) -> None:
        """A new request, last in line; ValueError if its id is that of an unfinished one."""
        if request.request_id in self.requests:
            raise ValueError(
                f"request id {request.request_id!r} is in use by an unfinished request"
            )
        self.requests[request.request_id] = request
        for sequence in request.sequences:
            sequence.arrival = self._arrivals
            self._arrivals += 1
        self.waiting.append(self.forks.add(request))

    def enter(self, sequence: Sequence) -> None:
        """Onto the device, from no queue."""
        sequence.status = Status.RUNNING
        sequence.tokens_at_entry = sequence.num_tokens
        self.prefills[sequence] = None

    def start_decoding(self, sequence: Sequence) -> None:
        """From the prefills to the decodes."""
        del self.prefills[sequence]
        self.decodes[sequence] = ScheduledSequence(sequence, 1, True)

    def leave_to_host(self, sequence: Sequence) -> None:
        """Off the device, to return after those that left before."""
        self._leave(sequence)
        sequence.status = Status.SWAPPED
        self.swapped.append(sequence)

    def leave_to_recompute(self, sequence: Sequence) -> None:
        """Off the device, to begin anew before all that wait."""
        self._leave(sequence)
        self._wait_first(sequence)

    def leave_to_end(self, sequence: Sequence) -> None:
        """Off the device for good, while its last token is being drawn."""
        self._leave(sequence)
        sequence.status = Status.ENDING

    def end(self, sequence: Sequence) -> None:
        """Out of whatever queue it is in; its request goes with the last of its sequences."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence.status is Status.SWAPPED:
            self.swapped.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        successor = self.forks.remove(sequence)
        if successor is not None:
            self._wait_first(successor)
        if sequence.request.finished:
            del self.requests[sequence.request.request_id]

    def places_with(self, sequence: Sequence) -> int:
        """How many sequences would be on the device with this one, once all have forked."""
        forks = self.forks  # decodes have forked
        return len(self.decodes) + forks.places(self.prefills) + forks.places([sequence])

    @property
    def running(self) -> list[Sequence]:
        return [*self.decodes, *self.prefills]

    @property
    def num_running(self) -> int:
        return len(self.decodes) + len(self.prefills)

    @property
    def has_work(self) -> bool:
        """Whether any sequence has tokens to compute yet."""
        return bool(self.decodes or self.prefills or self.waiting or self.swapped)

    @property
    def num_waiting(self) -> int:
        """With the choices that wait for the prompt of their request."""
        return len(self.waiting) + len(self.forks)

    def _leave(self, sequence: Sequence) -> None:
        if self.decodes.pop(sequence, None) is None:
            del self.prefills[sequence]

    def _wait_first(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)
