"""A cache of plain dicts that carries out steps as the workers do, and a fake language model.

The model reads nothing but the frame of a step and its own memory, so a wrong block operation,
table or slot shows as wrong content. What it stores for a token depends on all tokens before it,
read back through the block table, as keys and values do.
"""

from collections import Counter, deque
from hashlib import blake2b
from typing import Any

import numpy as np
from plain_inputs import check_frame

from onecast.runtime.block_manager import BlockManager
from onecast.runtime.input_builder import InputBuilder
from onecast.runtime.request import (
    Request,
    SampledToken,
    SamplingParams,
    Sequence,
    Status,
)
from onecast.runtime.scheduler import Scheduler, SchedulerConfig
from onecast.runtime.step import StepPlan

VOCABULARY = 50
Entry = tuple[int, int, int]  # position, token id, hash of the tokens up to here
START: Entry = (-1, -1, -1)
Blocks = list[dict[int, Entry]]  # offset: entry


def entries(token_ids: list[int]) -> list[Entry]:
    """What the cache has to hold for a sequence of tokens."""
    result: list[Entry] = []
    for position, token_id in enumerate(token_ids):
        result.append(entry(result[-1] if result else START, position, token_id))
    return result


def entry(previous: Entry, position: int, token_id: int) -> Entry:
    return (position, token_id, hash((previous, position, token_id)))


def next_token(last: Entry, index: int) -> int:
    """The token that choice `index` draws after the tokens that `last` stands for."""
    return hash((last, index)) % VOCABULARY


class CacheModel:
    """Device and host blocks, and what a step does to them. Swaps are over before anything else."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.block_size = config.block_size
        self.device: Blocks = [{} for _ in range(config.num_blocks)]
        self.host: Blocks = [{} for _ in range(config.num_host_blocks)]

    def execute(self, frame: dict[str, Any]) -> list[Entry]:
        """Apply a step; for each row of logits, the entry of its token."""
        self.swap(frame)
        self.move(self.device, self.device, frame["copy"].tolist())
        size, loc = self.block_size, frame["query_start_loc"].tolist()
        written: list[Entry] = []
        for row, table in enumerate(frame["block_tables"].tolist()):
            for token in range(loc[row], loc[row + 1]):
                position = int(frame["positions"][token])
                slot = int(frame["slot_mapping"][token])
                assert divmod(slot, size) == (table[position // size], position % size)
                last = self.read(table, position - 1) if position else START
                written.append(entry(last, position, int(frame["input_ids"][token])))
                self.device[slot // size][slot % size] = written[-1]
            assert position + 1 == frame["seq_lens"][row]
        return [written[index] for index in frame["logits_indices"]]

    def swap(self, frame: dict[str, Any]) -> None:
        self.move(self.device, self.host, frame["swap_out"].tolist())
        self.move(self.host, self.device, frame["swap_in"].tolist())

    def move(self, source: Blocks, target: Blocks, pairs: list[tuple[int, int]]) -> None:
        """Within a kind the order must not matter: go backwards, all reads before all writes."""
        moved = [dict(source[src]) for src, _ in reversed(pairs)]
        for (_, dst), content in zip(reversed(pairs), moved, strict=True):
            target[dst] = content

    def read(self, table: list[int], position: int) -> Entry:
        return self.device[table[position // self.block_size]][position % self.block_size]


class LateCache(CacheModel):
    """Swaps go on beside the forwards, in order, for as long as no step waits for them."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.under_way: deque[dict[str, Any]] = deque()

    def swap(self, frame: dict[str, Any]) -> None:
        self.under_way.append(
            {name: np.copy(frame[name]) for name in ("step", "swap_out", "swap_in")}
        )
        while self.under_way and self.under_way[0]["step"] <= frame["swaps_awaited"]:
            super().swap(self.under_way.popleft())


def check_content(cache: CacheModel, plan: StepPlan) -> None:
    """Each sequence of an executed step reads its own tokens back through its own table."""
    for scheduled in plan.scheduled:
        sequence = scheduled.sequence
        end = sequence.num_computed + scheduled.num_new_tokens
        stored = [cache.read(sequence.block_table, position) for position in range(end)]
        assert stored == entries(sequence.token_ids[:end])


def check_references(blocks: BlockManager, sequences: list[Sequence]) -> None:
    """Every reference is accounted for, and only sequences in the right state hold any."""
    for pool, tables in (
        (blocks.device, [s.block_table for s in sequences]),
        (blocks.host, [s.host_block_table for s in sequences]),
    ):
        held = Counter(block for table in tables for block in table)
        assert [held[block] for block in range(pool.num_blocks)] == pool.references
        free = [b for b in range(pool.num_blocks) if not held[b]]
        blank, cached = [*pool._blank, *pool._resting], [*pool._ready, *pool._idle]
        assert sorted(blank + cached) == free and pool.num_free == len(free)
        assert not any(pool.keys[block] for block in blank)
        assert all(pool.find(pool.keys[block]) == block for block in cached)
        assert all(pool.keys[block] == key for key, block in pool._by_key.items())
    for sequence in sequences:
        assert bool(sequence.block_table) == (sequence.status is Status.RUNNING)
        assert bool(sequence.host_block_table) == (sequence.status is Status.SWAPPED)


class Contents:
    """What each key stands for, worked out from the tokens of sequences, by another route."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.known: dict[bytes, list[Entry]] = {}

    def check(self, blocks: BlockManager, cache: CacheModel, sequences: list[Sequence]) -> None:
        """Whatever has a key, in use or not, on the device or the host, has its content."""
        self._learn(sequences)
        numbered: dict[int, dict[int, Entry]] = {}
        for pool, memory in ((blocks.device, cache.device), (blocks.host, cache.host)):
            for block, key in enumerate(pool.keys):
                if isinstance(key, bytes):
                    expected = dict(enumerate(self.known[key]))
                elif key is not None:
                    expected = numbered.setdefault(key, memory[block])
                else:
                    continue
                assert memory[block] == expected, f"{pool.name} block {block} is stale"
                assert len(expected) == self.block_size

    def _learn(self, sequences: list[Sequence]) -> None:
        size = self.block_size
        for sequence in sequences:
            if not sequence.block_keys or sequence.block_keys[-1] in self.known:
                continue
            stored, digest = entries(sequence.token_ids), b""
            for start in range(0, len(sequence.block_keys) * size, size):
                tokens = sequence.token_ids[start : start + size]
                data = b"".join(token.to_bytes(8, "little") for token in tokens)
                digest = blake2b(digest + data, digest_size=16).digest()
                self.known[digest] = stored[start : start + size]


class Harness:
    """A scheduler with the model as its workers; checks everything it can after every step.

    With `drafts` each step is planned before the tokens of the one before are known.
    """

    def __init__(
        self, config: SchedulerConfig, eos_token_ids: tuple[int, ...] = (), *, drafts: bool = False
    ) -> None:
        self.scheduler = Scheduler(config, eos_token_ids)
        self.builder = InputBuilder(config)
        self.frame: dict[str, Any] = {}
        self.cache = CacheModel(config)
        self.late_cache = LateCache(config)
        self.contents = Contents(config.block_size)
        self.requests: list[Request] = []
        self.plans: list[StepPlan] = []
        self.drafts = drafts
        self.draft: StepPlan | None = None
        self.tokens_at_entry: dict[Sequence, int] = {}  # of those on the device

    def add(self, prompt: list[int], request_id: str | None = None, **params: Any) -> Request:
        request = Request(
            request_id or f"r{len(self.requests)}", tuple(prompt), SamplingParams(**params)
        )
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def step(self, end_before_commit: Sequence | None = None) -> list[Sequence] | None:
        """One step; the sequences that it finished, None when there was nothing to do."""
        scheduler = self.scheduler
        plan, self.draft = self.draft, None
        if plan is not None and scheduler.prune(plan):
            plan = None if plan.empty else plan
            if plan is not None:
                self.frame = self.builder.build(plan)
        elif plan is not None:
            self.builder.fill(plan)
        if plan is None:
            plan = self.schedule()
            if plan is None:
                return None
            self.frame = self.builder.build(plan)
        self.plans.append(plan)
        self.check_plan(plan)
        check_frame(self.frame, plan, scheduler.config.block_size)
        logits = self.cache.execute(self.frame)
        assert self.late_cache.execute(self.frame) == logits, "a swap is not waited for"
        check_content(self.cache, plan)
        check_content(self.late_cache, plan)
        if self.drafts:
            scheduler.advance(plan)
            self.check_blocks()
            self.draft = self.schedule()
            if self.draft is not None:
                self.frame = self.builder.build(self.draft)
        if end_before_commit is not None:
            scheduler.finish(end_before_commit, "abort")
        tokens = [
            SampledToken(next_token(logits[row], sequence.index))
            for sequence, row in zip(plan.samples, plan.sample_rows, strict=True)
        ]
        finished = scheduler.commit(plan, tokens)
        self.check_references()
        if not self.drafts:  # else the moves of the draft are not done yet
            self.check_blocks()
        return finished

    def schedule(self) -> StepPlan | None:
        """Plan a step; whoever leaves it early, for the sake of the next, may do so."""
        queues, blocks = self.scheduler.queues, self.scheduler.blocks
        running = queues.running
        early = blocks.missing(running)[0] <= blocks.device.num_free
        before = [(s, s.num_tokens - self.tokens_at_entry.get(s, 0)) for s in running]
        plan = self.scheduler.schedule()
        for sequence, num_drawn in before:
            if early and sequence.status is not Status.RUNNING:
                assert num_drawn > 0, "it has drawn no token since it came"
                assert sequence.status is Status.SWAPPED, "recomputed before there was need"
                num_output = sequence.num_tokens - sequence.num_prompt
                assert sequence.request.params.max_tokens - num_output > 1, "it ends by itself"
        self.tokens_at_entry = {
            s: self.tokens_at_entry.get(s, s.num_tokens) for s in queues.running
        }
        return plan

    def run(self, max_steps: int = 100_000) -> int:
        """Until all is finished; the number of steps."""
        for steps in range(max_steps):
            if self.step() is None:
                return steps
        raise AssertionError(f"unfinished after {max_steps} steps")

    def outputs(self) -> list[list[tuple[list[int], str | None]]]:
        return [[(s.token_ids, s.finish_reason) for s in r.sequences] for r in self.requests]

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for request in self.requests for sequence in request.sequences]

    def check_plan(self, plan: StepPlan) -> None:
        config = self.scheduler.config
        counts = [scheduled.num_new_tokens for scheduled in plan.scheduled]
        assert all(count >= 1 for count in counts)
        assert counts or (self.drafts and not plan.empty)
        assert sum(counts) <= config.max_batch_tokens
        singles = sum(count == 1 for count in counts)
        assert counts[:singles] == [1] * singles, "sequences with one token come first"
        running = [s for s in self.sequences if s.status is Status.RUNNING]
        assert len(running) <= config.max_batch_size
        assert all(scheduled.sequence.status is Status.RUNNING for scheduled in plan.scheduled)
        assert len({id(scheduled.sequence) for scheduled in plan.scheduled}) == len(counts)
        tables = Counter(block for s in running for block in set(s.block_table))
        for scheduled in plan.scheduled:
            sequence = scheduled.sequence
            end = sequence.num_computed + scheduled.num_new_tokens
            assert scheduled.samples == (end == sequence.num_tokens)
            first, last = sequence.num_computed // config.block_size, (end - 1) // config.block_size
            for block in sequence.block_table[first : last + 1]:
                assert tables[block] == 1, f"block {block} is written while shared"
                key = self.scheduler.blocks.device.keys[block]
                assert key is None, f"block {block} is written while others can find it"
        self.check_references()

    def check_references(self) -> None:
        check_references(self.scheduler.blocks, self.sequences)

    def check_blocks(self) -> None:
        """References and contents; for when all moves planned so far are done."""
        self.check_references()
        self.contents.check(self.scheduler.blocks, self.cache, self.sequences)

    def check_empty(self) -> None:
        """Nothing is held by anyone, and nobody is remembered."""
        scheduler = self.scheduler
        assert not scheduler.has_unfinished and scheduler.schedule() is None
        assert all(request.finished for request in self.requests)
        gauges = scheduler.gauges
        assert gauges.used_blocks == gauges.used_host_blocks == 0
        assert gauges.waiting == gauges.running == gauges.swapped == 0
        assert not scheduler.queues.requests and not len(scheduler.queues.forks)
        assert not scheduler._growth._due
        if not scheduler.config.prefix_caching:
            assert not any(scheduler.blocks.device.keys) and not any(scheduler.blocks.host.keys)
