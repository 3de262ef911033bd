"""Runs the whole engine on real ranks and reports what it did. A helper, not a test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from onecast.comm import Channel, open_channel
from onecast.comm.testing import run_ranks
from onecast.runtime.engine import Engine
from onecast.runtime.executor import StepExecutor
from onecast.runtime.kv_cache import KVCache
from onecast.runtime.model_config import ModelConfig
from onecast.runtime.model_runner import load_model
from onecast.runtime.observer import NullObserver
from onecast.runtime.request import Request, SampledToken, SamplingParams
from onecast.runtime.sampling import Sampler
from onecast.runtime.scheduler import Scheduler, SchedulerConfig
from onecast.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Case:
    """One run: requests, and the sizes that decide how they are scheduled."""

    checkpoint: Path
    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    num_blocks: int = 400
    num_host_blocks: int = 400
    block_size: int = 8
    max_batch_tokens: int = 512
    max_batch_size: int = 64
    chunked_prefill: bool = True
    transport: str = "auto"
    prefix_caching: bool = True
    overlap: bool = True
    behind_launch: bool = False  # plan ahead where a GPU's driver does
    device: str = "cpu"  # or "cuda", with one rank
    eos_token_ids: tuple[int, ...] | None = None  # None: the checkpoint's
    arrivals: Mapping[int, int] = field(default_factory=dict)  # request -> step, where not 0
    aborts: Mapping[int, int] = field(default_factory=dict)  # request -> step


@dataclass
class Outcome:
    """What a run did; requests in the order of the case, choices in theirs."""

    outputs: list[list[list[SampledToken]]]
    texts: list[list[str]]
    finish_reasons: list[list[str | None]]
    swaps: list[int]  # times a sequence of the request was swapped out
    steps: int
    frames: int
    channel_broadcasts: int
    group_broadcasts: int  # counted at the process group
    swapped_out: int
    swapped_in: int
    copied: int
    recomputes: int
    prefix_hits: int  # tokens
    peak_blocks: int
    free_at_end: tuple[int, int]
    published: list[dict[str, Any]]  # frames, arrays as lists
    follower_steps: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> list[list[list[int]]]:
        return [[[t.token_id for t in choice] for choice in n] for n in self.outputs]


class LaunchingExecutor(StepExecutor):
    """Says that a device is still at the forward when the call returns."""

    asynchronous = True


class RecordingChannel:
    """Publishes, and keeps what it published."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.published: list[dict[str, Any]] = []

    def publish(self, mapping: Mapping[str, Any]) -> Any:
        frame = {k: v if isinstance(v, int) else v.tolist() for k, v in mapping.items()}
        self.published.append(frame)
        return self._channel.publish(mapping)


def run_cases(cases: Sequence[Case], tp: int = 1) -> list[Outcome]:
    """Run the cases one after the other on the same `tp` spawned ranks."""
    cuda = any(case.device == "cuda" for case in cases)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    results = run_ranks(_run_cases, tp, list(cases), timeout_s=240, backend=backend)
    outcomes: list[Outcome] = results[0]
    for rank in range(1, tp):
        for outcome, steps in zip(outcomes, results[rank], strict=True):
            outcome.follower_steps.append(steps)
    return outcomes


def _run_cases(rank: int, cases: list[Case]) -> list[Outcome] | list[int]:
    torch.set_num_threads(1)
    group = dist.new_group(group_desc="control")
    assert group is not None
    calls = _count_broadcasts(group)
    outcomes: list[Outcome] = []
    steps: list[int] = []
    for case in cases:
        model = load_model(case.checkpoint, group=dist.group.WORLD, device=case.device)
        kv_cache = KVCache(
            model.cache_spec,
            num_blocks=case.num_blocks,
            num_host_blocks=case.num_host_blocks,
            block_size=case.block_size,
            device=case.device,
        )
        channel = open_channel(
            group, transport=case.transport, device=torch.device(case.device), timeout_s=60
        )
        executor_type = LaunchingExecutor if case.behind_launch else StepExecutor
        executor = executor_type(model, kv_cache, NullObserver())
        if rank == 0:
            calls.clear()
            outcomes.append(_drive(case, channel, executor, calls))
        else:
            steps.append(executor.follow(channel))
        channel.close()
    return outcomes if rank == 0 else steps


def _count_broadcasts(group: dist.ProcessGroup) -> list[int]:
    """Every broadcast that reaches `group`'s backend adds its bytes to the list."""
    calls: list[int] = []
    original = dist.ProcessGroup.broadcast

    def broadcast(self: dist.ProcessGroup, tensors: list[torch.Tensor], *args: object) -> object:
        if self.group_name == group.group_name:
            calls.append(sum(tensor.nbytes for tensor in tensors))
        return original(self, tensors, *args)

    dist.ProcessGroup.broadcast = broadcast  # the process ends with the test
    return calls


def _drive(case: Case, channel: Channel, executor: StepExecutor, calls: list[int]) -> Outcome:
    model = ModelConfig.from_dir(case.checkpoint)
    scheduler = Scheduler(
        SchedulerConfig(
            block_size=case.block_size,
            num_blocks=case.num_blocks,
            num_host_blocks=case.num_host_blocks,
            max_batch_tokens=case.max_batch_tokens,
            max_batch_size=case.max_batch_size,
            max_model_len=model.max_position_embeddings,
            chunked_prefill=case.chunked_prefill,
            prefix_caching=case.prefix_caching,
        ),
        model.eos_token_ids if case.eos_token_ids is None else case.eos_token_ids,
    )
    recording = RecordingChannel(channel)
    engine = Engine(
        scheduler=scheduler,
        channel=recording,
        executor=executor,
        sampler=Sampler(),
        tokenizer=Tokenizer(case.checkpoint),
        observer=NullObserver(),
        overlap=case.overlap,
    )
    requests = [
        Request(str(number), tuple(prompt), params)
        for number, (prompt, params) in enumerate(zip(case.prompts, case.params, strict=True))
    ]
    texts: dict[Any, str] = {}
    arriving = dict(enumerate(requests))
    while arriving or engine.has_unfinished:
        step = engine.frames.count
        for number in list(arriving):
            if case.arrivals.get(number, 0) <= step or not engine.has_unfinished:
                engine.add(arriving.pop(number))
        for number, at in case.aborts.items():
            if at == step:
                engine.abort(requests[number].request_id)
        if engine.has_unfinished:
            texts.update(engine.step())
    counters, gauges = scheduler.counters, scheduler.gauges
    return Outcome(
        outputs=[[s.output for s in request.sequences] for request in requests],
        texts=[[texts.get(s, "") for s in request.sequences] for request in requests],
        finish_reasons=[[s.finish_reason for s in request.sequences] for request in requests],
        swaps=[sum(s.num_swaps for s in request.sequences) for request in requests],
        steps=engine.frames.count,
        frames=channel.sequence,
        channel_broadcasts=channel.broadcasts,
        group_broadcasts=len(calls),
        swapped_out=counters.swapped_out,
        swapped_in=counters.swapped_in,
        copied=counters.copied,
        recomputes=counters.recomputes,
        prefix_hits=counters.prefix_hit_tokens,
        peak_blocks=counters.peak_device_blocks,
        free_at_end=(gauges.free_blocks, gauges.free_host_blocks),
        published=recording.published,
    )
