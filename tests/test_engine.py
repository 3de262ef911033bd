"""The engine answers as transformers does, whatever its scheduler had to do on the way."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from engine_runs import Case, Outcome, run_cases
from tiny_checkpoints import make_variant

from onecast.runtime.request import SamplingParams

VARIANTS = ("llama", "mistral", "qwen2", "qwen3-tied")
DEMO = Path(__file__).parents[1] / "runtime" / "demo" / "checkpoint"
LENGTHS = (1, 7, 8, 9, 60, 33, 120, 16)
NUM_GENERATED = 24

GREEDY = SamplingParams(max_tokens=NUM_GENERATED, temperature=0.0, ignore_eos=True, logprobs=0)

# How the same requests are scheduled: with room for all, in small chunks, whole prompts only, and
# in a cache that holds one of the long ones and little beside it.
SCHEDULES: dict[str, dict[str, int | bool]] = {
    "roomy": {},
    "chunked": {"max_batch_tokens": 16},
    "whole prompts": {"chunked_prefill": False, "max_batch_tokens": 128},
    "swapping": {"num_blocks": 24},
    "recomputing": {"num_blocks": 24, "num_host_blocks": 0},
    "swapping in chunks": {"num_blocks": 24, "num_host_blocks": 16, "max_batch_tokens": 16},
    "swapping, nothing cached": {"num_blocks": 24, "prefix_caching": False},
    "recomputing, nothing cached": {
        "num_blocks": 24,
        "num_host_blocks": 0,
        "prefix_caching": False,
    },
}


def prompts_of(lengths: tuple[int, ...], vocabulary: int) -> list[tuple[int, ...]]:
    rng = random.Random(11)
    return [tuple(rng.randrange(2, vocabulary) for _ in range(length)) for length in lengths]


@cache
def reference_model(checkpoint: Path) -> torch.nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def assert_greedy_as_transformers(
    checkpoint: Path, prompt: tuple[int, ...], outcome: Outcome, number: int
) -> None:
    """Each token is the most likely one after those before it, which is what greedy means."""
    (output,) = outcome.outputs[number]
    tokens = [token.token_id for token in output]
    assert len(tokens) == NUM_GENERATED
    with torch.inference_mode():
        logits = reference_model(checkpoint)(torch.tensor([[*prompt, *tokens]])).logits[0]
    logits = logits[len(prompt) - 1 : -1].float()
    assert logits.argmax(-1).tolist() == tokens
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    given = torch.tensor([token.logprob for token in output])
    torch.testing.assert_close(given, wanted, atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_variant(root / name, name) for name in VARIANTS} | {"demo": DEMO}


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_tokens_equal_transformers_under_every_schedule(
    checkpoints: dict[str, Path], tp: int
) -> None:
    names = [
        (family, schedule)
        for family in checkpoints
        for schedule in SCHEDULES
        if family == "llama" or "nothing cached" not in schedule
    ]
    prompts = prompts_of(LENGTHS, 250)
    outcomes = run_cases(
        [
            Case(checkpoints[family], prompts, [GREEDY] * len(prompts), **SCHEDULES[schedule])  # type: ignore[arg-type]
            for family, schedule in names
        ],
        tp,
    )
    for (family, schedule), outcome in zip(names, outcomes, strict=True):
        roomy = outcomes[names.index((family, "roomy"))]
        if outcome is roomy:
            for number, prompt in enumerate(prompts):
                assert_greedy_as_transformers(checkpoints[family], prompt, outcome, number)
        assert outcome.token_ids == roomy.token_ids, (family, schedule)
        assert bool(outcome.swapped_out) == ("swapping" in schedule), schedule
        assert bool(outcome.swapped_in) == ("swapping" in schedule), schedule
        assert bool(outcome.recomputes) == ("recomputing" in schedule), schedule
        if "nothing cached" in schedule:
            assert outcome.swapped_in == outcome.swapped_out
        assert outcome.follower_steps == [outcome.steps] * (tp - 1)


@pytest.mark.parametrize("tp", [1, 2])
def test_every_request_swapped_at_least_once_still_gives_the_same_tokens(
    checkpoints: dict[str, Path], tp: int
) -> None:
    prompts = prompts_of((8,) * 6, 250)
    case = Case(checkpoints["llama"], prompts, [GREEDY] * 6, num_blocks=11, block_size=4)
    (outcome,) = run_cases([case], tp)
    assert min(outcome.swaps) >= 1, outcome.swaps
    for number, prompt in enumerate(prompts):
        assert_greedy_as_transformers(case.checkpoint, prompt, outcome, number)


def test_four_choices_equal_four_seeded_runs_and_share_their_prompt() -> None:
    rng = random.Random(5)
    prompts = [tuple(rng.randrange(4, 1000) for _ in range(45)) for _ in range(3)]

    def params(n: int, seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=20, n=n, seed=seed, temperature=0.9, top_p=0.95, ignore_eos=True
        )

    together = Case(DEMO, prompts, [params(4, 100 * i) for i in range(3)])
    apart = Case(
        DEMO,
        [prompt for prompt in prompts for _ in range(4)],
        [params(1, 100 * i + k) for i in range(3) for k in range(4)],
    )
    pressed = Case(DEMO, prompts, together.params, num_blocks=20)
    shared, separate, swapped = run_cases([together, apart, pressed], 2)
    assert [n for request in shared.token_ids for n in request] == [
        choice for request in separate.token_ids for choice in request
    ]
    assert swapped.token_ids == shared.token_ids
    assert len({tuple(choice) for choice in shared.token_ids[0]}) == 4
    assert shared.peak_blocks < separate.peak_blocks
    assert shared.copied >= 3 * 3  # the last, half-filled block of each prompt, for three choices
    assert separate.copied == 0
    assert swapped.swapped_out > 0
    for outcome, case in ((shared, together), (swapped, pressed)):
        assert outcome.free_at_end == (case.num_blocks, case.num_host_blocks)


@pytest.mark.slow
def test_a_thousand_steps_take_one_broadcast_each_but_for_growth(
    checkpoints: dict[str, Path],
) -> None:
    rng = random.Random(2)
    lengths = tuple(rng.choice((1, 5, 40, 150, 300)) for _ in range(150))
    params = [
        SamplingParams(max_tokens=rng.randrange(1, 80), temperature=0.0, ignore_eos=True, n=n)
        for n in rng.choices((1, 1, 1, 3), k=len(lengths))
    ]
    case = Case(
        checkpoints["qwen2"],
        prompts_of(lengths, 250),
        params,
        num_blocks=60,
        num_host_blocks=120,
        max_batch_tokens=48,
        max_batch_size=12,
        transport="process-group",
    )
    (outcome,) = run_cases([case], 2)
    assert outcome.steps >= 1000
    assert outcome.frames == outcome.steps
    assert outcome.group_broadcasts == outcome.channel_broadcasts
    growth = outcome.group_broadcasts - outcome.steps
    assert 0 <= growth <= 12, f"{growth} frames outgrew the capacity"
    assert outcome.swapped_out > 0
    assert outcome.copied > 0


def test_stop_strings_end_a_sequence_and_are_not_part_of_its_text() -> None:
    from onecast.runtime.tokenizer import Tokenizer

    prompt = tuple(Tokenizer(DEMO).encode("And the LORD said unto Moses,"))
    plain = SamplingParams(max_tokens=40, temperature=0.0)
    (whole,) = run_cases([Case(DEMO, [prompt], [plain])])
    ((text,),) = whole.texts
    words = text.split()
    stop = f" {words[4]} {words[5]}"
    stopped = SamplingParams(max_tokens=40, temperature=0.0, stop=("never there", stop))
    (cut,) = run_cases([Case(DEMO, [prompt], [stopped])])
    assert cut.texts == [[text[: text.index(stop)]]]
    assert cut.finish_reasons == [["stop"]]
    assert cut.steps < whole.steps
