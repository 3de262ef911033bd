"""One launch of `onecast bench e2e`: real ranks, one loaded model, the protocols in short turns.

Owns what a turn is: an engine made anew answers the batch's prompts from the first step to the
last, greedily, over one channel. Within a round every channel has its turn with each batch size, in
an order drawn anew, so that a slow spell of the machine meets all. Model, KV cache and channels
stay for the whole launch. Knows nothing of medians.
"""

import gc
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from onecast.comm import AllReduce, CollectiveProbe, open_all_reduce
from onecast.comm.testing import run_ranks
from onecast.runtime.engine import Engine
from onecast.runtime.executor import StepExecutor
from onecast.runtime.kv_cache import KVCache
from onecast.runtime.model_config import ModelConfig
from onecast.runtime.model_runner import ModelRunner, load_model
from onecast.runtime.observer import Observer
from onecast.runtime.request import Request, SamplingParams
from onecast.runtime.sampling import Sampler
from onecast.runtime.scheduler import Scheduler, SchedulerConfig
from onecast.runtime.tokenizer import Tokenizer

from .e2e_channels import TIMEOUT_S, Published, TurnChannel, open_turn_channel
from .e2e_phases import PhaseRecorder, RecordedStep
from .e2e_prompts import MOST, make_prompts

BLOCK_SIZE = 16
MAX_BATCH_TOKENS = 8192  # all prompts of a batch are one step
WARM_DRAWN = 3

Prompts = list[tuple[int, ...]]


class Plan(NamedTuple):
    """How much of it; `drawn` tokens for every sequence."""

    model: Path
    device: str
    batches: tuple[int, ...]
    channels: tuple[str, ...]
    rounds: int
    drawn: int
    all_reduce: str = "auto"
    timeout_s: float = 3600.0


class Case(NamedTuple):
    tp: int
    batch: int
    channel: str


class DriverTurn(NamedTuple):
    """Rank 0's view: stamps around each call of `Engine.step`, what it published, what it drew."""

    steps: list[tuple[int, int]]
    published: list[Published]
    broadcasts: int
    tokens: list[list[int]]

    @property
    def tokens_per_s(self) -> float:
        elapsed_ns = self.steps[-1][1] - self.steps[0][0]
        return sum(map(len, self.tokens)) / elapsed_ns * 1e9


class Turn(NamedTuple):
    """One turn, as all ranks saw it: `ranks[r][i]` is step i of rank r."""

    case: Case
    round: int
    driver: DriverTurn
    ranks: list[list[RecordedStep]]


def launch(tp: int, plan: Plan) -> list[Turn]:
    """Start the ranks, let everything take turns, and join what they saw."""
    found = run_ranks(_measure, tp, plan, timeout_s=plan.timeout_s, backend=backend_of(plan.device))
    turns = []
    for index, (batch, channel, number, driver) in enumerate(found[0][1]):
        ranks = [steps[index] for steps, _ in found]
        turns.append(Turn(Case(tp, batch, channel), number, driver, ranks))
    return turns


def backend_of(device: str) -> str:
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"


_Driven = list[tuple[int, str, int, DriverTurn]]  # batch, channel, round


def _measure(rank: int, plan: Plan) -> tuple[list[list[RecordedStep]], _Driven]:
    """On one rank: its steps, turn by turn; on rank 0 also what it drove."""
    device = join_device(rank, plan.device)
    recorder = PhaseRecorder()
    group = dist.new_group(group_desc="tp")
    assert group is not None
    reducer = open_reducer(plan, group)
    timed = None if reducer is None else recorder.time_all_reduce(reducer.all_reduce)
    gather = None if reducer is None else reducer.gather
    model, kv_cache = load(plan, device, group, timed, gather)
    channels = {name: open_turn_channel(name, device) for name in plan.channels}
    tokenizer = Tokenizer(plan.model)
    prompts = make_prompts(tokenizer, max(plan.batches))
    executor = StepExecutor(model, kv_cache, recorder)
    chance = random.Random(0)  # the same on all ranks
    steps: list[list[RecordedStep]] = []
    driven: _Driven = []
    for number in range(-1, plan.rounds):  # the first round only warms up
        drawn = WARM_DRAWN if number < 0 else plan.drawn
        for batch in chance.sample(plan.batches, len(plan.batches)):
            for name in chance.sample(plan.channels, len(plan.channels)):
                channel = channels[name]
                gc.collect()
                if rank == 0:
                    engine = make_engine(plan, channel, executor, tokenizer, kv_cache, recorder)
                    driver = drive(engine, channel, prompts[:batch], drawn)
                    channel.end_turn()
                    if number >= 0:
                        driven.append((batch, name, number, driver))
                else:
                    executor.follow(channel)
                taken = recorder.take()
                if number >= 0:
                    steps.append(taken)
    for channel in channels.values():
        channel.close()
    if reducer is not None:
        reducer.close()
    kv_cache.close()
    return steps, driven


def join_device(rank: int, device: str) -> torch.device:
    """This rank's device; ranks share GPUs where there are fewer of them."""
    if device == "cpu":
        return torch.device("cpu")
    own = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(own)
    return own


def open_reducer(
    plan: Plan, group: dist.ProcessGroup, probe: CollectiveProbe | None = None
) -> AllReduce | None:
    """As `onecast generate` opens it; None where a rank is alone. A collective call."""
    if dist.get_world_size(group) == 1:
        return None
    transport = plan.all_reduce if plan.device == "cpu" else "process-group"
    return open_all_reduce(group, transport=transport, probe=probe, timeout_s=TIMEOUT_S)


def load(
    plan: Plan,
    device: torch.device,
    group: dist.ProcessGroup,
    all_reduce: Callable[[torch.Tensor], object] | None,
    gather: Callable[[torch.Tensor], torch.Tensor | None] | None,
) -> tuple[ModelRunner, KVCache]:
    """This rank's part of the model, and a cache for the largest batch; a collective call."""
    model = load_model(plan.model, group=group, device=device, all_reduce=all_reduce, gather=gather)
    num_blocks = blocks_of(max(plan.batches), plan.drawn)
    kv_cache = KVCache(
        model.cache_spec,
        num_blocks=num_blocks,
        num_host_blocks=0,
        block_size=BLOCK_SIZE,
        device=device,
    )
    return model, kv_cache


def blocks_of(batch: int, drawn: int) -> int:
    """For that many sequences; those that draw many tokens need room ahead, too."""
    return batch * (-(-(MOST + max(drawn, WARM_DRAWN)) // BLOCK_SIZE) + 1)


def make_engine(
    plan: Plan,
    channel: TurnChannel,
    executor: StepExecutor,
    tokenizer: Tokenizer,
    kv_cache: KVCache,
    observer: Observer,
) -> Engine:
    """As `onecast generate` makes it, but that prompts are not looked for in the cache."""
    limits = SchedulerConfig(
        block_size=BLOCK_SIZE,
        num_blocks=kv_cache.num_blocks,
        num_host_blocks=0,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_batch_size=max(plan.batches),
        max_model_len=MOST + max(plan.drawn, WARM_DRAWN),
        prefix_caching=False,
    )
    return Engine(
        scheduler=Scheduler(limits, ModelConfig.from_dir(plan.model).eos_token_ids),
        channel=channel,
        executor=executor,
        sampler=Sampler(),
        tokenizer=tokenizer,
        observer=observer,
    )


def drive(engine: Engine, channel: TurnChannel, prompts: Prompts, drawn: int) -> DriverTurn:
    """Answer the prompts, on rank 0."""
    params = SamplingParams(max_tokens=drawn, temperature=0.0, ignore_eos=True)
    requests = [Request(str(n), prompt, params) for n, prompt in enumerate(prompts)]
    channel.published = []
    broadcasts = channel.broadcasts
    stamps = []
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        begin = time.perf_counter_ns()
        engine.step()
        stamps.append((begin, time.perf_counter_ns()))
    tokens = [[token.token_id for token in one.sequences[0].output] for one in requests]
    return DriverTurn(stamps, channel.published, channel.broadcasts - broadcasts, tokens)
