"""Draws follow the distribution that was asked for, and depend on seed and position alone."""

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from plain_sampler import PlainSampler

from onecast.runtime.request import (
    PLACEHOLDER,
    Request,
    SampledToken,
    SamplingParams,
    Sequence,
)
from onecast.runtime.sampling import Sampler
from onecast.runtime.uniforms import Uniforms, philox

PROMPT = (5, 6, 7)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Logits this small only wait for more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequence(generated: int = 0, index: int = 0, **params: Any) -> Sequence:
    request = Request("r", PROMPT, SamplingParams(**params))
    output = [SampledToken(0)] * generated
    return Sequence(request, index, [*PROMPT] + [0] * generated, output=output)


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    sampled = Sampler().sample(logits, list(range(len(sequences))), sequences)
    return [token.token_id for token in sampled]


def frequencies(logits: list[float], draws: int, **params: Any) -> np.ndarray[Any, Any]:
    """How often each token is drawn, over 100 positions of each of many seeds."""
    seed = params.pop("seed", 0)
    sequences = [sequence(i % 100, seed=seed + i // 100, **params) for i in range(draws)]
    tokens = sample(torch.tensor([logits]).expand(draws, -1).contiguous(), sequences)
    return np.bincount(tokens, minlength=len(logits))


def assert_follows(counts: np.ndarray[Any, Any], probabilities: np.ndarray[Any, Any]) -> None:
    """Chi-square within 5 standard deviations of its mean, and nothing where there is no weight."""
    assert not counts[probabilities == 0].any()
    kept = probabilities > 0
    expected = counts.sum() * probabilities[kept]
    chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, 3.0, -math.inf, 1.0]


def softmax(logits: list[float], temperature: float = 1.0) -> np.ndarray[Any, Any]:
    weights = np.exp((np.array(logits) - max(logits)) / temperature)
    return weights / weights.sum()  # type: ignore[no-any-return]


# ---- distribution


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_of_the_scaled_logits(temperature: float) -> None:
    counts = frequencies(LOGITS, 20_000, seed=11, temperature=temperature)
    assert_follows(counts, softmax(LOGITS, temperature))


def test_many_seeds_at_one_position_and_one_seed_at_many_follow_the_softmax_too() -> None:
    logits = torch.tensor([LOGITS]).expand(4_000, -1).contiguous()
    for sequences in (
        [sequence(seed=seed) for seed in range(4_000)],
        [sequence(generated, seed=1) for generated in range(4_000)],
    ):
        assert_follows(np.bincount(sample(logits, sequences), minlength=8), softmax(LOGITS))


def test_top_k_draws_from_the_k_most_likely() -> None:
    probabilities = softmax(LOGITS)
    probabilities[[2, 3, 4]] = 0  # 5, 0 and the equals 1 and 7 remain
    counts = frequencies(LOGITS, 20_000, seed=3, top_k=4)
    assert_follows(counts, probabilities / probabilities.sum())


def test_top_p_draws_from_the_fewest_that_hold_p_together() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    kept = {0.0: 1, 0.39: 1, 0.41: 2, 0.69: 2, 0.71: 3, 0.89: 3, 0.91: 4, 1.0: 4}
    for top_p, count in kept.items():
        probabilities = np.array([0.4, 0.3, 0.2, 0.1])
        probabilities[count:] = 0
        counts = frequencies(logits, 4_000, seed=5, top_p=top_p)
        assert_follows(counts, probabilities / probabilities.sum())


def test_top_p_counts_within_what_top_k_keeps() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # Of the first two, the first holds 4/7 = 0.571.
    assert np.count_nonzero(frequencies(logits, 2_000, top_k=2, top_p=0.56)) == 1
    assert np.count_nonzero(frequencies(logits, 2_000, top_k=2, top_p=0.58)) == 2


def test_temperature_comes_before_top_p() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # Squared and normalised the first holds 0.533.
    assert np.count_nonzero(frequencies(logits, 2_000, temperature=0.5, top_p=0.52)) == 1
    assert np.count_nonzero(frequencies(logits, 2_000, temperature=0.5, top_p=0.54)) == 2


# ---- edges


def test_temperature_zero_top_k_one_and_top_p_zero_are_greedy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 50)
    best = logits.argmax(-1).tolist()
    for params in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-300}):
        assert sample(logits, [sequence(i, **params) for i in range(200)]) == best


def test_top_k_beyond_the_vocabulary_and_top_p_of_one_filter_nothing() -> None:
    logits = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    plain = sample(logits, [sequence(i) for i in range(500)])
    assert sample(logits, [sequence(i, top_k=1000) for i in range(500)]) == plain
    assert sample(logits, [sequence(i, top_p=1.0, top_k=20) for i in range(500)]) == plain


def test_tokens_without_weight_are_never_drawn_even_at_the_ends() -> None:
    logits = [-math.inf, -1000.0, 0.0, 0.0, -1000.0, -math.inf]
    assert np.flatnonzero(frequencies(logits, 10_000)).tolist() == [2, 3]
    assert frequencies([0.0], 10).tolist() == [10]


def test_the_least_and_the_greatest_uniform_number_find_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(300, 97, generator=torch.Generator().manual_seed(1)) * 8
    logits[:, 0] = logits[:, -1] = -math.inf
    for share in (0.0, 1 - 2**-53):
        monkeypatch.setattr(Uniforms, "at", lambda self, at, u=share: np.full(len(at), u))
        for token in sample(logits, [sequence(i) for i in range(300)]):
            assert 0 < token < 96


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_that_names_the_request(
    poison: float, temperature: float
) -> None:
    logits = torch.zeros(2, 10)
    logits[1, 4] = poison
    with pytest.raises(FloatingPointError, match=r"request 'r' at token 5 are not finite"):
        sample(logits, [sequence(1), sequence(2, temperature=temperature)])


def test_nothing_to_sample_gives_nothing() -> None:
    assert Sampler().sample(torch.empty(0, 10), [], []) == []


# ---- determinism


def mixed_sequences(count: int, seed: int = 2) -> list[Sequence]:
    rng = random.Random(seed)
    return [
        sequence(
            rng.randrange(50),
            rng.randrange(3),
            seed=rng.randrange(10**6),
            temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
            top_k=rng.choice([0, 0, 3, 40]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.2]),
            logprobs=rng.choice([None, None, 0, 3]),
        )
        for _ in range(count)
    ]


def test_a_draw_does_not_depend_on_the_batch_it_is_made_in() -> None:
    sequences = mixed_sequences(60)
    logits = torch.randn(60, 300, generator=torch.Generator().manual_seed(3)) * 3
    together = Sampler().sample(logits, list(range(60)), sequences)
    alone = [Sampler().sample(logits[i : i + 1], [0], [one])[0] for i, one in enumerate(sequences)]
    assert alone == together
    order = list(range(60))
    random.Random(4).shuffle(order)
    shuffled = Sampler().sample(logits, order, [sequences[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_a_draw_does_not_depend_on_what_was_drawn_before() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(5))
    sampler = Sampler()
    first = [sampler.sample(logits, [0], [sequence(i, seed=9)]) for i in range(20)]
    backwards = [sampler.sample(logits, [0], [sequence(i, seed=9)]) for i in reversed(range(20))]
    assert first == backwards[::-1]
    assert len({token.token_id for [token] in first}) > 10


def test_choice_k_draws_as_a_request_of_its_own_with_seed_plus_k() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(6))
    choices = [sequence(3, index, seed=7, n=4) for index in range(4)]
    requests = [sequence(3, seed=7 + index) for index in range(4)]
    together = Sampler().sample(logits, [0, 0, 0, 0], choices)
    assert together == [Sampler().sample(logits, [0], [request])[0] for request in requests]
    assert len({token.token_id for token in together}) == 4


def test_any_whole_number_is_a_seed() -> None:
    seeds = [0, -1, 1, 2**32, 2**63, 2**64 - 1, -(2**70)]
    drawn = Uniforms(seeds).at([0] * len(seeds))
    assert ((drawn >= 0) & (drawn < 1)).all()
    # -1 and 2^64 - 1 are the same 64 bits, as are 0 and -2^70.
    assert len(set(drawn.tolist())) == 5


def test_numbers_drawn_ahead_are_those_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = Uniforms._draw

    def record(self: Uniforms, positions: Any) -> Any:
        drawn.append(len(positions))
        return draw(self, positions)

    monkeypatch.setattr(Uniforms, "_draw", record)
    seeds = [3, 1, 4, 1, 5]

    def check(ahead: Uniforms, positions: list[int]) -> None:
        expected = Uniforms(seeds).at(positions)
        drawn.pop()
        assert ahead.at(positions).tolist() == expected.tolist()

    ahead = Uniforms(seeds)
    for step in range(1 + 2 + 4 + 8 + 16 + 16 + 5):
        check(ahead, [i + step for i in (0, 7, 2, 0, 30)])
    assert drawn == [1, 2, 4, 8, 16, 16, 16], "more and more while all go on"
    check(ahead, [53, 60, 55, 53, 84])  # one is ahead of the others
    check(ahead, [54, 61, 56, 54, 85])
    check(ahead, [3, 3, 3, 3, 3])
    check(ahead, [7, 7, 7, 7, 7])
    assert drawn[7:] == [1, 2, 1, 1], "one by one again after a jump"


def test_philox_gives_the_published_values() -> None:
    """Known answers of Random123, kat_vectors, philox4x32 10."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    counters = [np.array(words, np.uint64) for words in zip(*(c for c, _, _ in cases), strict=True)]
    keys = [np.array(words, np.uint64) for words in zip(*(k for _, k, _ in cases), strict=True)]
    found = philox((counters[0], counters[1], counters[2], counters[3]), (keys[0], keys[1]))
    assert [tuple(int(word) for word in row) for row in zip(*found, strict=True)] == [
        expected for _, _, expected in cases
    ]


# ---- the same tokens as a sampler that remembers nothing


@pytest.mark.parametrize("greedy", [True, False])
def test_generating_gives_what_the_plain_sampler_draws(greedy: bool) -> None:
    """Batches that stay the same for a while, lose, gain and reorder sequences, and rows shared."""
    rng = random.Random(7)
    generator = torch.Generator().manual_seed(9)
    sampler, sequences = Sampler(), []
    for step in range(120):
        if step % 12 == 0:
            if greedy:
                sequences = [sequence(step, temperature=0.0) for _ in range(rng.choice([1, 5, 40]))]
            else:
                sequences = rng.sample(sequences, len(sequences) // 2)
                sequences += mixed_sequences(rng.choice([1, 3, 40]), seed=step)
        if step % 7 == 0:
            rng.shuffle(sequences)
        num_rows = rng.choice([len(sequences), len(sequences), (len(sequences) + 1) // 2])
        rows = [row % num_rows for row in range(len(sequences))]
        logits = torch.randn(num_rows, 60, generator=generator).mul_(4).round_().div_(2)  # equals
        expected = PlainSampler().sample(logits, rows, sequences)
        found = sampler.sample(logits, rows, sequences)
        if any(s.request.params.logprobs is not None for s in sequences):
            assert [t.token_id for t in found] == [t.token_id for t in expected]
        assert found == expected
        for one, token in zip(sequences, found, strict=True):
            one.token_ids.append(token.token_id)
            one.output.append(token)


def test_a_token_that_stands_for_one_not_known_yet_changes_no_draw() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(5))
    known, waiting = sequence(4, seed=2), sequence(4, seed=2)
    waiting.token_ids.append(PLACEHOLDER)
    assert sample(logits, [waiting]) == sample(logits, [known])


# ---- log-probabilities


def test_logprobs_are_of_the_logits_as_they_are_whatever_filters_apply() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    expected = logits.log_softmax(-1)[0].tolist()
    for params in ({"temperature": 0.0}, {"temperature": 0.1, "top_k": 1}):
        [token] = Sampler().sample(logits, [0], [sequence(logprobs=2, **params)])
        assert token.token_id == 1
        assert token.logprob == pytest.approx(expected[1])
        assert [i for i, _ in token.top_logprobs] == [1, 2]
        assert [p for _, p in token.top_logprobs] == pytest.approx([expected[1], expected[2]])


def test_each_sequence_gets_as_many_logprobs_as_it_asked_for() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(8))
    sequences = [sequence(logprobs=count) for count in (None, 0, 3, 20)]
    without, chosen, three, everything = Sampler().sample(logits, [0, 1, 2, 3], sequences)
    assert without == SampledToken(without.token_id)
    assert chosen.logprob is not None and chosen.top_logprobs == ()
    assert len(three.top_logprobs) == 3
    assert len(everything.top_logprobs) == 10
    assert math.isclose(sum(math.exp(p) for _, p in everything.top_logprobs), 1, abs_tol=1e-5)
    values = [p for _, p in everything.top_logprobs]
    assert values == sorted(values, reverse=True)
