"""Frames built one from the other hold what a frame built from nothing would."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_inputs import check_frame

from onecast.runtime.admission import SchedulerConfig
from onecast.runtime.input_builder import InputBuilder
from onecast.runtime.request import PLACEHOLDER, Request, SampledToken, SamplingParams, Sequence
from onecast.runtime.scheduler import Scheduler
from onecast.runtime.step import BlockOps, ScheduledSequence, StepPlan

NUM_BLOCKS = 60


def make_config(block_size: int = 4, **changes: Any) -> SchedulerConfig:
    limits: dict[str, Any] = {
        "num_blocks": NUM_BLOCKS,
        "num_host_blocks": NUM_BLOCKS,
        "max_batch_tokens": 4096,
        "max_batch_size": 64,
        "max_model_len": 500,
    }
    return SchedulerConfig(block_size=block_size, **limits | changes)


class World:
    """Sequences to which anything may happen, and what each step has to wait for."""

    def __init__(self, rng: random.Random, block_size: int) -> None:
        self.rng = rng
        self.block_size = block_size
        self.step = 0
        self.on_device: list[Sequence] = []
        self.away: list[Sequence] = []
        self.entries: dict[Sequence, ScheduledSequence] = {}  # of the decodes of the step before
        self.swapped: dict[int, int] = {}  # device block -> step in which it was last swapped
        self.awaited = -1

    def blocks(self, count: int) -> list[int]:
        return [self.rng.randrange(NUM_BLOCKS) for _ in range(count)]

    def grow(self, sequence: Sequence) -> None:
        missing = -(-sequence.num_tokens // self.block_size) - len(sequence.block_table)
        sequence.block_table += self.blocks(missing)

    def add(self) -> None:
        prompt = tuple(self.rng.randrange(99) for _ in range(self.rng.choice([1, 2, 9, 33, 70])))
        self.on_device += Request("r", prompt, SamplingParams()).sequences

    def fork(self) -> None:
        if self.on_device:
            parent = self.rng.choice(self.on_device)
            (child,) = Request("f", tuple(parent.token_ids), SamplingParams()).sequences
            child.num_computed = min(parent.num_computed, parent.num_tokens - 1)
            child.block_table = parent.block_table.copy()
            self.on_device.append(child)

    def leave(self, sequence: Sequence, ops: BlockOps) -> None:
        """Swapped out, preempted for recomputation, without blocks for a while, or ended."""
        self.on_device.remove(sequence)
        self.entries.pop(sequence, None)
        kind = self.rng.choice(["swap", "recompute", "wait", "end"])
        if kind == "swap":
            ops.swap_out += [(block, block) for block in dict.fromkeys(sequence.block_table)]
        elif kind == "recompute":
            sequence.num_computed = 0
        if kind in ("swap", "recompute"):
            sequence.block_table = []
        if kind != "end":
            self.away.append(sequence)

    def come_back(self, ops: BlockOps) -> None:
        sequence = self.away.pop(self.rng.randrange(len(self.away)))
        if not sequence.block_table and sequence.num_computed:
            sequence.block_table = self.blocks(-(-sequence.num_computed // self.block_size))
            ops.swap_in += [(block, block) for block in dict.fromkeys(sequence.block_table)]
        self.on_device.append(sequence)

    def disturb(self) -> BlockOps:
        rng, ops = self.rng, BlockOps()
        for _ in range(rng.choice([0, 0, 0, 0, 1, 2, 4])):
            what = rng.randrange(8)
            if what < 2:
                self.add()
            elif what == 2:
                self.fork()
            elif what == 3 and self.on_device:
                self.leave(rng.choice(self.on_device), ops)
            elif what == 4 and self.away:
                self.come_back(ops)
            elif what == 5:
                rng.shuffle(self.on_device)
            elif what == 6 and self.on_device:  # copy on write
                table = rng.choice(self.on_device).block_table
                if table:
                    index = rng.randrange(len(table))
                    table[index], source = self.blocks(1)[0], table[index]
                    ops.copy.append((source, table[index]))
            elif what == 7:  # of blocks that no sequence has
                ops.swap_out += [(block, 0) for block in self.blocks(2)]
        return ops

    def schedule(self) -> StepPlan:
        ops = self.disturb()
        singles: list[ScheduledSequence] = []
        chunks: list[ScheduledSequence] = []
        before, self.entries = self.entries, {}
        for sequence in self.on_device:
            self.grow(sequence)
            pending = sequence.num_tokens - sequence.num_computed
            if pending == 1:
                entry = before.get(sequence) or ScheduledSequence(sequence, 1, True)
                self.entries[sequence] = entry
            else:
                count = self.rng.choice([1, pending - 1, pending, pending])
                entry = ScheduledSequence(sequence, count, count == pending)
            (singles if entry.num_new_tokens == 1 else chunks).append(entry)
        return StepPlan(self.step, singles + chunks, ops)

    def prune(self, plan: StepPlan) -> None:
        """Some sequences have ended since the plan was made."""
        for sequence in [entry.sequence for entry in plan.scheduled]:
            if self.rng.random() < 0.2:
                plan.scheduled = [e for e in plan.scheduled if e.sequence is not sequence]
                self.on_device.remove(sequence)
                self.entries.pop(sequence, None)

    def awaits(self, plan: StepPlan) -> int:
        """Newest step whose swaps touch what the plan uses, if no step before waited for it."""
        ops = plan.block_ops
        swapped = [a for a, _ in ops.swap_out] + [b for _, b in ops.swap_in]
        self.swapped.update(dict.fromkeys(swapped, plan.step))
        used = {block for pair in ops.copy for block in pair}
        used.update(block for entry in plan.scheduled for block in entry.sequence.block_table)
        newest = max((self.swapped.get(block, -1) for block in used), default=-1)
        return newest if newest > self.awaited else -1

    def carry_out(self, plan: StepPlan) -> None:
        self.awaited = max(self.awaited, self.awaits(plan))
        for entry in plan.scheduled:
            entry.sequence.num_computed += entry.num_new_tokens
            if entry.samples:
                entry.sequence.token_ids.append(self.rng.randrange(99))
        self.step += 1


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([1, 2, 4, 16]), st.booleans())
def test_a_frame_is_what_its_plan_says_whatever_came_before(
    rng: random.Random, block_size: int, drafts: bool
) -> None:
    world = World(rng, block_size)
    builder = InputBuilder(make_config(block_size))
    frame: dict[str, Any] = {}
    for _ in range(40):
        plan = world.schedule()
        ids = [entry.sequence.token_ids for entry in plan.scheduled]
        if drafts:
            known = [tokens[-1] for tokens in ids]
            for tokens in ids:
                tokens[-1] = PLACEHOLDER
            kept = {name: np.copy(array) for name, array in frame.items()}
            draft = builder.build(plan)
            check_frame(draft, plan, block_size)
            for name, array in kept.items():
                assert np.array_equal(frame[name], array), f"{name} is of the frame before"
            for tokens, token_id in zip(ids, known, strict=True):
                tokens[-1] = token_id
            if rng.random() < 0.3:  # sequences have ended: perhaps it is not the plan any more
                world.prune(plan)
                frame = builder.build(plan)
            else:
                builder.fill(plan)
                frame = draft
        else:
            kept = {name: np.copy(array) for name, array in frame.items()}
            following = builder.build(plan)
            for name, array in kept.items():
                assert np.array_equal(frame[name], array), f"{name} is of the frame before"
            frame = following
        check_frame(frame, plan, block_size)
        assert frame["swaps_awaited"] == world.awaits(plan)
        world.carry_out(plan)


def decoding(config: SchedulerConfig, prompts: list[int]) -> Iterator[tuple[StepPlan, Scheduler]]:
    """The plans of sequences with prompts of these lengths, until they have 100 tokens more."""
    scheduler = Scheduler(config)
    for number, length in enumerate(prompts):
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        scheduler.add(Request(str(number), (7,) * length, params))
    while (plan := scheduler.schedule()) is not None:
        yield plan, scheduler
        scheduler.commit(plan, [SampledToken(plan.step)] * len(plan.samples))


def test_a_step_of_decodes_reads_no_table_but_of_sequences_that_begin_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(16, num_blocks=200)
    builder = InputBuilder(config)
    laid_out, read = [], []
    lay_out, blocks_at = InputBuilder._lay_out, InputBuilder._blocks_at

    def count_lay_out(self: InputBuilder, *arguments: Any, **named: Any) -> None:
        laid_out.append(plan.step)
        lay_out(self, *arguments, **named)

    def count_read(self: InputBuilder, rows: list[int], columns: list[int]) -> list[int]:
        read.extend(rows)
        return blocks_at(self, rows, columns)

    monkeypatch.setattr(InputBuilder, "_lay_out", count_lay_out)
    monkeypatch.setattr(InputBuilder, "_blocks_at", count_read)
    prompts = [3, 30, 31, 32, 33]
    for plan, scheduler in decoding(config, prompts):
        check_frame(builder.build(plan), plan, scheduler.config.block_size)
    # The prompts, the first decodes, and when the widest table has outgrown 8 columns.
    assert laid_out == [0, 1, 96]
    others = set(range(100)) - set(laid_out)
    begun = [row for step in others for row in range(5) if (prompts[row] + step - 1) % 16 == 0]
    assert sorted(read) == sorted(begun)


def test_a_table_that_was_cut_or_copied_into_is_read_anew() -> None:
    builder = InputBuilder(make_config())
    sequence, other = (Request("r", (1,) * 9, SamplingParams()).sequences[0] for _ in range(2))
    sequence.block_table, other.block_table = [5, 6, 7], [1, 2, 3]
    for step, table in enumerate(([5, 6, 7], [5, 6, 7, 8, 9], [4, 6, 7, 8, 9], [4, 6], [4, 6, 3])):
        sequence.block_table[:] = table
        entries = [ScheduledSequence(other, 2, False), ScheduledSequence(sequence, 3, False)]
        plan = StepPlan(step, entries, BlockOps(copy=[(5, 4)] if step == 2 else []))
        check_frame(builder.build(plan), plan, 4)


def test_a_step_of_decodes_waits_for_swaps_of_blocks_that_joined_since_it_was_laid_out() -> None:
    builder = InputBuilder(make_config(2))
    (sequence,) = Request("r", (1, 2), SamplingParams()).sequences
    sequence.num_computed, sequence.block_table = 1, [4]
    entry = ScheduledSequence(sequence, 1, True)
    found = []
    for step, swap_out in enumerate([[], [(9, 0), (5, 1)], [(7, 0)], [], [(9, 2)], [(8, 1)]]):
        if step in (1, 3):
            sequence.block_table.append({1: 8, 3: 9}[step])
        frame = builder.build(StepPlan(step, [entry], BlockOps(swap_out=swap_out)))
        found.append(frame["swaps_awaited"])
        sequence.num_computed += 1
        sequence.token_ids.append(3)
        if step == 4:
            sequence.block_table.append(6)
    # Step 3 takes a block that step 1 swapped, steps 4 and 5 swap one that is in use.
    assert found == [-1, -1, -1, 1, 4, 5]


def test_a_token_without_a_block_is_noticed() -> None:
    builder = InputBuilder(make_config(2))
    (sequence,) = Request("r", (1, 2, 3), SamplingParams()).sequences
    sequence.num_computed, sequence.block_table = 2, [4]
    entry = ScheduledSequence(sequence, 1, True)
    with pytest.raises(AssertionError, match="tokens without a block"):
        builder.build(StepPlan(0, [entry]))
    sequence.block_table.append(5)
    for step in (0, 1, 2):
        if step == 2:  # the fifth token
            with pytest.raises(AssertionError, match="tokens without a block"):
                builder.build(StepPlan(step, [entry]))
            break
        builder.build(StepPlan(step, [entry]))
        sequence.num_computed += 1
        sequence.token_ids.append(8)


def test_a_plan_in_another_order_is_noticed() -> None:
    chunk, single = (Request("r", (1, 2, 3), SamplingParams()).sequences[0] for _ in range(2))
    chunk.block_table, single.block_table = [4], [5]
    entries = [ScheduledSequence(chunk, 2, False), ScheduledSequence(single, 1, False)]
    builder = InputBuilder(make_config(4))
    with pytest.raises(AssertionError, match="sequences with one new token come first"):
        builder.build(StepPlan(0, entries))


def test_a_step_that_was_left_out_is_noticed() -> None:
    builder = InputBuilder(make_config(8))
    (sequence,) = Request("r", (1, 2, 3), SamplingParams()).sequences
    sequence.num_computed, sequence.block_table = 2, [4]
    entry = ScheduledSequence(sequence, 1, True)
    builder.build(StepPlan(0, [entry]))
    with pytest.raises(AssertionError, match="a step was left out"):
        builder.build(StepPlan(1, [entry]))


def test_only_the_plan_that_was_built_is_filled() -> None:
    builder = InputBuilder(make_config(8))
    plan = StepPlan(3)
    builder.build(plan)
    builder.fill(plan)
    with pytest.raises(AssertionError, match="build it first"):
        builder.fill(StepPlan(4))


def test_swaps_are_awaited_by_the_step_that_uses_their_blocks_and_by_no_other() -> None:
    builder = InputBuilder(make_config(4))
    first, second = (Request("r", (1,) * 20, SamplingParams()).sequences[0] for _ in range(2))
    first.block_table, second.block_table = [1, 2, 3, 4, 5], [11, 12, 13, 14, 15]

    def awaited(step: int, *sequences: Sequence, **pairs: Any) -> int:
        entries = [ScheduledSequence(sequence, 2, False) for sequence in sequences]
        return int(builder.build(StepPlan(step, entries, BlockOps(**pairs)))["swaps_awaited"])

    assert awaited(0, first) == -1
    assert awaited(1, first, swap_out=[(20, 0), (0, 1)]) == -1, "padding is no block"
    assert awaited(2, first, swap_in=[(5, 13)]) == -1
    assert awaited(3, first) == -1
    assert awaited(4, second, first) == 2
    assert awaited(5, second, first) == -1, "awaited before"
    assert awaited(6, first, swap_out=[(2, 7)]) == 6, "a block of this very step"
    assert awaited(7, first, second, copy=[(20, 21)]) == -1, "step 6 waited for all before it too"
    assert awaited(8, first, swap_in=[(7, 30)]) == -1
    assert awaited(9, first, copy=[(30, 31)]) == 8
    assert awaited(10, swap_in=[(7, 3)]) == -1, "a plan without sequences"
    assert awaited(11, first, second) == 10
    assert awaited(11, second) == -1, "that plan was dropped, and another made"
    assert awaited(12, first) == 10
