"""One launch of `onecast bench step`: the whole engine on two real ranks, the model does nothing.

Owns what the requests of a case are, the engine around them, and the turns: every turn opens its
channel and its engine anew, fills the batch, lets some steps pass and times the next ones. Knows
nothing of medians over launches.

    decode B   B sequences of 1,000 tokens or more each draw one token a step, greedily
    mixed      64 places; prompts of 64 to 448 tokens, 16 to 64 drawn: prefill beside decodes
    pressure   64 places, blocks for half of them, eight prefixes of 192 tokens that prompts share:
               swapping, and prefix hits

Vocabulary and texts are those of the shipped checkpoint.
"""

import gc
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from onecast.comm import Channel, open_channel
from onecast.comm.channel import TRANSPORTS
from onecast.comm.prior_art import open_prior_channel
from onecast.comm.testing import run_ranks
from onecast.runtime import demo
from onecast.runtime.engine import Engine
from onecast.runtime.executor import StepExecutor
from onecast.runtime.input_builder import InputBuilder
from onecast.runtime.kv_cache import KVCache
from onecast.runtime.observer import NullObserver
from onecast.runtime.request import Request, SamplingParams
from onecast.runtime.sampling import Sampler
from onecast.runtime.scheduler import Scheduler, SchedulerConfig
from onecast.runtime.tokenizer import Tokenizer

from .null_model import TOKEN, NullModel
from .stopwatch import CRITICAL, PARTS, Stopwatch

RANKS = 2
AUTO, PRIOR = "auto", "two-broadcasts"
CHANNELS = (AUTO, *(name for name in TRANSPORTS if name == "two-level"), "process-group", PRIOR)
OVERLAP = True  # of the driver, by default
DECODE, MIXED, PRESSURE = "decode", "mixed", "pressure"

STEPS_PER_S = "steps/s"
STEP = "step"
RUNNING, TOKENS = "running sequences", "tokens/step"
MOVED, HITS = "blocks moved/step", "prefix hit tokens/step"
BROADCASTS = "broadcasts/step"

_BLOCK_SIZE = 16
_PREFIXES, _PREFIX = 8, 192  # of pressure, and their tokens
_TIMEOUT_S = 60.0


class Case(NamedTuple):
    """What takes turns with others."""

    workload: str
    batch: int
    channel: str
    overlap: bool


class Plan(NamedTuple):
    batches: tuple[int, ...]
    places: int  # of mixed and pressure
    context: int  # tokens of a sequence that decodes, at least
    rounds: int  # turns of each case in a launch
    warm_steps: int
    steps: int  # timed, a turn
    launches: int


class Turn(NamedTuple):
    """What one turn has seen: microseconds of each step by part, and a value each of the others."""

    parts: dict[str, list[float]]
    values: dict[str, float]


Turns = dict[Case, list[Turn]]


def launch(plan: Plan) -> Turns:
    """Start the ranks and let the cases take turns."""
    turns: Turns = run_ranks(_measure, RANKS, plan, timeout_s=600.0)[0]
    return turns


def cases_of(plan: Plan) -> list[Case]:
    """Every channel with the overlap as it is by default; both ways where nothing else differs."""
    cases = [Case(DECODE, batch, AUTO, not OVERLAP) for batch in plan.batches]
    cases += [Case(DECODE, batch, name, OVERLAP) for name in CHANNELS for batch in plan.batches]
    for workload in (MIXED, PRESSURE):
        cases += [Case(workload, plan.places, AUTO, overlap) for overlap in (False, True)]
    return cases


def _measure(rank: int, plan: Plan) -> Turns:
    group = dist.new_group(group_desc="control")
    assert group is not None
    tokenizer = Tokenizer(Path(demo.__path__[0]) / "checkpoint")
    chance = random.Random(0)  # the same on both ranks
    turns: Turns = {case: [] for case in cases_of(plan)}
    for _ in range(plan.rounds):
        for case in chance.sample([*turns], len(turns)):
            gc.collect()
            channel = _open_channel(case.channel, group)
            if rank == 0:
                turns[case].append(_drive(case, plan, channel, tokenizer))
            else:
                _executor(case, plan, tokenizer).follow(channel)
            channel.close()
    return turns


def _open_channel(name: str, group: dist.ProcessGroup) -> Channel:
    if name in TRANSPORTS:
        return open_channel(group, transport=name, timeout_s=_TIMEOUT_S)
    return open_prior_channel(name, group, timeout_s=_TIMEOUT_S)


# ---- one turn


class _Sizes(NamedTuple):
    """What a case asks of the engine."""

    num_blocks: int
    num_host_blocks: int
    max_batch_tokens: int
    max_model_len: int


def _sizes(case: Case, plan: Plan) -> _Sizes:
    if case.workload == DECODE:
        longest = plan.context + _BLOCK_SIZE + _drawn(plan)
        blocks = case.batch * -(-longest // _BLOCK_SIZE)
        return _Sizes(blocks, 0, 8192, longest)
    if case.workload == MIXED:
        return _Sizes(case.batch * 512 // _BLOCK_SIZE, 0, 512, 512)
    assert case.workload == PRESSURE
    shared, own = _PREFIXES * _PREFIX // _BLOCK_SIZE, case.batch * 128 // _BLOCK_SIZE
    return _Sizes(shared + own // 2, 4 * (shared + own), 512, 384)


def _drawn(plan: Plan) -> int:
    """More than a sequence of a decode case draws in a turn, while others prefill included."""
    return plan.warm_steps + plan.steps + 64


def _executor(case: Case, plan: Plan, tokenizer: Tokenizer) -> StepExecutor:
    sizes = _sizes(case, plan)
    kv_cache = KVCache(
        NullModel.cache_spec,
        num_blocks=sizes.num_blocks,
        num_host_blocks=sizes.num_host_blocks,
        block_size=_BLOCK_SIZE,
        device="cpu",
    )
    return StepExecutor(NullModel(case.batch, tokenizer.vocab_size), kv_cache, NullObserver())


def _drive(case: Case, plan: Plan, channel: Channel, tokenizer: Tokenizer) -> Turn:
    """The driver's side of a turn."""
    sizes = _sizes(case, plan)
    config = SchedulerConfig(block_size=_BLOCK_SIZE, max_batch_size=case.batch, **sizes._asdict())
    scheduler, builder, sampler = Scheduler(config), InputBuilder(config), Sampler()
    executor = _executor(case, plan, tokenizer)
    watch = Stopwatch()
    engine = Engine(
        scheduler=scheduler, channel=channel, executor=executor, sampler=sampler,
        tokenizer=tokenizer, observer=watch.observer, overlap=case.overlap, builder=builder,
    )  # fmt: skip
    watch.time("schedule", scheduler, "schedule")
    watch.time("build", builder, "build", "fill")
    watch.time("publish", channel, "publish")
    watch.time("forward", executor, "execute")
    watch.time("sample", sampler, "sample")
    watch.time("commit", scheduler, "advance", "commit", "prune")
    watch.time("texts", engine, "_take_texts")
    return _Driver(case, plan, engine, channel, tokenizer.vocab_size).run(watch)


class _Driver:
    """The front end of a turn: hands requests to the engine and runs its steps."""

    def __init__(
        self, case: Case, plan: Plan, engine: Engine, channel: Channel, vocab_size: int
    ) -> None:
        self._case = case
        self._plan = plan
        self._engine = engine
        self._channel = channel
        self._chance = random.Random(1)
        self._vocab = range(TOKEN + 1, vocab_size)
        self._prefixes = [self._tokens(_PREFIX) for _ in range(_PREFIXES)]
        self._added = 0
        self._finished = 0

    def run(self, watch: Stopwatch) -> Turn:
        """Fill the batch, let some steps pass, time the next ones."""
        case, counters = self._case, self._engine.scheduler.counters
        if case.workload == DECODE:
            prompts = sum(len(self._add().prompt_token_ids) for _ in range(case.batch))
            while counters.prompt_tokens < prompts:
                self._step()
        else:
            while self._finished < case.batch:
                self._step()
        for _ in range(self._plan.warm_steps):
            self._step()
        watch.take()
        before = self._counts()
        parts: dict[str, list[float]] = {part: [] for part in (STEP, *PARTS, CRITICAL)}
        running = 0
        for _ in range(self._plan.steps):
            parts[STEP].append(self._step() / 1e3)
            running += self._engine.scheduler.gauges.running
            for part, ns in watch.take().items():
                parts[part].append(ns / 1e3)
        values = {
            name: (after - before[name]) / self._plan.steps
            for name, after in self._counts().items()
        }
        values[RUNNING] = running / self._plan.steps
        values[STEPS_PER_S] = self._plan.steps / sum(parts[STEP]) * 1e6
        return Turn(parts, values)

    def _step(self) -> int:
        """Nanoseconds of one step; what waits is kept at a batch's worth, outside of them."""
        engine = self._engine
        if self._case.workload != DECODE:
            while engine.scheduler.queues.num_waiting < self._case.batch:
                self._add()
        begin = time.perf_counter_ns()
        finished = engine.step()
        elapsed = time.perf_counter_ns() - begin
        self._finished += len(finished)
        assert self._case.workload != DECODE or not finished, "a decode ended before its turn did"
        return elapsed

    def _counts(self) -> dict[str, int]:
        counters = self._engine.scheduler.counters
        return {
            TOKENS: counters.prompt_tokens + counters.generated_tokens,
            MOVED: counters.swapped_out + counters.swapped_in + counters.copied,
            HITS: counters.prefix_hit_tokens,
            BROADCASTS: self._channel.broadcasts,
        }

    def _add(self) -> Request:
        number, chance = self._added, self._chance
        self._added += 1
        if self._case.workload == DECODE:
            # Of different lengths, so that not all need a block in the same step.
            prompt, drawn = (
                self._tokens(self._plan.context + number % _BLOCK_SIZE),
                _drawn(self._plan),
            )
        elif self._case.workload == MIXED:
            prompt, drawn = self._tokens(chance.randint(64, 448)), chance.randint(16, 64)
        else:
            prompt = (*chance.choice(self._prefixes), *self._tokens(chance.randint(16, 64)))
            drawn = chance.randint(16, 64)
        params = SamplingParams(max_tokens=drawn, temperature=0.0, ignore_eos=True)
        request = Request(str(number), prompt, params)
        self._engine.add(request)
        return request

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._chance.choices(self._vocab, k=count))
