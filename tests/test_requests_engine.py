"""What the engine tells an observer of its requests, step by step, on a real rank."""

from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import make_checkpoint

from onecast.comm.testing import run_ranks
from onecast.runtime.observer import NullObserver
from onecast.runtime.request import Request, SamplingParams, TraceHeaders


class Recorded:
    """Writes down every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def admitted(
        self, number: int, traceparent: str | None = None, tracestate: str | None = None
    ) -> None:
        self.calls.append(("admitted", number, traceparent, tracestate))

    def scheduled(self, step: int, numbers: Set[int]) -> None:
        self.calls.append(("scheduled", step, set(numbers)))

    def finished(self, *values: Any) -> None:
        self.calls.append(("finished", *values))


class Watching(NullObserver):
    def __init__(self, requests: Recorded) -> None:
        self.requests = requests


def _run(rank: int, checkpoint: Path, fail_at: int | None) -> list[tuple[Any, ...]]:
    import torch.distributed as dist

    from onecast.comm import open_channel
    from onecast.runtime.engine import Engine
    from onecast.runtime.executor import StepExecutor
    from onecast.runtime.kv_cache import KVCache
    from onecast.runtime.model_config import ModelConfig
    from onecast.runtime.model_runner import load_model
    from onecast.runtime.sampling import Sampler
    from onecast.runtime.scheduler import Scheduler, SchedulerConfig
    from onecast.runtime.tokenizer import Tokenizer

    torch.set_num_threads(1)
    recorded = Recorded()
    observer = Watching(recorded)
    model = load_model(checkpoint, group=dist.group.WORLD, device="cpu")
    sizes = {"num_blocks": 40, "num_host_blocks": 40, "block_size": 4}
    cache = KVCache(model.cache_spec, device="cpu", **sizes)
    config = ModelConfig.from_dir(checkpoint)
    limits = SchedulerConfig(
        **sizes,
        max_batch_tokens=64,
        max_batch_size=2,  # the third request has to wait
        max_model_len=config.max_position_embeddings,
    )
    engine = Engine(
        scheduler=Scheduler(limits, config.eos_token_ids),
        channel=open_channel(dist.group.WORLD, transport="process-group", timeout_s=60),
        executor=StepExecutor(model, cache, observer),
        sampler=Sampler(),
        tokenizer=Tokenizer(checkpoint),
        observer=observer,
    )
    trace = TraceHeaders("00-x", "k=v")
    for name, max_tokens, n in (("a", 2, 1), ("b", 4, 1), ("c", 3, 2), ("d", 3, 1)):
        params = SamplingParams(max_tokens=max_tokens, n=n, temperature=0.0, ignore_eos=True)
        request = Request(name, (5, 6, 7), params, trace=trace if name == "b" else None)
        engine.add(request)
        assert request.number == "abcd".index(name)
    engine.abort("d")
    try:
        while engine.has_unfinished:
            if engine.frames.count == fail_at:
                raise_in(engine)
            engine.step()
    except KeyError:
        assert fail_at is not None
    return recorded.calls


def raise_in(engine: Any) -> None:
    def broken(*ignored: Any) -> Any:
        raise KeyError("broken")

    engine._sampler.sample = broken


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


def _finished(calls: list[tuple[Any, ...]]) -> dict[int, tuple[Any, ...]]:
    return {call[1]: call[2:] for call in calls if call[0] == "finished"}


def test_an_observer_is_told_of_requests_from_their_arrival_to_their_end(checkpoint: Path) -> None:
    (calls,) = run_ranks(_run, 1, checkpoint, None)
    assert calls[:4] == [
        ("admitted", 0, None, None),
        ("admitted", 1, "00-x", "k=v"),
        ("admitted", 2, None, None),
        ("admitted", 3, None, None),
    ]
    assert calls[4][:2] == ("finished", 3), "aborted before it began"
    batches = [call[2] for call in calls if call[0] == "scheduled"]
    assert batches == [{0, 1}, {0, 1}, {1}, {1}, {2}, {2}, {2}]
    assert [call[1] for call in calls if call[0] == "scheduled"] == list(range(7))
    finished = _finished(calls)
    assert list(finished) == [3, 0, 1, 2]
    for number, (prompt, generated, reason, error) in {
        3: (3, 0, "abort", False),
        0: (3, 2, "length", False),
        1: (3, 4, "length", False),
        2: (3, 6, "length", False),  # both choices
    }.items():
        assert finished[number][3:] == (prompt, generated, reason, error)
        arrival, scheduled, first_token = finished[number][:3]
        assert arrival > 0
        assert (
            (scheduled, first_token) == (0, 0) if number == 3 else arrival < scheduled < first_token
        )


def test_requests_under_way_end_with_the_error_of_the_engine(checkpoint: Path) -> None:
    (calls,) = run_ranks(_run, 1, checkpoint, 2)
    finished = _finished(calls)
    assert {number: ends[5:] for number, ends in finished.items()} == {
        3: ("abort", False),
        0: ("length", False),
        1: ("KeyError", True),
        2: ("KeyError", True),
    }
    assert finished[2][1:3] == (0, 0), "it was still waiting"
