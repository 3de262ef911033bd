"""Broadcast too large: much of a step is the sending of what is to be done in it."""

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
        *options, "--max-batch-size=8", requests=requests, prompt_words=200, max_tokens=200
    )


def broadcast_too_large(requests: int = 32) -> Situation:
    return Situation(
        name="broadcast-too-large",
        alert="OnecastBroadcastShareHigh",
        knob="--block-size up; --channel auto, which takes shared memory where ranks share a host",
        cases=(
            Case(
                "before",
                "--block-size 1 --channel two-broadcasts",
                _run("--block-size=1", "--channel=two-broadcasts", requests=requests),
            ),
            Case(
                "one",
                "--block-size 1 --channel process-group",
                _run("--block-size=1", "--channel=process-group", requests=requests),
            ),
            Case(
                "blocks",
                "--block-size 16 --channel process-group",
                _run("--block-size=16", "--channel=process-group", requests=requests),
            ),
            Case(
                "after",
                "--block-size 16 --channel auto",
                _run("--block-size=16", "--channel=auto", requests=requests),
            ),
        ),
        asked=(
            Asked(
                "bytes of a frame",
                "sum(onecast_frame_bytes_sum{CASE}) / sum(onecast_frame_bytes_count{CASE})",
                "B",
            ),
            Asked(
                "broadcasts of a step",
                f'sum(onecast_frame_broadcasts_total{{CASE, rank="0"}}) / {STEPS}',
            ),
            phase_share("of a step that rank 0 spends sending", "step[.]publish", 0),
            Asked(
                "of a step that rank 1 spends waiting for its frame",
                'onecast:step_broadcast:share1m{CASE, rank="1"}',
                "share",
            ),
            STEP,
            GENERATED,
        ),
        shown=(Shown("engine.step"), Shown("step.publish", 0), Shown("step.receive", 1)),
    )
