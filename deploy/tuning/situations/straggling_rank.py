"""Straggling rank: somebody else computes on the core that rank 1 has."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from .batches import write_batch
from .runs import Ended, await_port, await_ranks, generate, pin
from .situation import GENERATED, STEP, Asked, Case, Place, Shown, Situation

NEIGHBOURS = 8
_BUSY = "while True: pass"


@contextmanager
def _neighbours(cpu: int) -> Iterator[None]:
    """Processes that take all of a core that they can get.

    Each in a session of its own: kernels that share a core out by session would count them as one.
    """
    with ExitStack() as stack:
        for _ in range(NEIGHBOURS):
            command = [sys.executable, "-c", _BUSY]
            busy = stack.enter_context(subprocess.Popen(command, start_new_session=True))
            stack.callback(busy.kill)
            os.sched_setaffinity(busy.pid, {cpu})
        yield


def _run(cpu_of_neighbours: int, requests: int) -> Callable[[Place], Ended]:
    """Rank 0 and rank 1 have the first and the second core, neighbours the one given."""

    def run(place: Place) -> Ended:
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 3:
            raise ValueError(f"{len(cpus)} CPUs are too few: two ranks and a neighbour need 3")

        def crowd(launcher: int) -> None:
            for rank, pid in await_ranks(launcher).items():
                pin(pid, cpus[rank])
            await_port(place.port)  # neighbours during imports would only make it take longer
            stack.enter_context(_neighbours(cpus[cpu_of_neighbours]))

        batch = write_batch(
            place.folder / "batch.jsonl", requests=requests, prompt_words=40, max_tokens=100
        )
        with ExitStack() as stack:
            return generate(
                batch,
                place.folder,
                port=place.port,
                trace=place.trace,
                options=("--max-batch-size=8",),
                meanwhile=crowd,
            )

    return run


def _waits(rank: int) -> Asked:
    of_rank = f'{{CASE, rank="{rank}"}}'
    waits = f"sum(onecast_collective_arrival_wait_seconds_sum{of_rank})"
    steps = f"sum(onecast_step_duration_seconds_sum{of_rank})"
    return Asked(f"of a step rank {rank} waits for the other", f"{waits} / {steps}", "share")


def straggling_rank(requests: int = 48) -> Situation:
    return Situation(
        name="straggling-rank",
        alert="OnecastStraggler",
        knob="give each rank cores that nobody else computes on",
        cases=(
            Case("before", f"{NEIGHBOURS} busy neighbours on rank 1's core", _run(1, requests)),
            Case("after", "the neighbours on a core of their own", _run(2, requests)),
        ),
        asked=(
            Asked(
                "rank 1 comes last to",
                'onecast:collective_straggler:share5m{CASE, group="tp", rank="1"}',
                "share",
            ),
            *(_waits(rank) for rank in (0, 1)),
            STEP,
            GENERATED,
        ),
        shown=(
            Shown("engine.step"),
            Shown("model.forward", 0),
            Shown("all_reduce", 0),
            Shown("all_reduce", 1),
        ),
    )
