"""A case that is one run of `onecast generate` over a batch of its own, and nothing else."""

from collections.abc import Callable

from .batches import write_batch
from .runs import Ended, generate
from .situation import Place


def generating(
    *options: str, requests: int, prompt_words: int, max_tokens: int
) -> Callable[[Place], Ended]:
    """Answers `requests` prompts of so many words, each with at most `max_tokens` tokens."""

    def run(place: Place) -> Ended:
        path = place.folder / "batch.jsonl"
        batch = write_batch(
            path, requests=requests, prompt_words=prompt_words, max_tokens=max_tokens
        )
        return generate(batch, place.folder, port=place.port, trace=place.trace, options=options)

    return run
