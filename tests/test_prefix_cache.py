"""Prefix caching: what is found again, what is given up first, and that it is never stale.

`Harness` holds every cached block, on the device and on the host, against the tokens that its key
stands for, after every step; the tests here say when there are to be hits, and how many.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from scheduler_model import Harness

from onecast.runtime.block_manager import BlockManager
from onecast.runtime.request import (
    PLACEHOLDER,
    Request,
    SampledToken,
    SamplingParams,
    Sequence,
    Status,
)
from onecast.runtime.scheduler import MAX_WRITE_BACKS, Scheduler, SchedulerConfig
from onecast.runtime.step import StepPlan

SIZE = 4
ROOMY = {
    "block_size": SIZE,
    "num_blocks": 400,
    "num_host_blocks": 0,
    "max_batch_tokens": 512,
    "max_batch_size": 64,
    "max_model_len": 128,
}


def harness(**changes: Any) -> Harness:
    return Harness(SchedulerConfig(**{**ROOMY, **changes}))


def tokens(length: int, start: int = 0) -> list[int]:
    return list(range(start, start + length))


def serve(one: Harness, prompt: list[int], max_tokens: int = 1) -> Sequence:
    """Run a request to its end, alone; its only sequence."""
    (sequence,) = one.add(prompt, max_tokens=max_tokens).sequences
    one.run()
    return sequence


def first_chunks(one: Harness) -> dict[int, int]:
    """Request number -> new tokens of the first step that had any of it."""
    chunks: dict[int, int] = {}
    for plan in one.plans:
        for entry in plan.scheduled:
            chunks.setdefault(entry.sequence.arrival, entry.num_new_tokens)
    return chunks


# -- hits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (18, 16), (20, 16), (21, 20)]
)
def test_a_prompt_seen_before_is_computed_from_its_last_block_on(length: int, cached: int) -> None:
    one = harness()
    assert serve(one, tokens(length)).num_cached_tokens == 0
    again = serve(one, tokens(length))
    assert again.num_cached_tokens == cached
    assert first_chunks(one) == {0: length, 1: length - cached}
    counters = one.scheduler.counters
    assert (counters.prefix_queried_tokens, counters.prefix_hit_tokens) == (2 * length, cached)
    assert counters.prompt_tokens == 2 * length - cached
    assert again.token_ids == one.sequences[0].token_ids


def test_only_what_follows_the_same_tokens_is_a_hit() -> None:
    one = harness()
    serve(one, tokens(12))
    other = tokens(12)
    other[5] += 1
    assert serve(one, other).num_cached_tokens == 4, "block 2 is equal, after another block 1"
    assert serve(one, tokens(12)[4:]).num_cached_tokens == 0
    assert serve(one, [*tokens(12), 1, 2, 3]).num_cached_tokens == 12


def test_requests_share_the_blocks_of_one_that_is_still_running() -> None:
    one = harness()
    (first,) = one.add(tokens(14), max_tokens=20).sequences
    one.step()
    (second,) = one.add(tokens(14), max_tokens=20).sequences
    one.step()
    assert first.status is second.status is Status.RUNNING
    assert first.block_table[:3] == second.block_table[:3]
    assert not set(first.block_table[3:]) & set(second.block_table[3:])
    one.run()
    one.check_empty()


def test_the_chunks_of_a_long_prompt_are_found_before_it_is_through() -> None:
    one = harness(max_batch_tokens=8)
    one.add(tokens(40))
    one.step()
    one.step()
    (second,) = one.add([*tokens(10), 0, 0]).sequences
    one.run()
    assert second.num_cached_tokens == 8


def test_who_waits_for_room_is_let_in_when_its_prefix_has_been_computed() -> None:
    one = harness(num_blocks=18)
    one.add(tokens(48), max_tokens=8)
    (second,) = one.add([*tokens(46), 0, 0, 0], max_tokens=2).sequences
    one.step()
    assert second.status is Status.WAITING, "thirteen blocks more, as far as is known"
    one.step()
    assert second.num_cached_tokens == 44
    one.run()


def test_answers_are_found_like_prompts() -> None:
    one = harness()
    first = serve(one, tokens(6), max_tokens=10)
    assert len(first.token_ids) == 16
    follow_up = serve(one, [*first.token_ids, 1, 2])
    # The last token drawn was never computed, so it is in no block.
    assert follow_up.num_cached_tokens == 12


def test_forked_choices_find_and_are_found() -> None:
    one = harness()
    first = one.add(tokens(10), n=3, max_tokens=8)
    one.run()
    for sequence in first.sequences:
        assert serve(one, [*sequence.token_ids, 1]).num_cached_tokens == 16
    second = one.add(tokens(10), n=3, max_tokens=8)
    one.run()
    assert [s.num_cached_tokens for s in second.sequences] == [8, 0, 0], "computed by the first"
    assert [s.token_ids for s in first.sequences] == [s.token_ids for s in second.sequences]


def test_a_recomputed_sequence_finds_what_is_left_of_itself() -> None:
    one = harness(num_blocks=12)
    for seed in range(2):
        one.add(tokens(12, 50 * seed), max_tokens=28)
    one.run()
    counters = one.scheduler.counters
    assert counters.recomputes > 0 and counters.prefix_hit_tokens > 0
    assert all(sequence.num_cached_tokens == 0 for sequence in one.sequences), "first admission"
    one.check_empty()


def test_without_prefix_caching_nothing_is_kept() -> None:
    one = harness(prefix_caching=False, num_host_blocks=20)
    for _ in range(2):
        assert serve(one, tokens(20)).num_cached_tokens == 0
        assert not any(one.scheduler.blocks.device.keys)
    counters = one.scheduler.counters
    assert counters.prefix_queried_tokens == counters.prefix_hit_tokens == 0
    assert counters.prompt_tokens == 40


# -- keys ------------------------------------------------------------------------------------------


def test_a_token_that_is_not_known_yet_is_never_part_of_a_key() -> None:
    manager = BlockManager(10, 0, SIZE)
    (sequence,) = Request("r", (1, 2, 3), SamplingParams()).sequences
    manager.begin_step()
    manager.reserve(sequence)
    sequence.token_ids.append(PLACEHOLDER)
    sequence.num_computed = 3
    manager.register(sequence)
    assert not any(manager.device.keys)
    assert manager.match(sequence).num_blocks == 0
    sequence.num_computed = 4
    with pytest.raises(AssertionError, match="tokens not known yet"):
        manager.register(sequence)


def test_two_who_compute_the_same_at_once_keep_their_blocks_and_one_copy_stays() -> None:
    one = harness()
    pair = [one.add(tokens(9), max_tokens=3).sequences[0] for _ in range(2)]
    one.step()
    assert not set(pair[0].block_table) & set(pair[1].block_table)
    one.run()
    one.check_empty()
    device = one.scheduler.blocks.device
    assert sum(key is not None for key in device.keys) == 2
    assert serve(one, tokens(9)).num_cached_tokens == 8


# -- what is given up ------------------------------------------------------------------------------


def test_blank_blocks_go_first_then_the_least_recently_used_from_the_back_of_a_prefix() -> None:
    one = harness(num_blocks=9)
    serve(one, tokens(13))  # three blocks stay cached
    serve(one, tokens(13, 20))  # three more
    serve(one, tokens(13))  # the first are of use again
    serve(one, tokens(17, 40))  # takes five: the three blank ones, two of the second prompt's
    cached = {
        start: one.scheduler.blocks.match(
            Request("r", tuple(prompt), SamplingParams()).sequences[0]
        )
        for start, prompt in ((0, tokens(13)), (20, tokens(13, 20)))
    }
    assert {start: hits.num_blocks for start, hits in cached.items()} == {0: 3, 20: 1}


def test_cached_blocks_count_as_free() -> None:
    one = harness(num_blocks=8)
    serve(one, tokens(28))
    gauges = one.scheduler.gauges
    assert (gauges.used_blocks, gauges.free_blocks) == (0, 8)
    one.add(tokens(28, 50), max_tokens=4)
    one.step()
    assert one.scheduler.gauges.used_blocks == 7


def test_hits_are_not_given_up_for_the_request_that_found_them() -> None:
    one = harness(num_blocks=8)
    serve(one, tokens(24))
    assert serve(one, [*tokens(24), *tokens(7, 50)]).num_cached_tokens == 24


# -- the host --------------------------------------------------------------------------------------


def test_what_was_given_up_on_the_device_is_swapped_in_from_the_host() -> None:
    one = harness(num_blocks=8, num_host_blocks=30)
    serve(one, tokens(20))
    serve(one, tokens(28, 50))  # takes most blocks: what is cached in them is written back
    assert one.scheduler.counters.swapped_out > 0
    before = one.scheduler.counters.swapped_in
    again = serve(one, tokens(20))
    assert again.num_cached_tokens == 16
    assert one.scheduler.counters.swapped_in > before
    assert again.token_ids == one.sequences[0].token_ids


def test_a_full_host_pool_keeps_what_was_used_last() -> None:
    one = harness(num_blocks=6, num_host_blocks=4)
    for number in range(5):
        serve(one, tokens(17, 20 * number))
    assert serve(one, tokens(17, 60)).num_cached_tokens == 16
    assert serve(one, tokens(17)).num_cached_tokens == 0
    one.check_empty()


def test_a_block_that_is_written_back_in_a_step_is_not_read_on_the_host_in_it() -> None:
    manager = BlockManager(4, 8, SIZE)
    first, second, third = (
        Request("r", tuple(prompt), SamplingParams()).sequences[0]
        for prompt in (tokens(8), tokens(16, 20), tokens(8))
    )
    manager.begin_step()
    manager.admit(first, manager.match(first))
    first.num_computed = 8
    manager.free(first)
    ops = manager.begin_step()
    manager.admit(second, manager.match(second))
    assert len(ops.swap_out) == 2, "both blocks of the first are taken, and written back"
    assert manager.match(third).num_blocks == 0
    manager.begin_step()
    assert list(manager.match(third).on_host) == [0]


def test_host_blocks_read_in_a_step_are_not_filled_in_it() -> None:
    manager = BlockManager(5, 2, SIZE)
    (first,), (second,), (again,) = (
        Request("r", tuple(prompt), SamplingParams()).sequences
        for prompt in (tokens(8), tokens(20, 20), tokens(9))
    )
    for sequence in (first, second):  # the second takes all blocks; the first's are on the host
        manager.begin_step()
        manager.admit(sequence, manager.match(sequence))
        sequence.num_computed = sequence.num_tokens
        manager.free(sequence)
    ops = manager.begin_step()
    hits = manager.match(again)
    assert sorted(hits.on_host.values()) == [0, 1]
    manager.admit(again, hits)  # takes cached blocks of the second: the host has no room for them
    assert len(ops.swap_in) == 2 and not ops.swap_out
    ops.validate(5, 2)


@pytest.mark.parametrize("chunked", [True, False])
def test_hits_on_the_host_arrive_beside_a_step_of_others(chunked: bool) -> None:
    one = harness(num_blocks=12, num_host_blocks=30, chunked_prefill=chunked)
    serve(one, tokens(20))
    serve(one, tokens(44, 50))
    one.add([1, 2, 3], max_tokens=20)
    one.step()
    (found,) = one.add(tokens(20), max_tokens=4).sequences
    one.step()
    assert found.num_cached_tokens == 16 and one.plans[-1].block_ops.swap_in
    computed = {entry.sequence for entry in one.plans[-1].scheduled}
    assert (found in computed) == (not chunked), "a whole prompt must fit the step it is given"
    one.step()
    assert found in {entry.sequence for entry in one.plans[-1].scheduled}
    one.run()


def test_hits_on_the_host_are_not_waited_for_when_nobody_else_runs() -> None:
    one = harness(num_blocks=12, num_host_blocks=30)
    serve(one, tokens(20))
    serve(one, tokens(44, 50))
    one.add(tokens(20))
    one.step()
    plan = one.plans[-1]
    assert plan.block_ops.swap_in and len(plan.scheduled) == 1


def test_a_sequence_that_returns_finds_its_blocks_on_the_device_if_nobody_took_them() -> None:
    moved = []
    for caching in (True, False):
        one = harness(num_blocks=25, num_host_blocks=200, prefix_caching=caching)
        for seed in range(8):
            one.add(tokens(12, 20 * seed), max_tokens=64)
        one.run()
        assert min(sequence.num_swaps for sequence in one.sequences) >= 1
        moved.append(one.scheduler.counters.swapped_in)
    assert moved[0] < moved[1]


def test_cold_blocks_are_written_back_before_they_are_needed() -> None:
    one = harness(num_blocks=20, num_host_blocks=100)
    serve(one, tokens(60))
    serve(one, tokens(60, 100))
    one.add([1, 2, 3], max_tokens=60)
    one.step()  # its first block could not be foreseen
    written: set[int] = set()
    taken_at_once = 0
    while one.step() is not None:
        plan = one.plans[-1]
        sources = {device for device, _ in plan.block_ops.swap_out}
        used = {block for entry in plan.scheduled for block in entry.sequence.block_table}
        taken_at_once += len(sources & used)
        written |= sources
    assert len(written) >= 10 and taken_at_once == 0


def test_a_step_writes_back_a_bounded_number_ahead() -> None:
    one = harness(num_blocks=200, num_host_blocks=400, max_model_len=1000, max_batch_size=1)
    for start in range(0, 2000, 100):
        serve(one, tokens(40, start))
    one.add([1, 2, 3], max_tokens=10)
    one.add(tokens(700, 5000), max_tokens=10)
    one.step()
    one.step()
    assert len(one.plans[-1].block_ops.swap_out) == MAX_WRITE_BACKS
    one.run()


# -- cost ------------------------------------------------------------------------------------------


def lines_of(function: Callable[[], Any]) -> int:
    """Lines of Python executed by a call."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def lines_of_schedule(scheduler: Scheduler) -> int:
    plans: list[StepPlan | None] = []
    lines = lines_of(lambda: plans.append(scheduler.schedule()))
    assert plans[0] is not None
    scheduler.commit(plans[0], [SampledToken(1)] * len(plans[0].samples))
    return lines


def test_a_step_costs_the_same_whatever_is_cached_and_however_long_its_sequences_are() -> None:
    costs = set()
    for num_cached, length in ((0, 6), (100, 6), (0, 802), (100, 802)):
        one = harness(num_blocks=2000, max_batch_tokens=9000, max_model_len=1000)
        for start in range(num_cached):
            serve(one, tokens(9, 1000 + 10 * start))
        for start in range(8):
            one.add(tokens(length, 100_000 + 1000 * start), max_tokens=30)
        one.step()
        scheduler = one.scheduler
        assert scheduler.gauges.running == 8 and scheduler.gauges.waiting == 0
        # Of a few steps the cheapest: in the others someone is due for a block.
        costs.add(min(lines_of_schedule(scheduler) for _ in range(2 * SIZE)))
    assert len(costs) == 1 and costs.pop() < 100


@pytest.mark.parametrize("swapped", [True, False])
def test_looking_again_for_room_costs_the_same_however_much_is_wanted(swapped: bool) -> None:
    costs = []
    for length in (80, 400):
        one = harness(
            num_blocks=length // 2 + (20 if swapped else 5),
            num_host_blocks=1000 * swapped,
            max_model_len=1000,
            max_batch_tokens=1000,
        )
        one.add(tokens(length), max_tokens=60)
        if swapped:
            one.add(tokens(length - 2, 5000), max_tokens=120)
            while not one.scheduler.gauges.swapped and one.step() is not None:
                pass
            assert one.scheduler.gauges.swapped
        else:
            one.add(tokens(length // 2, 9000), max_tokens=60)
            one.step()
            one.add([*tokens(length), *tokens(length - 10, 5000)], max_tokens=4)
        one.step()
        gauges = one.scheduler.gauges
        assert (gauges.running, gauges.waiting) == ((1, 0) if swapped else (2, 1))
        costs.append(min(lines_of_schedule(one.scheduler) for _ in range(3)))
    assert costs[0] == costs[1]
