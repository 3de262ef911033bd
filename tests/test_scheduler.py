"""The scheduler: what it promises about limits, order, progress and the content of the cache."""

import gc
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_model import VOCABULARY, Harness

from onecast.runtime.growth import Growth
from onecast.runtime.request import Request, SampledToken, SamplingParams, Sequence, Status
from onecast.runtime.scheduler import Scheduler, SchedulerConfig
from onecast.runtime.step import StepPlan

ROOMY = {
    "block_size": 4,
    "num_blocks": 400,
    "num_host_blocks": 0,
    "max_batch_tokens": 512,
    "max_batch_size": 64,
    "max_model_len": 128,
    "prefix_caching": False,
}


def config(**changes: Any) -> SchedulerConfig:
    return SchedulerConfig(**{**ROOMY, **changes})


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed * 1000 + length)
    return [draw.randrange(VOCABULARY) for _ in range(length)]


# -- under any traffic ---------------------------------------------------------------------------

tiny_limits = st.builds(
    config,
    block_size=st.integers(1, 5),
    num_blocks=st.integers(6, 24),
    num_host_blocks=st.sampled_from([0, 1, 3, 10, 40]),
    max_batch_tokens=st.integers(1, 40),
    max_batch_size=st.integers(1, 10),
    max_model_len=st.just(40),
    chunked_prefill=st.booleans(),
    prefix_caching=st.booleans(),
)
# Many begin alike, as requests with one system prompt do.
prompts = st.builds(
    lambda common, own: prompt(16)[:common] + own,
    st.sampled_from([0, 0, 4, 7, 12, 16]),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8),
)
bodies = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "max_tokens": st.integers(1, 14),
        "n": st.sampled_from([1, 1, 1, 2, 3, 5]),
        "ignore_eos": st.booleans(),
    }
)


class AnyTraffic(RuleBasedStateMachine):
    """Arrivals, steps, ends and aborts in any order, in a small cache; `Harness` checks it all."""

    @initialize(limits=tiny_limits, drafts=st.booleans())
    def start(self, limits: SchedulerConfig, drafts: bool) -> None:
        self.harness = Harness(limits, eos_token_ids=(7,), drafts=drafts)

    @rule(body=bodies)
    def arrive(self, body: dict[str, Any]) -> None:
        before = self.harness.scheduler.gauges
        try:
            self.harness.add(**body)
        except ValueError:
            assert self.harness.scheduler.gauges == before

    @rule(body=bodies, count=st.integers(2, 6))
    def several_arrive(self, body: dict[str, Any], count: int) -> None:
        for _ in range(count):
            self.arrive(body)

    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.harness.step()

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.harness.requests))
        self.harness.scheduler.abort(request.request_id)
        assert request.finished
        self.harness.check_references()

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data(), while_workers_compute=st.booleans())
    def finish(self, data: st.DataObject, while_workers_compute: bool) -> None:
        sequence = data.draw(st.sampled_from(self.harness.sequences))
        if while_workers_compute:
            self.harness.step(end_before_commit=sequence)
        else:
            self.harness.scheduler.finish(sequence, "stop")
            self.harness.check_references()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.run(max_steps=20_000)
            self.harness.check_empty()


AnyTraffic.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase


@settings(max_examples=150, deadline=None)
@given(limits=tiny_limits, batch=st.lists(bodies, min_size=1, max_size=12), drafts=st.booleans())
def test_everything_finishes_with_the_tokens_of_a_roomy_cache(
    limits: SchedulerConfig, batch: list[dict[str, Any]], drafts: bool
) -> None:
    tiny, roomy = Harness(limits, (7,), drafts=drafts), Harness(config(), (7,))
    for body in batch:
        try:
            tiny.add(**body)
        except ValueError:
            continue
        roomy.add(**body)
    roomy.run()
    # Every step computes a token. A preemption is paid for by a drawn token, and what a
    # recomputation repeats is at most one sequence.
    longest = sum(len(b["prompt"]) + b["n"] * b["max_tokens"] for b in batch)
    drawn = sum(b["n"] * b["max_tokens"] for b in batch)
    tiny.run(max_steps=longest + 2 * drawn * 34)
    assert tiny.outputs() == roomy.outputs()
    tiny.check_empty()
    roomy.check_empty()


# -- preemption ----------------------------------------------------------------------------------


def small_cache(**changes: Any) -> Harness:
    """Eight equal requests that grow from 3 to 19 blocks each, in a cache of 25."""
    harness = Harness(config(**{"num_blocks": 25, "num_host_blocks": 200, **changes}))
    for seed in range(8):
        harness.add(prompt(12, seed), max_tokens=64)
    return harness


def test_equal_requests_in_a_small_cache_are_each_swapped() -> None:
    harness = small_cache()
    harness.run()
    assert min(sequence.num_swaps for sequence in harness.sequences) >= 1
    counters = harness.scheduler.counters
    assert counters.swapped_out == counters.swapped_in > 0
    assert counters.preemptions == sum(s.num_swaps for s in harness.sequences)
    assert counters.recomputes == 0 and counters.prompt_tokens == 8 * 12
    assert counters.generated_tokens == 8 * 64
    assert 23 <= counters.peak_device_blocks <= 25
    harness.check_empty()


def test_preemption_spares_those_who_were_preempted_more_often() -> None:
    harness = small_cache()
    harness.run()
    swaps = [sequence.num_swaps for sequence in harness.sequences]
    assert max(swaps) - min(swaps) <= 2


@pytest.mark.parametrize("num_host_blocks", [0, 5])
def test_full_host_memory_means_recomputation_with_outputs_kept(num_host_blocks: int) -> None:
    harness = small_cache()
    short = Harness(config(num_blocks=25, num_host_blocks=num_host_blocks))
    for request in harness.requests:
        short.add(list(request.prompt_token_ids), max_tokens=64)
    harness.run()
    short.run()
    assert short.outputs() == harness.outputs()
    counters = short.scheduler.counters
    assert counters.recomputes > 0 and counters.generated_tokens == 8 * 64
    if not num_host_blocks:  # recomputed prompts are counted again, recomputed outputs are not
        assert counters.prompt_tokens == (8 + counters.recomputes) * 12
    assert (counters.swapped_out > 0) == (num_host_blocks > 0)


def test_a_step_that_swaps_out_swaps_nothing_in() -> None:
    harness = small_cache()
    harness.run()
    assert any(plan.block_ops.swap_out for plan in harness.plans)
    assert any(plan.block_ops.swap_in for plan in harness.plans)
    assert not any(plan.block_ops.swap_out and plan.block_ops.swap_in for plan in harness.plans)


def swap_steps(harness: Harness) -> list[StepPlan]:
    harness.run()
    plans = [plan for plan in harness.plans if plan.block_ops.swap_out or plan.block_ops.swap_in]
    assert plans
    return plans


def test_a_step_waits_for_no_swap_of_its_own() -> None:
    for plan in swap_steps(small_cache()):
        ops = plan.block_ops
        used = {block for copy in ops.copy for block in copy}
        used |= {b for entry in plan.scheduled for b in entry.sequence.block_table}
        assert not used & {device for device, _ in ops.swap_out}, plan.step
        assert not used & {device for _, device in ops.swap_in}, plan.step


def test_whoever_comes_back_computes_in_the_next_step() -> None:
    harness = small_cache()
    returned: set[Sequence] = set()
    num_returns = 0
    while True:
        was_swapped = list(harness.scheduler.queues.swapped)
        if harness.step() is None:
            break
        computed = {entry.sequence for entry in harness.plans[-1].scheduled}
        assert returned <= computed
        returned = {s for s in was_swapped if s.status is Status.RUNNING} - computed
        num_returns += len(returned)
    assert num_returns >= 5


def test_whoever_comes_back_alone_computes_at_once() -> None:
    harness = Harness(config(num_blocks=8, num_host_blocks=20))
    pair = [harness.add(prompt(12, seed), max_tokens=16).sequences[0] for seed in range(2)]
    while not harness.scheduler.queues.swapped:
        harness.step()
    (swapped,) = harness.scheduler.queues.swapped
    (other,) = (sequence for sequence in pair if sequence is not swapped)
    harness.scheduler.finish(other, "stop")
    harness.step()
    assert [entry.sequence for entry in harness.plans[-1].scheduled] == [swapped]
    assert harness.plans[-1].block_ops.swap_in


def test_a_swap_out_comes_a_step_before_its_blocks_are_needed() -> None:
    harness = Harness(config(num_blocks=10, num_host_blocks=20))
    for seed in range(2):
        harness.add(prompt(16, seed), max_tokens=16)
    harness.run()
    out = next(plan.step for plan in harness.plans if plan.block_ops.swap_out)
    # Four blocks each for the prompts; with token 17 both have five, with token 21 they want six.
    assert out == 4, "in the step that computes token 20"
    assert [len(plan.scheduled) for plan in harness.plans[: out + 1]] == [2, 2, 2, 2, 1]


def test_nobody_leaves_early_for_one_that_surely_ends() -> None:
    harness = Harness(config(num_blocks=10, num_host_blocks=20))
    harness.add(prompt(16, 0), max_tokens=5)  # its last token is drawn in the step before
    harness.add(prompt(16, 1), max_tokens=16)
    harness.run()
    assert harness.scheduler.counters.preemptions == 0


def test_without_host_memory_nobody_leaves_early() -> None:
    harness = Harness(config(num_blocks=10))
    for seed in range(2):
        harness.add(prompt(16, seed), max_tokens=16)
    for _ in range(5):
        harness.step()
    assert harness.scheduler.counters.preemptions == 0
    harness.step()
    assert harness.scheduler.counters.recomputes == 1


def test_a_decode_that_left_and_came_back_is_due_for_one_block() -> None:
    growth = Growth(block_size=4)
    (sequence,) = Request("r", tuple(prompt(5)), SamplingParams()).sequences
    sequence.block_table = [0, 1]
    growth.expect(sequence, step=10)
    assert (growth.due(13), growth.due(14), growth.most_due(14)) == ([], [sequence], 1)
    sequence.token_ids.append(1)
    growth.expect(sequence, step=11)
    assert growth.due(14) == [sequence]
    sequence.block_table.append(2)
    growth.expect(sequence, step=11)
    assert (growth.due(14), growth.due(18)) == ([], [sequence])


@pytest.mark.parametrize("num_blocks", range(20, 44, 3))
def test_whoever_comes_back_lets_all_go_on_for_a_block_of_tokens(num_blocks: int) -> None:
    harness = small_cache(num_blocks=num_blocks)
    admitted, returns = 0, []
    while harness.step() is not None:
        plan = harness.plans[-1]
        fresh = [s for s in plan.scheduled if s.sequence.num_computed == s.num_new_tokens]
        admitted = plan.step if fresh else admitted
        beside_others = len(plan.scheduled) > 1
        if plan.block_ops.swap_in and beside_others:
            returns.append(plan.step)
        if plan.block_ops.swap_out and returns and returns[-1] > admitted:
            assert plan.step - returns[-1] >= 4
    assert returns


def test_nobody_is_admitted_while_others_are_swapped() -> None:
    harness = Harness(config(num_blocks=12, num_host_blocks=100))
    for seed in range(2):
        harness.add(prompt(16, seed), max_tokens=28)
    while not harness.scheduler.gauges.swapped:
        harness.step()
    small = harness.add(prompt(1), max_tokens=1).sequences[0]
    assert harness.scheduler.gauges.free_blocks >= 3, "there would be room"
    while harness.scheduler.gauges.swapped:
        assert small.status is Status.WAITING
        harness.step()
    harness.run()
    harness.check_empty()


def test_a_recomputed_sequence_goes_before_new_ones() -> None:
    harness = Harness(config(num_blocks=12, max_batch_size=2))
    for seed in range(2):
        harness.add(prompt(16, seed), max_tokens=28)
    small = harness.add(prompt(1), max_tokens=20).sequences[0]
    while not harness.scheduler.counters.recomputes:
        harness.step()
    victim = harness.sequences[1]
    while victim.status is Status.WAITING:
        assert small.status is Status.WAITING
        harness.step()
    harness.run()
    harness.check_empty()


# -- prefill -------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    harness = Harness(config(max_batch_tokens=10))
    harness.add(prompt(4), max_tokens=20)
    harness.step()
    harness.add(prompt(30), max_tokens=2)
    harness.step()
    steps = [
        [(s.sequence.arrival, s.num_new_tokens, s.samples) for s in plan.scheduled]
        for plan in harness.plans
    ]
    assert steps == [[(0, 4, True)], [(0, 1, True), (1, 9, False)]]
    for _ in range(3):
        harness.step()
    last = harness.plans[-1]
    assert [(s.num_new_tokens, s.samples) for s in last.scheduled] == [(1, True), (3, True)]
    harness.run()
    harness.check_empty()


def test_without_chunked_prefill_a_prompt_is_computed_in_one_step() -> None:
    harness = Harness(config(max_batch_tokens=32, chunked_prefill=False))
    for length in (20, 20, 32, 5, 1):
        harness.add(prompt(length), max_tokens=6)
    harness.run()
    for sequence in harness.sequences:
        first = next(
            scheduled
            for plan in harness.plans
            for scheduled in plan.scheduled
            if scheduled.sequence is sequence
        )
        assert (first.num_new_tokens, first.samples) == (sequence.num_prompt, True)


def test_requests_start_in_order_of_arrival() -> None:
    harness = Harness(config(max_batch_tokens=16, max_batch_size=3))
    for length in (16, 3, 9, 1, 12, 5):
        harness.add(prompt(length), max_tokens=4)
    harness.run()
    firsts: dict[int, None] = {}
    for plan in harness.plans:
        for arrival in sorted(scheduled.sequence.arrival for scheduled in plan.scheduled):
            firsts.setdefault(arrival)
    assert list(firsts) == [0, 1, 2, 3, 4, 5]


# -- n > 1 ---------------------------------------------------------------------------------------


def test_choices_share_their_prompt_and_copy_what_they_write() -> None:
    shared, separate = Harness(config()), Harness(config())
    shared.add(prompt(18), n=4, max_tokens=10)
    for _ in range(4):
        separate.add(prompt(18), max_tokens=10)
    shared.run()
    separate.run()
    assert len({tuple(sequence.token_ids) for sequence in shared.sequences}) == 4
    counters = shared.scheduler.counters
    # 28 tokens are 7 blocks, the last never filled by the last token; 4 full ones are shared.
    assert (counters.peak_device_blocks, counters.copied) == (4 + 4 * 3, 3)
    assert separate.scheduler.counters.peak_device_blocks == 4 * 7
    assert counters.prompt_tokens == 18
    shared.check_empty()


def test_all_choices_draw_their_first_token_from_the_row_of_the_prompt() -> None:
    harness = Harness(config())
    harness.add(prompt(5), n=1)
    harness.add(prompt(6), n=3)
    harness.add(prompt(7), n=2)
    harness.step()
    plan = harness.plans[0]
    drawn = [(s.request.request_id, s.index) for s in plan.samples]
    assert drawn == [("r0", 0), ("r1", 0), ("r1", 1), ("r1", 2), ("r2", 0), ("r2", 1)]
    assert plan.sample_rows == [0, 1, 1, 1, 2, 2]
    harness.step()
    assert harness.plans[1].sample_rows == [0, 1, 2, 3, 4, 5]


def test_swapped_choices_share_their_blocks_on_the_host_and_again_on_the_device() -> None:
    harness = Harness(config(num_blocks=10, num_host_blocks=20))
    first = harness.add(prompt(8, 1), max_tokens=20)
    pair = harness.add(prompt(12, 2), n=2, max_tokens=20)
    moved: list[int] = []
    while harness.step() is not None:
        moved += [host for _, host in harness.plans[-1].block_ops.swap_out]
        if all(sequence.status is Status.SWAPPED for sequence in pair.sequences):
            one, other = (sequence.host_block_table for sequence in pair.sequences)
            assert one[:3] == other[:3] and not set(one[3:]) & set(other[3:])
            assert len(moved) == len(set(one + other)), "what is shared moves once"
            break
    assert first.sequences[0].status is Status.RUNNING
    harness.scheduler.finish(first.sequences[0], "stop")
    before = harness.scheduler.counters.swapped_in
    harness.step()
    one, other = (sequence.block_table for sequence in pair.sequences)
    assert one[:3] == other[:3] and not set(one[3:]) & set(other[3:])
    assert harness.scheduler.counters.swapped_in - before == len(moved)
    harness.run()
    harness.check_empty()


def test_places_are_kept_for_choices_not_forked_yet() -> None:
    harness = Harness(config(max_batch_size=4, max_batch_tokens=8))
    harness.add(prompt(20), n=3, max_tokens=4)
    harness.add(prompt(2), n=2, max_tokens=4)
    harness.add(prompt(2), n=1, max_tokens=4)
    harness.run()
    assert max(len(plan.samples) for plan in harness.plans) <= 4
    harness.check_empty()


def test_the_prompt_is_computed_anew_when_its_first_choice_ends_before_the_others_forked() -> None:
    harness = Harness(config(max_batch_tokens=8))
    request = harness.add(prompt(20), n=3, max_tokens=4)
    harness.step()
    harness.scheduler.finish(request.sequences[0], "stop")
    harness.scheduler.finish(request.sequences[2], "stop")
    harness.run()
    assert [len(s.output) for s in request.sequences] == [0, 4, 0]
    assert harness.scheduler.counters.prompt_tokens == 8 + 20
    harness.check_empty()


# -- ends ----------------------------------------------------------------------------------------


def finish_one(token_ids: list[int], eos: tuple[int, ...] = (), **params: Any) -> tuple[int, Any]:
    """Feed these tokens to one request; how many it took and its finish reason."""
    scheduler = Scheduler(config(), eos)
    request = Request("r", (1, 2, 3), SamplingParams(**params))
    scheduler.add(request)
    for taken, token_id in enumerate(token_ids, 1):
        plan = scheduler.schedule()
        assert plan is not None
        if scheduler.commit(plan, [SampledToken(token_id)]):
            assert scheduler.schedule() is None
            assert [token.token_id for token in request.sequences[0].output] == token_ids[:taken]
            return taken, request.sequences[0].finish_reason
    return len(token_ids), None


def test_end_of_text_stops_unless_ignored() -> None:
    assert finish_one([5, 9, 5], eos=(8, 9)) == (2, "stop")
    assert finish_one([5, 9, 5, 5], eos=(8, 9), ignore_eos=True, max_tokens=4) == (4, "length")


def test_stop_token_ids_stop_even_when_end_of_text_is_ignored() -> None:
    assert finish_one([5, 6, 5], stop_token_ids=(4, 6)) == (2, "stop")
    assert finish_one([5, 9, 5], eos=(9,), ignore_eos=True, stop_token_ids=(9,)) == (2, "stop")


def test_max_tokens_ends_as_length_and_an_end_token_in_the_last_place_as_stop() -> None:
    assert finish_one([5, 5, 5], max_tokens=3) == (3, "length")
    assert finish_one([5, 5, 9], eos=(9,), max_tokens=3) == (3, "stop")


def test_abort_ends_every_choice_in_any_state() -> None:
    harness = Harness(config(num_blocks=24, num_host_blocks=100, max_batch_tokens=8))
    for seed in range(8):
        harness.add(prompt(12, seed), max_tokens=28, n=1 + seed % 3)
    seen = set()
    for number in (7, 0, 6, 2, 5, 1, 3, 4):
        for _ in range(5):
            harness.step()
        seen |= {s.status for s in harness.requests[number].sequences}
        ended = harness.scheduler.abort(f"r{number}")
        assert all(s.finish_reason == "abort" for s in ended)
        harness.check_blocks()
    assert harness.scheduler.abort("r0") == []
    assert {Status.WAITING, Status.FORKING, Status.RUNNING, Status.SWAPPED} <= seen
    harness.check_empty()


def test_thousands_of_steps_leave_nothing_behind() -> None:
    harness = Harness(config(num_blocks=24, num_host_blocks=8))
    for round_ in range(150):
        harness.requests.clear()
        harness.plans.clear()
        for seed in range(4):
            harness.add(prompt(10, seed), f"{round_}-{seed}", max_tokens=20, n=1 + seed % 2)
        harness.run()
        harness.check_empty()
    assert harness.scheduler.step > 2000


@pytest.mark.slow
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_memory_is_flat_over_100_000_steps(prefix_caching: bool) -> None:
    """Containers, their bytes, and all small objects, with a dozen requests under way."""
    scheduler = Scheduler(
        config(num_blocks=48, num_host_blocks=40, prefix_caching=prefix_caching), (7,)
    )
    draw = random.Random(0)
    plan: StepPlan | None = None
    held: list[tuple[int, int, int]] = []
    number = 0
    for goal in range(20_000, 120_000, 20_000):
        while scheduler.step < goal:
            if len(scheduler.queues.requests) < 12:
                tokens = prompt(16)[: draw.choice([0, 8, 16])] + prompt(6, draw.randrange(200))
                params = SamplingParams(max_tokens=draw.randint(1, 40), n=draw.choice([1, 1, 3]))
                scheduler.add(Request(str(number), tuple(tokens), params))
                number += 1
            if draw.random() < 0.01:
                scheduler.abort(str(number - draw.randint(1, 10)))
            plan = step_ahead(scheduler, plan, draw)
        gc.collect()
        objects = gc.get_objects()
        held.append((sum(map(sys.getsizeof, objects)), len(objects), sys.getallocatedblocks()))
        del objects
    counters = scheduler.counters
    assert counters.preemptions > 1000 and counters.swapped_in > 1000
    assert bool(counters.prefix_hit_tokens) == prefix_caching
    (first_bytes, first_objects, first_blocks), *others = held
    for num_bytes, num_objects, num_blocks in others:
        assert num_bytes < first_bytes + 300_000, held
        assert num_objects < first_objects + 2_000, held
        assert num_blocks < first_blocks + 5_000, held


def step_ahead(scheduler: Scheduler, plan: StepPlan | None, draw: random.Random) -> StepPlan | None:
    """Carry out a step, or the first one; the next, planned before its tokens were known."""
    if plan is not None and scheduler.prune(plan) and plan.empty:
        plan = None
    plan = plan or scheduler.schedule()
    if plan is None:
        return None
    scheduler.advance(plan)
    draft = scheduler.schedule()
    scheduler.commit(plan, [SampledToken(draw.randrange(VOCABULARY)) for _ in plan.samples])
    return draft


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "length", "params", "message"),
    [
        (
            {"block_size": 16, "num_blocks": 40, "max_model_len": 1000},
            700,
            {"max_tokens": 100},
            r"prompt of 700 tokens \+ max_tokens 100 needs 50 blocks of 16 tokens;"
            r" the cache has 40",
        ),
        (
            {"num_blocks": 5},
            18,
            {"max_tokens": 3},
            "needs 6 blocks of 4 tokens; the cache has 5",
        ),
        (
            {},
            100,
            {"max_tokens": 29},
            r"prompt of 100 tokens \+ max_tokens 29 is 129 tokens; the limit is 128",
        ),
        (
            {"chunked_prefill": False, "max_batch_tokens": 30},
            31,
            {},
            "prompt of 31 tokens exceeds max_batch_tokens 30",
        ),
        ({}, 0, {}, "the prompt has 0 tokens; it needs at least 1"),
        ({}, 1, {"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({}, 1, {"n": 0}, "n is 0; it must be at least 1"),
        ({"max_batch_size": 4}, 1, {"n": 5}, r"n is 5; at most 4 .*max_batch_size 4"),
        ({"max_batch_tokens": 3}, 1, {"n": 4}, r"n is 4; at most 3 .*max_batch_tokens 3"),
    ],
)
def test_a_request_that_could_never_finish_is_refused(
    limits: dict[str, Any], length: int, params: dict[str, Any], message: str
) -> None:
    scheduler = Scheduler(config(**limits))
    with pytest.raises(ValueError, match=message):
        scheduler.add(Request("r", tuple(prompt(length)), SamplingParams(**params)))
    assert not scheduler.has_unfinished and scheduler.schedule() is None


def test_a_prompt_with_a_token_below_0_is_refused() -> None:
    scheduler = Scheduler(config())
    with pytest.raises(ValueError, match="prompt token -1 is below 0"):
        scheduler.add(Request("r", (5, -1, 7), SamplingParams()))
    assert not scheduler.has_unfinished


@pytest.mark.parametrize("prompt_length", [1, 20, 29, 31])
@pytest.mark.parametrize("num_host_blocks", [0, 8])
def test_the_largest_requests_that_fit_are_served(prompt_length: int, num_host_blocks: int) -> None:
    limits = {"num_blocks": 8, "max_batch_tokens": 5, "max_model_len": 32}
    harness = Harness(config(num_host_blocks=num_host_blocks, **limits))
    for seed in range(3):
        harness.add(prompt(prompt_length, seed), max_tokens=32 - prompt_length)
    harness.run()
    assert {len(sequence.output) for sequence in harness.sequences} == {32 - prompt_length}


def test_a_choice_that_needs_the_whole_cache_comes_back_once_it_is_empty() -> None:
    harness = Harness(config(num_blocks=8, num_host_blocks=8))
    harness.add(prompt(24), n=2, max_tokens=8)
    harness.run()
    assert [s.num_swaps for s in harness.sequences] == [0, 1]
    assert harness.scheduler.counters.peak_device_blocks == 8
    harness.check_empty()


def test_an_id_in_use_is_refused_and_a_finished_one_is_free_again() -> None:
    harness = Harness(config())
    harness.add(prompt(3), "a", max_tokens=2)
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        harness.add(prompt(3), "a")
    harness.run()
    harness.add(prompt(3), "a", max_tokens=2)
    harness.run()


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("block_size", 0, 1),
        ("num_blocks", -1, 1),
        ("num_host_blocks", -1, 0),
        ("max_batch_tokens", 0, 1),
        ("max_batch_size", 0, 1),
        ("max_model_len", 0, 1),
    ],
)
def test_limits_are_checked_once(name: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least {least}"):
        config(**{name: value})


def test_deciding_needs_no_torch() -> None:
    code = "import sys, onecast.runtime.scheduler; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == "False\n"
