"""Too small chunks: a step holds so few tokens that long prompts take many of them."""

from collections.abc import Callable

from .generating import generating
from .runs import Ended
from .situation import PROMPT, STEP, STEPS, Asked, Case, Place, Shown, Situation


def _run(*options: str, requests: int) -> Callable[[Place], Ended]:
    return generating(*options, requests=requests, prompt_words=280, max_tokens=8)


def too_small_chunks(requests: int = 384) -> Situation:
    return Situation(
        name="too-small-chunks",
        alert="OnecastChunksTooSmall",
        knob="--max-batch-tokens up",
        cases=(
            Case(
                "before",
                "--max-batch-tokens 32",
                _run("--max-batch-tokens=32", requests=requests),
            ),
            Case(
                "after",
                "--max-batch-tokens 512",
                _run("--max-batch-tokens=512", requests=requests),
            ),
        ),
        asked=(
            Asked(
                "tokens of prompts a step computes",
                f'sum(onecast_tokens_total{{CASE, kind="prompt"}}) / {STEPS}',
            ),
            Asked("of its tokens a step computes", "onecast:step_tokens:share5m{CASE}", "share"),
            Asked("steps", STEPS),
            STEP,
            PROMPT,
            Asked(
                "time to first token, p99",
                "histogram_quantile(0.99, sum by (le) "
                "(onecast_request_time_to_first_token_seconds_bucket{CASE}))",
                "s",
            ),
            Asked("request in the queue, p99", "onecast:request_queue_seconds:p99_5m{CASE}", "s"),
        ),
        shown=(Shown("engine.step"), Shown("model.forward", 0)),
    )
