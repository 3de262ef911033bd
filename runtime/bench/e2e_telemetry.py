"""What telemetry costs end to end: the same turns with it and without.

Owns the launch in which they take turns: one model, a channel and an engine for each of the two, a
session as `onecast generate` starts it, with a sidecar that serves metrics. Without, what the
session has put into torch.distributed is out of it, and nothing else is told anything.
"""

import gc
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from onecast.comm import AllReduce, Closed, Frame
from onecast.comm.testing import run_ranks
from onecast.runtime.executor import StepExecutor
from onecast.runtime.observer import NullObserver, Observer
from onecast.runtime.tokenizer import Tokenizer
from onecast.telemetry import TelemetrySettings, start_session

from .e2e_channels import TurnChannel, open_turn_channel
from .e2e_prompts import make_prompts
from .e2e_run import (
    WARM_DRAWN,
    DriverTurn,
    Plan,
    backend_of,
    drive,
    join_device,
    load,
    make_engine,
    open_reducer,
)
from .telemetry_toggle import Toggle

_PAUSE_S = 0.1  # for the sidecar to have read what a turn left


class ToggledTurn(NamedTuple):
    """One turn with or without: what it drew, and how many tokens a second."""

    batch: int
    round: int
    on: bool
    tokens: list[list[int]]
    tokens_per_s: float
    steps_us: list[float]
    records: float  # that rank 0 began to write, a step


def launch(tp: int, channel: str, plan: Plan) -> list[ToggledTurn]:
    """Every batch of the plan with and without, in pairs."""
    found = run_ranks(
        _measure, tp, channel, plan, timeout_s=plan.timeout_s, backend=backend_of(plan.device)
    )
    turns: list[ToggledTurn] = found[0]
    return turns


class _Sums:
    """The model's collectives: those that tell the session, or those that do not."""

    def __init__(self, reducers: dict[bool, AllReduce | None]) -> None:
        self._reducers = reducers
        self.all_reduce: Callable[[Tensor], object] | None = None
        self.gather: Callable[[Tensor], Tensor | None] | None = None
        if reducers[True] is not None:
            self.all_reduce, self.gather = self._sum, self._gather
        self._chosen: AllReduce | None = None

    def switch(self, on: bool) -> None:
        self._chosen = self._reducers[on]

    def close(self) -> None:
        for reducer in self._reducers.values():
            if reducer is not None:
                reducer.close()

    def _sum(self, tensor: Tensor) -> None:
        assert self._chosen is not None
        self._chosen.all_reduce(tensor)

    def _gather(self, tensor: Tensor) -> Tensor | None:
        assert self._chosen is not None
        return self._chosen.gather(tensor)


class _Way(NamedTuple):
    """Everything that is told, or not."""

    channel: TurnChannel
    executor: StepExecutor
    observer: Observer


def _measure(rank: int, channel: str, plan: Plan) -> list[ToggledTurn]:
    device = join_device(rank, plan.device)
    tokenizer = Tokenizer(plan.model)
    prompts = make_prompts(tokenizer, max(plan.batches))
    toggle = Toggle()
    world_size = dist.get_world_size()
    session = start_session(
        rank=rank, local_rank=rank, world_size=world_size, local_world_size=world_size,
        engine_id="bench-e2e", settings=TelemetrySettings(), any_port=True,
    )  # fmt: skip
    toggle.instrumented()
    group = dist.new_group(group_desc="tp")
    assert group is not None
    sums = _Sums(
        {
            on: open_reducer(plan, group, probe)
            for on, probe in ((True, session.collectives), (False, None))
        }
    )
    model, kv_cache = load(plan, device, group, sums.all_reduce, sums.gather)
    observers: dict[bool, Observer] = {True: session, False: NullObserver()}
    ways = {}
    for on, observer in observers.items():
        opened = open_turn_channel(channel, device, observer.probe)
        ways[on] = _Way(opened, StepExecutor(model, kv_cache, observer), observer)
    engines = {
        on: make_engine(plan, way.channel, way.executor, tokenizer, kv_cache, way.observer)
        for on, way in ways.items()
        if rank == 0
    }
    chance = random.Random(0)  # the same on all ranks
    steps = dict.fromkeys(ways, 0)  # so far; telemetry tells steps apart by their numbers
    turns = []
    over = False
    try:
        for number in range(-1, plan.rounds):  # the first round only warms up
            drawn = WARM_DRAWN if number < 0 else plan.drawn
            for batch in chance.sample(plan.batches, len(plan.batches)):
                for on in chance.sample([True, False], 2):
                    toggle.switch(False)
                    gc.collect()
                    time.sleep(_PAUSE_S)
                    dist.all_reduce(torch.zeros(1))  # a barrier, over Gloo on any device
                    toggle.switch(on)
                    sums.switch(on)
                    way = ways[on]
                    if rank != 0:
                        steps[on] = _follow(way, steps[on])
                        continue
                    before = session.num_records
                    driver = drive(engines[on], way.channel, prompts[:batch], drawn)
                    records = (session.num_records - before) / len(driver.steps)
                    way.channel.end_turn()
                    if number >= 0:
                        turns.append(_turn(batch, number, on, driver, records))
        over = True
    finally:
        toggle.switch(True)
        session.close(wait=over)  # after an error the other ranks may never come
    for way in ways.values():
        way.channel.close()
    sums.close()
    kv_cache.close()
    return turns


def _turn(batch: int, number: int, on: bool, driver: DriverTurn, records: float) -> ToggledTurn:
    batch_size = len(driver.tokens)
    steps_us = [
        (end - begin) / 1e3
        for (begin, end), published in zip(driver.steps, driver.published, strict=True)
        if published.tokens == batch_size  # decodes
    ]
    return ToggledTurn(batch, number, on, driver.tokens, driver.tokens_per_s, steps_us, records)


def _follow(way: _Way, step: int) -> int:
    """As `StepExecutor.follow`, with steps numbered on from turn to turn; the next number."""
    observer = way.observer
    while True:
        with observer.step(step) as observed:
            with observer.phase("step.receive"):
                frame = _next_frame(way.channel)
                if frame is None:
                    observed.discard()
                    return step
            with frame:
                inputs = frame.mapping
                assert inputs["step"] == step, f"driver is at {inputs['step']}, not {step}"
                observed.set_batch_size(inputs["seq_lens"].shape[0])
                way.executor.execute(inputs)
        step += 1


def _next_frame(channel: TurnChannel) -> Frame | None:
    try:
        return channel.receive()
    except Closed:
        return None
