"""An engine that runs out of requests, again and again: it rests, and goes on as if it had not."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine_runs import Case, run_cases
from test_overlap import PRESSURE, whole_case
from tiny_checkpoints import make_variant

from onecast.comm import open_channel
from onecast.comm.testing import run_ranks
from onecast.runtime.engine import Engine
from onecast.runtime.executor import StepExecutor
from onecast.runtime.kv_cache import KVCache
from onecast.runtime.model_config import ModelConfig
from onecast.runtime.model_runner import load_model
from onecast.runtime.observer import NullObserver
from onecast.runtime.request import Request
from onecast.runtime.sampling import Sampler
from onecast.runtime.scheduler import Scheduler, SchedulerConfig
from onecast.runtime.tokenizer import Tokenizer

TOGETHER = 5  # requests between two rests
# Steps, after which copies of them all are aborted: what was planned ahead is left over. 0: never.
CUTS = (*range(3, 43, 4), 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("checkpoint") / "llama", "llama")


def test_rests_change_no_token_and_leave_no_block(checkpoint: Path) -> None:
    case = whole_case(checkpoint)
    (whole,) = run_cases([case])
    (tokens, frames, free), followed = run_ranks(_run, 2, case, timeout_s=100)
    assert tokens == whole.token_ids
    assert free == 24
    assert followed == frames, "a rest is a step to both"


def _run(rank: int, case: Case) -> tuple[list[list[list[int]]], int, int] | int:
    torch.set_num_threads(1)
    num_blocks = PRESSURE["swapping"]["num_blocks"]
    model = load_model(case.checkpoint, group=dist.group.WORLD, device="cpu")
    kv_cache = KVCache(
        model.cache_spec,
        num_blocks=num_blocks,
        num_host_blocks=400,
        block_size=case.block_size,
        device=torch.device("cpu"),
    )
    channel = open_channel(timeout_s=60)
    executor = StepExecutor(model, kv_cache, NullObserver())
    if rank:
        return executor.follow(channel)
    config = ModelConfig.from_dir(case.checkpoint)
    limits = SchedulerConfig(
        block_size=case.block_size,
        num_blocks=num_blocks,
        num_host_blocks=400,
        max_batch_tokens=16,
        max_batch_size=64,
        max_model_len=config.max_position_embeddings,
    )
    engine = Engine(
        scheduler=Scheduler(limits, config.eos_token_ids),
        channel=channel,
        executor=executor,
        sampler=Sampler(),
        tokenizer=Tokenizer(case.checkpoint),
        observer=NullObserver(),
    )
    engine.rest()
    pairs = list(zip(case.prompts, case.params, strict=True))
    tokens = []
    for first in range(0, len(pairs), TOGETHER):
        for cut in CUTS:
            requests = [
                Request(f"{first}-{number}-{cut}", tuple(prompt), params)
                for number, (prompt, params) in enumerate(pairs[first : first + TOGETHER])
            ]
            for request in requests:
                engine.add(request)
            steps = 0
            while engine.has_unfinished:
                engine.step()
                steps += 1
                if steps == cut:
                    for request in requests:
                        engine.abort(request.request_id)
            for _ in range(3):
                engine.rest()
        tokens += [[[t.token_id for t in s.output] for s in r.sequences] for r in requests]
    channel.close()
    return tokens, engine.frames.count, engine.scheduler.gauges.free_blocks
