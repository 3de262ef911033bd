"""The scheduler under random traffic, in many small worlds: longer runs than shrinking can afford.

Everything that `Harness` checks holds after every step, and whoever is left alone gets the tokens
that it gets in a roomy cache without prefix caching or drafts.
"""

import random
from typing import Any

import pytest
from scheduler_model import VOCABULARY, Harness

from onecast.runtime.scheduler import SchedulerConfig

EOS = (7,)
ROOMY = SchedulerConfig(4, 1000, 0, 512, 64, 128, prefix_caching=False)


def world(draw: random.Random) -> SchedulerConfig:
    return SchedulerConfig(
        block_size=draw.randint(1, 5),
        num_blocks=draw.randint(6, 40),
        num_host_blocks=draw.choice([0, 1, 3, 10, 40, 100]),
        max_batch_tokens=draw.randint(1, 40),
        max_batch_size=draw.randint(1, 10),
        max_model_len=60,
        chunked_prefill=draw.random() < 0.7,
        prefix_caching=draw.random() < 0.8,
    )


def body(draw: random.Random, common: list[int], harness: Harness) -> dict[str, Any]:
    """A request that may begin like all others, or like one of them and its answer."""
    own = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 8))]
    prompt = common[: draw.choice([0, 4, 8, 12, 20])] + own
    if harness.requests and draw.random() < 0.3:
        known = draw.choice(harness.sequences)
        prompt = (known.token_ids[: known.num_prompt] + [t.token_id for t in known.output])[:30]
    return {
        "prompt": prompt,
        "max_tokens": draw.randint(1, 20),
        "n": draw.choice([1, 1, 1, 2, 3, 5]),
        "ignore_eos": draw.random() < 0.5,
    }


def run(seed: int) -> None:
    draw = random.Random(seed)
    common = [draw.randrange(VOCABULARY) for _ in range(20)]
    harness = Harness(world(draw), EOS, drafts=draw.random() < 0.5)
    roomy = Harness(ROOMY, EOS)
    disturbed: set[str] = set()
    for _ in range(draw.randint(1, 60)):
        kind = draw.random()
        if kind < 0.4:
            one = body(draw, common, harness)
            try:
                harness.add(**one)
            except ValueError:
                continue
            roomy.add(**one)
        elif kind < 0.5 and harness.requests:
            sequence = draw.choice(harness.sequences)
            disturbed.add(sequence.request.request_id)
            if draw.random() < 0.5:
                harness.scheduler.abort(sequence.request.request_id)
            elif draw.random() < 0.5:
                harness.step(end_before_commit=sequence)
            else:
                harness.scheduler.finish(sequence, "stop")
        else:
            for _ in range(draw.randint(1, 8)):
                harness.step()
    harness.run(max_steps=20_000)
    harness.check_empty()
    roomy.run()
    for mine, theirs in zip(harness.requests, roomy.requests, strict=True):
        if mine.request_id not in disturbed:
            assert [s.token_ids for s in mine.sequences] == [s.token_ids for s in theirs.sequences]


@pytest.mark.parametrize("start", range(0, 100, 25))
def test_random_traffic(start: int) -> None:
    for seed in range(start, start + 25):
        run(seed)


@pytest.mark.parametrize("seed", [224, 463, 1392])
def test_traffic_in_which_a_rare_mistake_showed(seed: int) -> None:
    """Preempted ahead without a token drawn (224, 463), due twice for one block (1392)."""
    run(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 1100, 100))
def test_much_random_traffic(start: int) -> None:
    for seed in range(start, start + 100):
        run(seed)
