"""The block manager: no block is lost, doubled, or written while shared; moves are safe to do."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from scheduler_model import CacheModel, Contents, check_content, check_references

from onecast.runtime.block_manager import BlockManager
from onecast.runtime.block_ops import BlockOps
from onecast.runtime.block_pool import BlockPool
from onecast.runtime.input_builder import InputBuilder
from onecast.runtime.request import Request, SamplingParams, Sequence, Status
from onecast.runtime.scheduler import SchedulerConfig
from onecast.runtime.step import ScheduledSequence, StepPlan

SIZE = 4


def sequences(num_tokens: int, n: int = 1) -> list[Sequence]:
    request = Request("r", tuple(range(num_tokens)), SamplingParams(n=n))
    return request.sequences


def plain(num_blocks: int, num_host_blocks: int) -> BlockManager:
    return BlockManager(num_blocks, num_host_blocks, SIZE, prefix_caching=False)


def compute(manager: BlockManager, sequence: Sequence) -> None:
    """Reserve blocks for all tokens and call them computed, in a step of its own."""
    manager.begin_step()
    manager.reserve(sequence)
    sequence.num_computed = sequence.num_tokens


def forked(manager: BlockManager, num_tokens: int, n: int) -> list[Sequence]:
    first, *others = sequences(num_tokens, n)
    compute(manager, first)
    for other in others:
        manager.fork(first, other)
    return [first, *others]


# -- the pool --------------------------------------------------------------------------------------


def test_a_block_is_free_again_when_its_last_reference_is_gone() -> None:
    pool = BlockPool("device", 3)
    block = pool.allocate()
    pool.share(block)
    pool.release(block)
    assert pool.num_free == 2
    pool.release(block)
    assert pool.num_free == 3
    assert (pool.num_used, pool.peak_used) == (0, 1)


def test_misuse_of_a_pool_is_noticed_at_once() -> None:
    pool = BlockPool("host", 1)
    with pytest.raises(AssertionError, match="host pool: block 0 released while free"):
        pool.release(0)
    with pytest.raises(AssertionError, match="host pool: block 0 shared while blank"):
        pool.share(0)
    pool.allocate()
    with pytest.raises(AssertionError, match="host pool: all 1 blocks are in use"):
        pool.allocate()


# -- growing and copying ---------------------------------------------------------------------------


def test_a_sequence_gets_blocks_for_its_tokens_and_one_more_when_they_are_full() -> None:
    manager = plain(10, 0)
    (sequence,) = sequences(7)
    compute(manager, sequence)
    assert sequence.block_table == [0, 1]
    for tokens, blocks in ((8, 2), (9, 3), (12, 3), (13, 4)):
        sequence.token_ids = list(range(tokens))
        assert manager.missing([sequence])[0] == blocks - len(sequence.block_table)
        compute(manager, sequence)
        assert len(sequence.block_table) == blocks
    manager.free(sequence)
    assert manager.device.num_free == 10


def test_forks_share_blocks_and_all_but_the_last_writer_copy_the_partial_one() -> None:
    manager = plain(10, 0)
    family = forked(manager, 6, 3)
    assert manager.device.num_used == 2
    for sequence in family:
        sequence.token_ids.append(9)
    needed, lacking = manager.missing(family)
    assert (needed, lacking) == (2, family)
    ops = manager.begin_step()
    for sequence in family:
        manager.reserve(sequence)
    assert ops.copy == [(1, 2), (1, 3)]
    assert [sequence.block_table for sequence in family] == [[0, 2], [0, 3], [0, 1]]
    assert manager.device.references[:4] == [3, 1, 1, 1]


def test_a_writer_whose_siblings_do_not_write_copies_too() -> None:
    manager = plain(10, 0)
    writer, reader = forked(manager, 6, 2)
    writer.token_ids.append(9)
    assert manager.missing([writer]) == (1, [writer])
    ops = manager.begin_step()
    manager.reserve(writer)
    assert ops.copy == [(1, 2)] and reader.block_table == [0, 1]


def test_full_blocks_stay_shared() -> None:
    manager = plain(10, 0)
    family = forked(manager, 8, 2)
    ops = manager.begin_step()
    for sequence in family:
        sequence.token_ids.append(9)
        manager.reserve(sequence)
    assert not ops.copy
    assert [sequence.block_table for sequence in family] == [[0, 1, 2], [0, 1, 3]]


# -- swapping --------------------------------------------------------------------------------------


def test_a_swap_moves_what_is_computed_and_comes_back_with_room_to_grow() -> None:
    manager = plain(5, 5)
    (sequence,) = sequences(18)
    manager.reserve(sequence)
    sequence.num_computed = 6  # in the midst of its prefill
    ops = manager.begin_step()
    assert manager.can_swap_out(sequence)
    manager.swap_out(sequence)
    assert ops.swap_out == [(0, 0), (1, 1)] and not sequence.block_table
    assert manager.device.num_free == 5
    assert manager.missing_to_swap_in(sequence) == 5
    ops = manager.begin_step()
    manager.swap_in(sequence)
    assert [source for source, _ in ops.swap_in] == [0, 1]
    assert [target for _, target in ops.swap_in] == sequence.block_table[:2]
    assert len(sequence.block_table) == 5 and manager.host.num_free == 5


def test_blocks_that_a_swap_out_reads_are_filled_last() -> None:
    manager = plain(6, 6)
    (gone,), (grows,) = sequences(6), sequences(5)
    compute(manager, gone)
    ops = manager.begin_step()
    manager.swap_out(gone)
    assert [device for device, _ in ops.swap_out] == [0, 1]
    manager.reserve(grows)
    grows.token_ids = list(range(17))
    manager.reserve(grows)
    assert grows.block_table[:4] == [2, 3, 4, 5] and grows.block_table[4] in (0, 1)


def test_a_full_host_pool_refuses_a_swap() -> None:
    manager = plain(5, 1)
    (sequence,) = sequences(5)
    compute(manager, sequence)
    assert not manager.can_swap_out(sequence)
    sequence.num_computed = 4
    assert manager.can_swap_out(sequence)


def test_a_block_shared_with_a_running_sibling_stays_and_is_found_again() -> None:
    manager = plain(10, 10)
    gone, stays = forked(manager, 9, 2)
    ops = manager.begin_step()
    manager.swap_out(gone)
    assert ops.swap_out == [(0, 0), (1, 1), (2, 2)]
    assert manager.device.num_used == 3, "all of it stays for the sibling"
    stays.token_ids.append(9)
    assert manager.missing([stays])[0] == 0, "nobody else on the device refers to the last block"
    compute(manager, stays)
    assert manager.missing_to_swap_in(gone) == 1
    ops = manager.begin_step()
    manager.swap_in(gone)
    assert [source for source, _ in ops.swap_in] == [2], "full blocks are still on the device"
    assert gone.block_table[:2] == stays.block_table[:2]
    assert gone.block_table[2] != stays.block_table[2]
    assert manager.host.num_used == 0


@pytest.mark.parametrize("same_step", [True, False])
def test_siblings_share_the_host_copies_of_full_blocks(same_step: bool) -> None:
    manager = plain(10, 4)
    one, other = forked(manager, 9, 2)
    ops = manager.begin_step()
    manager.swap_out(one)
    if not same_step:
        ops = manager.begin_step()
    assert manager.can_swap_out(other)
    manager.swap_out(other)
    assert ops.swap_out == [(0, 0), (1, 1), (2, 2), (2, 3)][0 if same_step else 3 :]
    assert one.host_block_table == [0, 1, 2] and other.host_block_table == [0, 1, 3]
    assert manager.device.num_used == 0
    ops = manager.begin_step()
    manager.swap_in(other)
    manager.swap_in(one)
    assert [source for source, _ in ops.swap_in] == [0, 1, 3, 2]
    assert one.block_table[:2] == other.block_table[:2]


def test_moves_are_taken_only_in_the_order_in_which_they_are_done() -> None:
    manager = plain(20, 20)
    (swapped,), (running,) = sequences(6), sequences(6)
    family = forked(manager, 6, 2)
    compute(manager, swapped)
    compute(manager, running)
    manager.begin_step()
    manager.swap_out(swapped)
    manager.begin_step()
    manager.swap_in(swapped)
    with pytest.raises(AssertionError, match="swap-outs come first"):
        manager.swap_out(running)
    manager.begin_step()
    manager.swap_out(running)
    family[0].token_ids.append(9)
    manager.reserve(family[0])
    assert manager.ops.copy
    with pytest.raises(AssertionError, match="swap-ins come before copies"):
        manager.swap_in(running)


# -- the rules of a step's moves -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        (
            {"swap_out": [(1, 5), (2, 5)]},
            r"filled twice: swap_out \(2, 5\) fills the block that swap_out \(1, 5\) fills",
        ),
        (
            {"swap_in": [(1, 5), (2, 5)]},
            r"filled twice: swap_in \(2, 5\) fills the block that swap_in \(1, 5\) fills",
        ),
        (
            {"swap_in": [(1, 5)], "copy": [(2, 5)]},
            r"filled twice: copy \(2, 5\) fills the block that swap_in \(1, 5\) fills",
        ),
        (
            {"swap_out": [(1, 5)], "swap_in": [(5, 3)]},
            r"chain: swap_in \(5, 3\) reads the block that swap_out \(1, 5\) fills",
        ),
        (
            {"copy": [(1, 2), (2, 3)]},
            r"chain: copy \(2, 3\) reads the block that copy \(1, 2\) fills",
        ),
        (
            {"copy": [(2, 3), (1, 2)]},
            r"chain: copy \(2, 3\) reads the block that copy \(1, 2\) fills",
        ),
        ({"copy": [(2, 2)]}, r"chain: copy \(2, 2\) reads the block that copy \(2, 2\) fills"),
        (
            {"swap_in": [(1, 5)], "copy": [(5, 6)]},
            r"chain: copy \(5, 6\) reads the block that swap_in \(1, 5\) fills",
        ),
        (
            {"swap_out": [(1, 6)]},
            r"out of range: swap_out \(1, 6\) with 8 source blocks, 6 target blocks",
        ),
        (
            {"swap_in": [(6, 1)]},
            r"out of range: swap_in \(6, 1\) with 6 source blocks, 8 target blocks",
        ),
        (
            {"copy": [(-1, 1)]},
            r"out of range: copy \(-1, 1\) with 8 source blocks, 8 target blocks",
        ),
    ],
)
def test_unsafe_moves_are_named(ops: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        BlockOps(**ops).validate(num_blocks=8, num_host_blocks=6)


def test_blocks_freed_by_an_earlier_kind_may_be_filled_by_a_later_one() -> None:
    ops = BlockOps(swap_out=[(1, 5), (2, 4)], swap_in=[(3, 1)], copy=[(0, 2), (0, 7)])
    ops.validate(num_blocks=8, num_host_blocks=6)
    BlockOps().validate(num_blocks=1, num_host_blocks=0)


# -- under any calls -------------------------------------------------------------------------------


class AnyCalls(RuleBasedStateMachine):
    """Steps of swaps, forks, growth and frees in any mixture, against a modelled cache."""

    @initialize(
        size=st.integers(1, 4),
        blocks=st.integers(4, 20),
        hosts=st.integers(0, 20),
        caching=st.booleans(),
    )
    def start(self, size: int, blocks: int, hosts: int, caching: bool) -> None:
        self.caching = caching
        self.limits = SchedulerConfig(size, blocks, hosts, 1000, 1000, 1000)
        self.manager = BlockManager(blocks, hosts, size, prefix_caching=caching)
        self.builder = InputBuilder(self.limits)
        self.cache = CacheModel(self.limits)
        self.contents = Contents(size)
        self.all: list[Sequence] = []
        self.ever: list[Sequence] = []
        self.next_token = 0

    @rule(data=st.data(), num_tokens=st.integers(1, 12))
    def arrive(self, data: st.DataObject, num_tokens: int) -> None:
        """Half of a prompt may be what another sequence began with."""
        like = data.draw(st.sampled_from(self.ever)).token_ids if self.ever else []
        shared = like[: data.draw(st.integers(0, min(num_tokens, len(like))))]
        prompt = shared + self.fresh(num_tokens - len(shared) + 1)
        request = Request("r", tuple(prompt), SamplingParams())
        self.all += request.sequences
        self.ever += request.sequences

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parents = [s for s in self.of(Status.RUNNING) if s.num_computed]
        if not parents:
            return
        parent = data.draw(st.sampled_from(parents))
        child = Sequence(parent.request, 1, parent.token_ids[: parent.num_computed])
        self.manager.fork(parent, child)
        child.status = Status.RUNNING
        child.token_ids += self.fresh(1)
        if parent.num_computed == parent.num_tokens:
            parent.token_ids += self.fresh(1)
        self.all.append(child)
        self.ever.append(child)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.all:
            sequence = data.draw(st.sampled_from(self.all))
            self.manager.free(sequence)
            sequence.status = Status.FINISHED
            self.all.remove(sequence)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        manager = self.manager
        plan = StepPlan(0, block_ops=manager.begin_step())
        just_out = data.draw(subsets(self.of(Status.RUNNING)))
        for sequence in just_out:
            if manager.can_swap_out(sequence):
                manager.swap_out(sequence)
                sequence.status = Status.SWAPPED
        coming = [s for s in self.of(Status.SWAPPED) if s not in just_out]
        for sequence in data.draw(subsets(coming)):
            if manager.missing_to_swap_in(sequence) <= manager.device.num_free:
                manager.swap_in(sequence)
                sequence.status = Status.RUNNING
        writing = []
        for sequence in data.draw(subsets(self.of(Status.RUNNING))):
            needed, _ = manager.missing([*writing, sequence])
            if needed <= manager.device.num_free:
                writing.append(sequence)
        needed, lacking = manager.missing(writing)
        free = manager.device.num_free
        for sequence in lacking:
            manager.reserve(sequence)
        assert manager.device.num_free == free - needed, "missing() foretells what is taken"
        for sequence in data.draw(subsets(self.of(Status.WAITING))):
            hits = manager.match(sequence)
            needed, free = manager.missing_to_admit(sequence, hits), manager.device.num_free
            if needed <= free:
                manager.admit(sequence, hits)
                sequence.status = Status.RUNNING
                writing.append(sequence)
                assert manager.device.num_free == free - needed
                assert sequence.num_computed == hits.num_blocks * manager.block_size
        manager.write_back_ahead(data.draw(st.integers(0, 4)), 3)
        for sequence in writing:
            pending = sequence.num_tokens - sequence.num_computed
            num_new = data.draw(st.integers(1, pending)) if pending else 0
            if num_new:
                plan.scheduled.append(ScheduledSequence(sequence, num_new, num_new == pending))
        plan.block_ops.validate(self.limits.num_blocks, self.limits.num_host_blocks)
        plan.scheduled.sort(key=lambda entry: entry.num_new_tokens > 1)
        self.cache.execute(self.builder.build(plan))
        check_content(self.cache, plan)
        for entry in plan.scheduled:
            entry.sequence.num_computed += entry.num_new_tokens
            if entry.samples:
                entry.sequence.token_ids += self.fresh(1)
        check_references(manager, self.all)
        self.contents.check(manager, self.cache, self.ever)

    def of(self, status: Status) -> list[Sequence]:
        return [sequence for sequence in self.all if sequence.status is status]

    def fresh(self, count: int) -> list[int]:
        """Tokens never seen before: content of another sequence cannot pass for one's own."""
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for sequence in self.all:
                self.manager.free(sequence)
            assert self.manager.device.num_used == self.manager.host.num_used == 0
            if not self.caching:
                assert not any(self.manager.device.keys) and not any(self.manager.host.keys)


def subsets(members: list[Sequence]) -> st.SearchStrategy[list[Sequence]]:
    if not members:
        return st.just([])
    return st.lists(st.sampled_from(members), unique_by=id)


AnyCalls.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestAnyCalls = AnyCalls.TestCase
