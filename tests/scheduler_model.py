"""A cache of plain dicts that carries out steps as the workers do, and a fake language model.

The model reads nothing but the frame of a step and its own memory, so a wrong block operation,
table or slot shows as wrong content. What it stores for a token depends on all tokens before it,
read back through the block table, as keys and values do.
"""

from collections import Counter
from typing import Any

from onecast.runtime.block_manager import BlockManager
from onecast.runtime.request import (
    Request,
    SampledToken,
    SamplingParams,
    Sequence,
    Status,
)
from onecast.runtime.scheduler import Scheduler, SchedulerConfig
from onecast.runtime.step import StepPlan, prepare_inputs

VOCABULARY = 50
Entry = tuple[int, int, int]  # position, token id, hash of the tokens up to here
START: Entry = (-1, -1, -1)


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
    """Device and host blocks: block number -> {offset: entry}."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.block_size = config.block_size
        self.device: list[dict[int, Entry]] = [{} for _ in range(config.num_blocks)]
        self.host: list[dict[int, Entry]] = [{} for _ in range(config.num_host_blocks)]

    def execute(self, frame: dict[str, Any]) -> list[Entry]:
        """Apply a step; for each row of logits, the entry of its token."""
        # Within a kind the order must not matter: go backwards, all reads before all writes.
        for kind, source, target in (
            ("swap_out", self.device, self.host),
            ("swap_in", self.host, self.device),
            ("copy", self.device, self.device),
        ):
            pairs = frame[kind].tolist()[::-1]
            moved = [dict(source[src]) for src, _ in pairs]
            for (_, dst), content in zip(pairs, moved, strict=True):
                target[dst] = content
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

    def read(self, table: list[int], position: int) -> Entry:
        return self.device[table[position // self.block_size]][position % self.block_size]


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
        assert sorted(pool._free) == [b for b in range(pool.num_blocks) if not held[b]]
    for sequence in sequences:
        assert bool(sequence.block_table) == (sequence.status is Status.RUNNING)
        assert bool(sequence.host_block_table) == (sequence.status is Status.SWAPPED)


class Harness:
    """A scheduler with the model as its workers; checks everything it can after every step."""

    def __init__(self, config: SchedulerConfig, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.scheduler = Scheduler(config, eos_token_ids)
        self.cache = CacheModel(config)
        self.requests: list[Request] = []
        self.plans: list[StepPlan] = []

    def add(self, prompt: list[int], request_id: str | None = None, **params: Any) -> Request:
        request = Request(
            request_id or f"r{len(self.requests)}", tuple(prompt), SamplingParams(**params)
        )
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def step(self, end_before_commit: Sequence | None = None) -> list[Sequence] | None:
        """One step; the sequences that it finished, None when there was nothing to do."""
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        self.plans.append(plan)
        self.check_plan(plan)
        logits = self.cache.execute(prepare_inputs(plan, self.scheduler.config.block_size))
        check_content(self.cache, plan)
        if end_before_commit is not None:
            self.scheduler.finish(end_before_commit, "abort")
        tokens = [
            SampledToken(next_token(logits[row], sequence.index))
            for sequence, row in zip(plan.samples, plan.sample_rows, strict=True)
        ]
        finished = self.scheduler.commit(plan, tokens)
        self.check_blocks()
        return finished

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
        assert counts and min(counts) >= 1
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
        self.check_blocks()

    def check_blocks(self) -> None:
        check_references(self.scheduler.blocks, self.sequences)

    def check_empty(self) -> None:
        """Nothing is held by anyone, and nobody is remembered."""
        scheduler = self.scheduler
        assert not scheduler.has_unfinished and scheduler.schedule() is None
        assert all(request.finished for request in self.requests)
        gauges = scheduler.gauges
        assert gauges.used_blocks == gauges.used_host_blocks == 0
        assert gauges.waiting == gauges.running == gauges.swapped == 0
        assert not scheduler.queues.requests and not scheduler.queues.forks
        assert not scheduler.blocks._host_twin and not scheduler.blocks._device_twin
