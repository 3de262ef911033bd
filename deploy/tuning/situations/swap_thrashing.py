"""Swap thrashing: more sequences run than the cache has blocks for."""

from collections.abc import Callable

from .generating import generating
from .runs import Ended
from .situation import (
    GENERATED,
    STEP,
    STEPS,
    Asked,
    Case,
    Place,
    Shown,
    Situation,
    phase_share,
)


def _run(*options: str, requests: int) -> Callable[[Place], Ended]:
    return generating(
        *options, "--no-prefix-caching", requests=requests, prompt_words=40, max_tokens=150
    )


def swap_thrashing(requests: int = 192) -> Situation:
    return Situation(
        name="swap-thrashing",
        alert="OnecastSwapThrashing",
        knob="--num-blocks up, or --max-batch-size down to what the blocks hold",
        cases=(
            Case(
                "before",
                "--num-blocks 64 --num-host-blocks 1024",
                _run("--num-blocks=64", "--num-host-blocks=1024", requests=requests),
            ),
            Case(
                "smaller",
                "... --max-batch-size 5",
                _run(
                    "--num-blocks=64",
                    "--num-host-blocks=1024",
                    "--max-batch-size=5",
                    requests=requests,
                ),
            ),
            Case("after", "--num-blocks 1024", _run("--num-blocks=1024", requests=requests)),
        ),
        asked=(
            Asked(
                "blocks swapped out",
                'onecast_kv_blocks_moved_total{CASE, direction="swap_out", rank="0"}',
            ),
            Asked("preemptions", 'sum(onecast_preemptions_total{CASE, rank="0"})'),
            Asked(
                "sequences off the device, on average",
                'avg_over_time(onecast_sequences{CASE, state="swapped", rank="0"}[5m])',
            ),
            Asked("steps", STEPS),
            phase_share("of a step that rank 0 spends swapping", "kv[.]swap_.*", 0),
            STEP,
            GENERATED,
        ),
        shown=(Shown("engine.step"), Shown("kv.swap_out", 0), Shown("kv.swap_in", 0)),
    )
