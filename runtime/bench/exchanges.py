"""The exchanges on one rank: who sends when, and what the clock said.

Owns pacing and stamps. Knows nothing of what a method does, nor of statistics.

Before every exchange each receiver says through a word of shared memory that it goes to receive
(`shared_page.Gate`); the source spins until all have said so. Then, by mode:

    tight        the source spins for 10 us and sends. What a receiver does before it waits, the
                 source does too, and later, so every method's receiver is about to wait or waits by
                 then, at the end of its own code and not of a barrier's. All methods get the same
                 pause; a long one is no busy loop: after 50 us of spinning all of them take up to a
                 third longer. Blocks of exchanges of one method, code and data in the caches,
                 methods taking turns.
    alternating  the same, but another method each exchange, in random order: every one finds
                 the caches full of the others.
    paced        the source sleeps until 5 ms after its last send; blocks of one method. Between
                 steps both sides do nothing but wait.

Waiting CPU is taken where there is a wait to speak of, paced and idle: the CPU time of the whole
receiving process, the threads of Gloo included, over the time that passed, decoding and all.

One way is from the stamp before `send` to the stamp after `receive` of the last reader to have it;
`perf_counter_ns` reads one clock for all processes of a host.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from onecast.comm import ReceiveTimeout

from .method import Method
from .shared_page import Gate
from .workloads import same_mapping

PERIOD_NS = 5_000_000
_PAUSE_NS = 10_000
_TIGHT_BLOCK, _TIGHT_WARMUP = 25, 5  # timed exchanges of a method in a row; untimed before them
_PACED_BLOCK, _PACED_WARMUP = 100, 20  # a reader learns a cadence in sixteen


class Turn(NamedTuple):
    method: str
    timed: bool
    begins: bool  # a block's first timed exchange
    ends: bool  # its last


class Stamps:
    """Of one method in one mode, in ns: `begins` and `ends` on the source, `ends` on a receiver.

    `cpu_percent`: of a core, for each paced block.
    """

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.cpu_percent: list[float] = []


def tight_turns(methods: Sequence[str], steps: int) -> Iterator[Turn]:
    """`steps` timed exchanges of each method, in blocks."""
    return _blocks(methods, steps, _TIGHT_BLOCK, _TIGHT_WARMUP)


def paced_turns(methods: Sequence[str], steps: int) -> Iterator[Turn]:
    return _blocks(methods, steps, _PACED_BLOCK, _PACED_WARMUP)


def alternating_turns(methods: Sequence[str], steps: int) -> Iterator[Turn]:
    chance = random.Random(0)  # the same on all ranks; a fixed order would favour a successor
    for _ in range(steps):
        for method in chance.sample(methods, len(methods)):
            yield Turn(method, True, False, False)


def _blocks(methods: Sequence[str], steps: int, block: int, warmup: int) -> Iterator[Turn]:
    for first in range(0, steps, block):
        size = min(block, steps - first)
        for method in methods:
            for turn in range(-warmup, size):
                yield Turn(method, turn >= 0, turn == 0, turn == size - 1)


class Exchanges:
    """All exchanges of one workload on this rank."""

    def __init__(
        self,
        rank: int,
        gate: Gate,
        methods: Mapping[str, Method],
        mapping: dict[str, Any],
        untimed_steps: int,
    ) -> None:
        """A collective call. Every method is used so many times, for layouts to be learned and
        capacities to settle, and what arrives is compared with what was sent.
        """
        self._gate = gate
        self._is_source = rank == 0
        self._methods = methods
        self._mappings = {name: method.prepare(mapping) for name, method in methods.items()}
        self._step = 0
        for name, method in methods.items():
            for _ in range(untimed_steps):
                self._prime(name, method)

    def _prime(self, name: str, method: Method) -> None:
        mapping = self._mappings[name]
        if self._is_source:
            self._gate.await_all()
            method.account(method.send(mapping))
            return
        self._gate.ready()
        received = method.receive()
        got = method.mapping(received)
        assert got is None or same_mapping(got, mapping), f"{name}: what arrived is not what left"
        method.release(received)

    def run(self, turns: Iterator[Turn], paced: bool = False) -> dict[str, Stamps]:
        stamps = {name: Stamps() for name in self._methods}
        if self._is_source:
            self._run_source(turns, paced, stamps)
        else:
            self._run_receiver(turns, paced, stamps)
        return stamps

    def _run_source(self, turns: Iterator[Turn], paced: bool, stamps: dict[str, Stamps]) -> None:
        clock = time.perf_counter_ns
        begin = clock()
        for turn in turns:
            method, mapping, stamp = self._of(turn.method, stamps)
            due = begin + PERIOD_NS
            self._gate.await_all()
            if paced:
                time.sleep(max(due - clock(), 0) / 1e9)
            else:
                pause_end = clock() + _PAUSE_NS
                while clock() < pause_end:
                    pass
            begin = clock()
            sent = method.send(mapping)
            end = clock()
            if turn.timed:
                stamp.begins.append(begin)
                stamp.ends.append(end)
            method.account(sent)

    def _run_receiver(self, turns: Iterator[Turn], paced: bool, stamps: dict[str, Stamps]) -> None:
        clock = time.perf_counter_ns
        cpu_clock = time.process_time_ns
        cpu_begin = begin = 0
        for turn in turns:
            method, _, stamp = self._of(turn.method, stamps)
            if paced and turn.begins:
                cpu_begin, begin = cpu_clock(), clock()
            self._gate.ready()
            received = method.receive()
            end = clock()
            method.release(received)
            if turn.timed:
                stamp.ends.append(end)
            if paced and turn.ends:
                stamp.cpu_percent.append(100 * (cpu_clock() - cpu_begin) / (clock() - begin))

    def _of(self, name: str, stamps: dict[str, Stamps]) -> tuple[Method, dict[str, Any], Stamps]:
        """With a mapping that differs from the last one, as steps do."""
        mapping = self._mappings[name]
        self._step += 1
        if "step" in mapping:
            mapping["step"] = self._step
        return self._methods[name], mapping, stamps[name]

    def idle(self, name: str, seconds: float) -> float:
        """CPU percent of a receiver for which nothing comes; 0 on the source."""
        method = self._methods[name]
        self._prime(name, method)
        cpu_begin, begin = time.process_time_ns(), time.perf_counter_ns()
        if self._is_source:
            time.sleep(seconds + 0.1)
            self._prime(name, method)
            return 0.0
        try:
            received = method.receive(timeout_s=seconds)
        except ReceiveTimeout:
            cpu_ns = time.process_time_ns() - cpu_begin
            percent = 100 * cpu_ns / (time.perf_counter_ns() - begin)
        else:
            raise AssertionError(f"{name}: {received} came while nothing was sent")
        self._prime(name, method)
        return percent
