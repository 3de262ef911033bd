"""Planning a step while the one before it is carried out changes nothing but when it is done."""

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_runs import Case, Outcome, run_cases
from tiny_checkpoints import make_variant

from onecast.comm import open_channel
from onecast.comm.testing import run_ranks
from onecast.runtime.config import RunConfig
from onecast.runtime.engine import Engine
from onecast.runtime.executor import StepExecutor
from onecast.runtime.kv_cache import CacheSpec, KVCache
from onecast.runtime.observer import NullObserver
from onecast.runtime.request import PLACEHOLDER, Request, SampledToken, SamplingParams
from onecast.runtime.sampling import Sampler
from onecast.runtime.scheduler import Scheduler, SchedulerConfig
from onecast.runtime.tokenizer import Tokenizer

LENGTHS = (1, 7, 8, 30, 21, 13, 26, 16, 20, 25)
MAX_TOKENS = (24, 29, 30, 17, 24, 1, 22, 40, 2, 24)
COMMON = 16  # tokens that every prompt of the sixth and later requests begins with

# How the same requests are scheduled.
PRESSURE: dict[str, dict[str, Any]] = {
    "roomy": {},
    "swapping": {"num_blocks": 24},
    "swapping, nothing cached": {"num_blocks": 24, "prefix_caching": False},
    "recomputing": {"num_blocks": 24, "num_host_blocks": 0},
    "swapping in chunks": {"num_blocks": 24, "num_host_blocks": 20, "max_batch_tokens": 16},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("checkpoint") / "llama", "llama")


def whole_case(checkpoint: Path) -> Case:
    """Ten requests that all run to their last token, three of them with choices."""
    rng = random.Random(3)
    common = [rng.randrange(2, 250) for _ in range(COMMON)]
    prompts = []
    for number, length in enumerate(LENGTHS):
        own = [rng.randrange(2, 250) for _ in range(length)]
        prompts.append(common + own if number >= 5 else own)
    params = [
        SamplingParams(
            max_tokens=max_tokens,
            n=3 if number in (2, 6, 8) else 1,
            temperature=0.0 if number % 4 == 1 else 0.9,
            seed=100 * number,
            ignore_eos=True,
            logprobs=2,
        )
        for number, max_tokens in enumerate(MAX_TOKENS)
    ]
    return Case(checkpoint, prompts, params, block_size=4)


def ending_case(case: Case, whole: Outcome) -> Case:
    """The same requests; many end early: by a token, a stop string, an abort; some come later."""
    params = list(case.params)
    for number, stop_at in ((0, 15), (1, 23), (4, 11), (9, 9)):
        token_id = whole.token_ids[number][0][stop_at]
        params[number] = replace(params[number], stop_token_ids=(token_id,))
    for number, cut in ((2, 14), (6, 5)):  # with three choices each
        text = max(whole.texts[number], key=len)
        params[number] = replace(params[number], stop=(text[cut : cut + 2], "never there"))
    params[3] = replace(params[3], ignore_eos=False)
    eos_token_ids = (whole.token_ids[3][0][12],)
    aborts, arrivals = {7: 18, 9: 30}, {4: 3, 7: 6, 8: 6, 9: 11}
    return replace(
        case, params=params, eos_token_ids=eos_token_ids, aborts=aborts, arrivals=arrivals
    )


VARIANTS: tuple[dict[str, bool], ...] = (
    {"overlap": False},  # a step is planned when the one before is over
    {},  # while the other ranks wake up
    {"behind_launch": True},  # while a device is at the forward
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, list(PRESSURE), 3), id="tp1"),
        pytest.param((2, ["roomy", "swapping"], 2), id="tp2"),
        pytest.param(
            (2, ["roomy", "recomputing", "swapping in chunks"], 2),
            id="tp2-more",
            marks=pytest.mark.slow,
        ),
    ],
)
def outcomes(
    request: pytest.FixtureRequest, checkpoint: Path
) -> dict[str, tuple[list[Outcome], list[Outcome]]]:
    """By pressure: the whole case in its variants, and the one in which sequences end early."""
    tp, names, num_variants = request.param
    whole = whole_case(checkpoint)
    (roomy,) = run_cases([whole])
    ending = ending_case(whole, roomy)
    cases = [
        replace(case, **PRESSURE[name], **variant)
        for name in names
        for case in (whole, ending)
        for variant in VARIANTS[:num_variants]
    ]
    done = iter(run_cases(cases, tp))
    return {
        name: ([next(done) for _ in range(num_variants)], [next(done) for _ in range(num_variants)])
        for name in names
    }


Outcomes = dict[str, tuple[list[Outcome], list[Outcome]]]


def test_what_is_published_is_the_same_frame_for_frame_where_nothing_ends_early(
    outcomes: Outcomes,
) -> None:
    for name, ((plain, *ahead), _) in outcomes.items():
        for outcome in ahead:
            assert outcome.published == plain.published, name
            assert outcome.outputs == plain.outputs, name  # log-probabilities to the last bit
            assert outcome.texts == plain.texts, name
        assert {reason for n in plain.finish_reasons for reason in n} == {"length"}
        ids = [token for frame in plain.published for token in frame["input_ids"]]
        assert PLACEHOLDER not in ids
        assert bool(plain.swapped_in) == ("swapping" in name), name
        assert bool(plain.recomputes) == ("recomputing" in name), name
        if name != "roomy":  # there all come at once, and find nothing
            assert bool(plain.prefix_hits) == ("nothing cached" not in name), name
        assert plain.copied > 0


def test_tokens_texts_and_reasons_are_the_same_where_sequences_end_at_any_time(
    outcomes: Outcomes,
) -> None:
    roomy = outcomes["roomy"][1][0]
    for name, (_, ending) in outcomes.items():
        assert bool(ending[1].swapped_in) == ("swapping" in name), name
        assert bool(ending[1].recomputes) == ("recomputing" in name), name
        for outcome in ending:
            for number, choices in enumerate(outcome.outputs):
                for index, output in enumerate(choices):
                    reason = outcome.finish_reasons[number][index]
                    expected = roomy.outputs[number][index]
                    if "abort" in (reason, roomy.finish_reasons[number][index]):
                        # How far it came by then is a matter of the schedule.
                        num_both = min(len(output), len(expected))
                        assert_same_tokens(output[:num_both], expected[:num_both])
                        continue
                    assert_same_tokens(output, expected)
                    assert reason == roomy.finish_reasons[number][index], name
                    assert outcome.texts[number][index] == roomy.texts[number][index], name
    reasons = [reason for n in roomy.finish_reasons for reason in n]
    assert min(reasons.count("stop"), reasons.count("length")) >= 5 and "abort" in reasons


def assert_same_tokens(output: list[SampledToken], expected: list[SampledToken]) -> None:
    """The same draws; log-probabilities as far as other batches round alike."""
    assert [t.token_id for t in output] == [t.token_id for t in expected]
    for token, other in zip(output, expected, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=2e-4)


def test_every_frame_is_a_step_of_every_rank_and_nothing_is_held_at_the_end(
    outcomes: Outcomes,
) -> None:
    for name, (whole, ending) in outcomes.items():
        for outcome in whole + ending:
            steps = [frame["step"] for frame in outcome.published]
            assert steps == list(range(outcome.steps)) and outcome.frames == outcome.steps
            assert set(outcome.follower_steps) <= {outcome.steps}
            assert all(len(frame["seq_lens"]) for frame in outcome.published), name
            limits = {"num_blocks": 400, "num_host_blocks": 400, **PRESSURE[name]}
            assert outcome.free_at_end == (limits["num_blocks"], limits["num_host_blocks"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_tokens_from_the_same_frames(checkpoint: Path) -> None:
    whole = replace(whole_case(checkpoint), device="cuda", num_blocks=24)
    plain, ahead = run_cases([replace(whole, overlap=False), whole])
    assert ahead.published == plain.published
    assert ahead.token_ids == plain.token_ids and ahead.texts == plain.texts
    assert ahead.swapped_in > 0


# -- plans that lose all their sequences ---------------------------------------------------------


@pytest.fixture(scope="module")
def emptied(checkpoint: Path) -> dict[str, Outcome]:
    """A sequence alone on the device ends while the next step, in which another returns to it, is
    planned: that step only moves blocks."""
    rng = random.Random(8)
    prompts = [[rng.randrange(2, 250) for _ in range(length)] for length in (4, 8, 8, 5)]
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=0.9, seed=number, ignore_eos=True)
        for number, max_tokens in enumerate((40, 14, 20, 6))
    ]
    case = Case(checkpoint, prompts, params, block_size=4, num_blocks=12, arrivals={3: 1000})
    (whole,) = run_cases([case])
    returns = next(
        frame["step"]
        for frame in whole.published
        if frame["swap_in"] and len(frame["seq_lens"]) == 1
    )
    own = whole.token_ids[0][0]
    assert own.index(own[returns - 1]) == returns - 1, "another seed is needed"
    params[0] = replace(params[0], stop_token_ids=(own[returns - 1],))
    ending = replace(case, params=params)
    # ... or the other is aborted before that step is published, and nothing is unfinished.
    leaving = replace(ending, aborts={2: returns})
    names = "plain", "ahead", "left with moves"
    cases = [replace(ending, overlap=False), ending, leaving]
    found = dict(zip(names, run_cases(cases, 2), strict=True))
    found["whole"] = whole
    return found


def moves_alone(outcome: Outcome) -> list[dict[str, Any]]:
    return [frame for frame in outcome.published if not frame["seq_lens"]]


def test_a_step_left_with_moves_alone_is_carried_out_without_a_forward(
    emptied: dict[str, Outcome],
) -> None:
    plain, ahead = emptied["plain"], emptied["ahead"]
    assert not moves_alone(plain)
    (frame,) = moves_alone(ahead)
    assert frame["swap_in"] and not frame["input_ids"] and not frame["logits_indices"]
    assert ahead.follower_steps == [ahead.steps] == [plain.steps + 1]
    assert ahead.outputs == plain.outputs and ahead.texts == plain.texts
    assert plain.outputs[2] == emptied["whole"].outputs[2]
    assert plain.finish_reasons == [["stop"], ["length"], ["length"], ["length"]]


def test_moves_that_are_left_when_nothing_is_unfinished_come_before_the_next_request(
    emptied: dict[str, Outcome],
) -> None:
    outcome = emptied["left with moves"]
    (frame,) = moves_alone(outcome)
    assert outcome.finish_reasons == [["stop"], ["length"], ["abort"], ["length"]]
    assert [len(f["seq_lens"]) for f in outcome.published[frame["step"] :]] == [0] + [1] * 6
    assert outcome.outputs[3] == emptied["whole"].outputs[3]
    assert outcome.follower_steps == [outcome.steps]


def test_a_plan_left_with_nothing_is_dropped_and_its_number_used_again(checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    case = Case(checkpoint, [(5, 6, 7)] * 2, [params] * 2, max_batch_size=1)
    (whole,) = run_cases([case])
    (own,) = whole.token_ids[0]
    stop_at = next(index for index in range(2, 20) if own[index] not in own[:index])
    stopping = replace(params, stop_token_ids=(own[stop_at],))
    (outcome,) = run_cases([replace(case, params=[stopping, stopping])])
    assert outcome.token_ids == [[own[: stop_at + 1]]] * 2
    assert outcome.texts == [[Tokenizer(checkpoint).decode(own[:stop_at])]] * 2
    steps = [frame["step"] for frame in outcome.published]
    assert steps == list(range(2 * (stop_at + 1)))


def test_a_token_that_nobody_waits_for_any_more_is_not_drawn() -> None:
    limits = SchedulerConfig(4, 40, 0, max_batch_tokens=64, max_batch_size=8, max_model_len=60)
    scheduler = Scheduler(limits)
    requests = [Request(name, (5, 6, 7), SamplingParams(max_tokens=9)) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.advance(plan)
    left, other = (request.sequences[0] for request in requests)
    assert left.token_ids == other.token_ids == [5, 6, 7, PLACEHOLDER]
    draft = scheduler.schedule()
    assert draft is not None and draft.samples == [left, other]
    scheduler.abort("a")
    assert scheduler.commit(plan, [SampledToken(8), SampledToken(9)]) == []
    assert (left.token_ids, left.output) == ([5, 6, 7], [])
    assert (other.token_ids, other.output) == ([5, 6, 7, 9], [SampledToken(9)])
    assert scheduler.prune(draft)
    assert (draft.samples, draft.sample_rows, draft.step) == ([other], [0], 1)


# -- errors --------------------------------------------------------------------------------------


class Scripted:
    """A model that draws one token, or fails in the forward of a step."""

    cache_spec = CacheSpec(1, 1, 8, torch.float32)

    def __init__(self, fails_at: int | None = None, nan_at: int | None = None) -> None:
        self.calls = 0
        self._fails_at, self._nan_at = fails_at, nan_at

    def forward(self, inputs: Any, kv_cache: KVCache) -> torch.Tensor:
        self.calls += 1
        if self.calls - 1 == self._fails_at:
            raise MemoryError("in the forward")
        logits = torch.zeros(len(inputs["logits_indices"]), 300)
        logits[:, 5] = 1
        if self.calls - 1 == self._nan_at:
            logits[1] = torch.nan
        return logits


class Watching(NullObserver):
    """Writes down phases as they begin, and how requests end."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.ends: list[tuple[int, str, bool]] = []
        self.requests = self

    def phase(self, name: str) -> Any:
        self.phases.append(name)
        return super().phase(name)

    def admitted(self, *of: Any) -> None:
        return None

    scheduled = admitted

    def finished(self, number: int, *values: Any) -> None:
        self.ends.append((number, *values[-2:]))


def make_engine(
    observer: Watching, model: Scripted, overlap: bool, executor: Callable[..., StepExecutor]
) -> Engine:
    sizes = {"num_blocks": 40, "num_host_blocks": 8, "block_size": 4}
    limits = SchedulerConfig(**sizes, max_batch_tokens=64, max_batch_size=8, max_model_len=60)
    engine = Engine(
        scheduler=Scheduler(limits),
        channel=open_channel(dist.group.WORLD, timeout_s=60),
        executor=executor(model, KVCache(model.cache_spec, device="cpu", **sizes), observer),
        sampler=Sampler(),
        tokenizer=Tokenizer(Path(__file__).parents[1] / "runtime" / "demo" / "checkpoint"),
        observer=observer,
        overlap=overlap,
    )
    for name in "ab":
        params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
        engine.add(Request(name, (5, 6, 7), params))
    return engine


FAILURES = {"forward": {"fails_at": 4}, "sampling": {"nan_at": 4}, "planning": {}}


def fail(rank: int, failure: str, overlap: bool) -> tuple[str, str, int, Any, int]:
    """Error type and text, steps published, how requests ended, threads left."""
    before = threading.active_count()
    observer = Watching()
    engine = make_engine(observer, Scripted(**FAILURES[failure]), overlap, StepExecutor)
    if failure == "planning":
        plan = engine.scheduler.schedule

        def broken() -> Any:
            if engine.scheduler.step == 5:
                raise AssertionError("in the plan")
            return plan()

        engine.scheduler.schedule = broken
    try:
        while engine.has_unfinished:
            engine.step()
    except Exception as error:
        threads = threading.active_count() - before
        return type(error).__name__, str(error), engine.frames.count, observer.ends, threads
    raise AssertionError("it came to its end")


@pytest.mark.parametrize("overlap", [True, False])
def test_errors_surface_in_the_step_and_end_what_is_under_way(overlap: bool) -> None:
    for failure, kind, text in (
        ("forward", "MemoryError", "in the forward"),
        ("sampling", "FloatingPointError", "request 'b' at token 7"),
        ("planning", "AssertionError", "in the plan"),
    ):
        ((name, message, steps, ends, threads),) = run_ranks(fail, 1, failure, overlap)
        assert (name, steps) == (kind, 5), failure
        assert text in message
        assert ends == [(0, kind, True), (1, kind, True)]
        assert threads == 0


# -- when it is done -----------------------------------------------------------------------------


def watch(rank: int) -> dict[str, list[str]]:
    """The phases of the second step of each kind of driver."""

    class Launching(StepExecutor):
        asynchronous = True

    phases = {}
    for name, overlap, executor in (
        ("plain", False, StepExecutor),
        ("ahead", True, StepExecutor),
        ("behind the launch", True, Launching),
    ):
        observer = Watching()
        engine = make_engine(observer, Scripted(), overlap, executor)
        engine.step()
        observer.phases.clear()
        engine.step()
        phases[name] = observer.phases
    return phases


def test_the_next_step_is_planned_behind_the_publish_or_behind_the_launch() -> None:
    (phases,) = run_ranks(watch, 1)
    assert phases == {
        "plain": ["schedule", "step.publish", "model.forward", "sample", "commit"],
        "ahead": [
            *("schedule", "step.publish", "schedule.ahead", "model.forward", "sample", "commit")
        ],
        "behind the launch": [
            *("schedule", "step.publish", "model.forward", "schedule.ahead", "sample", "commit")
        ],
    }


def test_the_flags_reach_the_workers() -> None:
    config = RunConfig(
        model=Path("m"), input=Path("i"), output=Path("o"), no_overlap=True, no_prefix_caching=True
    )
    assert {"--no-overlap", "--no-prefix-caching"} <= set(config.to_argv())
    plain = RunConfig(model=Path("m"), input=Path("i"), output=Path("o"))
    assert not {"--no-overlap", "--no-prefix-caching"} & set(plain.to_argv())
