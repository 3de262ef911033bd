"""Which of two ways takes a swap: copies by the copy engine, one a run, or one kernel for all.

Owns the model of what either costs and how it is fitted to a short measurement. Knows nothing of
memory or streams: a measurement is a function here.

A way's cost is the time until all blocks are there, and once more the time for which the call holds
up the host, which has a forward to launch:

    copies    fixed + runs * per_run + blocks * per_block      cheap where runs are long
    kernel    fixed + blocks * per_block                       however they lie
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

COPIES, KERNEL = "copies", "kernel"
WAYS = (COPIES, KERNEL)

_ROUNDS = 2  # at least, the one before them not counted
_MOST_ROUNDS = 9


class Cost(NamedTuple):
    """In seconds: of a call, of each run, of each block."""

    fixed: float
    per_run: float
    per_block: float

    def of(self, runs: int, blocks: int) -> float:
        """Of a call with so many blocks in so many runs."""
        return self.fixed + runs * self.per_run + blocks * self.per_block


class SwapChoice(NamedTuple):
    """What either way costs in one direction."""

    copies: Cost
    kernel: Cost

    def choose(self, runs: int, blocks: int) -> str:
        """COPIES or KERNEL; of equals the copies, which leave the multiprocessors alone."""
        kernel_is_cheaper = self.kernel.of(runs, blocks) < self.copies.of(runs, blocks)
        return KERNEL if kernel_is_cheaper else COPIES


# For pools too small to measure: blocks of 1 MiB, a link of 50 GB/s.
UNMEASURED = SwapChoice(copies=Cost(10e-6, 12e-6, 20e-6), kernel=Cost(60e-6, 0.0, 21e-6))

# (way, runs, blocks) -> seconds until the call returned, and until all was there
Measure = Callable[[str, int, int], tuple[float, float]]


def fit(measure: Measure, blocks: int, budget_s: float) -> SwapChoice:
    """Measure with up to `blocks` blocks, at least 2, until `budget_s` is spent.

    Takes turns among few calls of each way; each counts with its median. A slow first round, in
    which things are compiled and allocated, counts for nothing.
    """
    assert blocks >= 2, f"{blocks} blocks tell nothing"
    calls = [(COPIES, 1, 1), (COPIES, 1, blocks), (COPIES, blocks, blocks)]
    calls += [(KERNEL, 1, 1), (KERNEL, blocks, blocks)]
    costs: dict[tuple[str, int, int], list[float]] = {call: [] for call in calls}
    end = time.perf_counter() + budget_s
    for number in range(_MOST_ROUNDS + 1):
        if number > _ROUNDS and time.perf_counter() > end:
            break
        for call in calls:
            returned_s, there_s = measure(*call)
            if number:
                costs[call].append(returned_s + there_s)
    return _solve({call: statistics.median(values) for call, values in costs.items()}, blocks)


def _solve(costs: dict[tuple[str, int, int], float], blocks: int) -> SwapChoice:
    """The lines through what was measured."""

    def per_one_more(of_one: float, of_all: float) -> float:
        return max(0.0, (of_all - of_one) / (blocks - 1))  # nothing costs less than nothing

    one, merged, scattered = (costs[COPIES, *of] for of in ((1, 1), (1, blocks), (blocks, blocks)))
    per_block, per_run = per_one_more(one, merged), per_one_more(merged, scattered)
    copies = Cost(max(0.0, one - per_run - per_block), per_run, per_block)
    one, scattered = costs[KERNEL, 1, 1], costs[KERNEL, blocks, blocks]
    per_block = per_one_more(one, scattered)
    return SwapChoice(copies, Cost(max(0.0, one - per_block), 0.0, per_block))


def describe(choice: SwapChoice, direction: str) -> str:
    """One line for the log."""
    parts = [
        f"{way} {cost.fixed * 1e6:.1f} us + {cost.per_run * 1e6:.2f} a run"
        f" + {cost.per_block * 1e6:.2f} a block"
        for way, cost in zip(WAYS, choice, strict=True)
    ]
    return f"{direction}: {'; '.join(parts)}"
