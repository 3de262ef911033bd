"""On and off in one process: from the first group on, and then as if it had never been."""

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from onecast.telemetry import TelemetrySettings, auto, start_session
from onecast.telemetry.auto_hook import FUNCTION, MODULE
from onecast.telemetry.auto_instrumentor import TorchDistributedInstrumentor
from onecast.telemetry.current import current_session

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def all_that_is_patched() -> dict[str, Any]:
    from torch._C._distributed_c10d import Backend, ProcessGroup, Work
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim import optimizer

    return {
        **{f"{kind.__name__}.{name}": entry for kind in (ProcessGroup, Backend, Work)
           for name, entry in vars(kind).items()},
        "groups": getattr(sys.modules[MODULE], FUNCTION),
        "ddp": DistributedDataParallel.__init__,
        "before": dict(optimizer._global_optimizer_pre_hooks),
        "after": dict(optimizer._global_optimizer_post_hooks),
        "finders": list(sys.meta_path),
    }  # fmt: skip


@pytest.fixture
def off_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = all_that_is_patched()
    yield
    auto.uninstrument()
    if dist.is_initialized():
        dist.destroy_process_group()
    assert current_session() is None
    assert all_that_is_patched() == before


def make_the_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def counted() -> dict[str, int]:
    session = current_session()
    assert session is not None
    return {each["op"]: each["count"] for each in session.report()["collectives"]}


def wait_for_count(op: str, count: int) -> None:
    from auto_runs import wait_until

    wait_until(lambda: counted().get(op) == count, f"{count} {op}", 10)


def test_a_session_lives_from_the_first_group_to_the_end(
    off_again: None, capfd: pytest.CaptureFixture[str]
) -> None:
    auto.instrument()
    auto.instrument()  # twice is once
    assert current_session() is None
    make_the_group()
    session = current_session()
    assert session is not None and session.recording
    said = capfd.readouterr().err
    assert said == f"onecast telemetry: metrics of 1 rank at {session.metrics_url}\n"
    for _ in range(3):
        dist.all_reduce(torch.ones(4))
    wait_for_count("all_reduce", 3)
    auto.uninstrument()
    assert current_session() is None and not session.recording
    dist.all_reduce(torch.ones(4))
    auto.uninstrument()


def test_a_group_that_is_there_is_recorded_from_then_on(off_again: None) -> None:
    make_the_group()
    dist.all_reduce(torch.ones(4))
    TorchDistributedInstrumentor().instrument(skip_dep_check=True)
    dist.all_reduce(torch.ones(4))
    wait_for_count("all_reduce", 1)
    TorchDistributedInstrumentor().uninstrument()
    assert current_session() is None


def test_removed_before_there_was_a_group_it_was_never_there(off_again: None) -> None:
    auto.instrument()
    auto.uninstrument()
    make_the_group()
    assert current_session() is None


def test_a_session_that_the_program_starts_is_the_one_that_is_there(
    off_again: None, caplog: pytest.LogCaptureFixture
) -> None:
    auto.instrument()
    make_the_group()
    with caplog.at_level(logging.WARNING):
        session = start_session(
            rank=0, local_rank=0, world_size=1, local_world_size=1, engine_id="mine",
            settings=TelemetrySettings(trace_file="/nowhere/trace.json"),
        )  # fmt: skip
    assert session is current_session()
    assert "recorded already" in caplog.text
    with session.step(7):
        dist.all_reduce(torch.ones(4))
    report = session.close()
    assert report is not None and report["steps"] == 1  # ours before it was none
    assert current_session() is None


def test_a_program_that_closes_the_session_goes_on_alone(off_again: None) -> None:
    auto.instrument()
    make_the_group()
    session = current_session()
    assert session is not None
    session.close()
    dist.all_reduce(torch.ones(4))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.step()
    assert current_session() is None


def test_a_mistaken_variable_leaves_the_program_alone(
    off_again: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONECAST_HANG_S", "soon")
    auto.instrument()
    make_the_group()
    dist.all_reduce(torch.ones(4))
    said = capfd.readouterr().err
    assert said.startswith("onecast telemetry: nothing is recorded: ValueError: ONECAST_HANG_S is")
    assert said.count("\n") == 1 and current_session() is None


def test_a_pretended_group_and_a_disabled_sdk_start_nothing(
    off_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    auto.instrument()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    assert current_session() is None
    dist.destroy_process_group()
    auto.uninstrument()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    auto.instrument()
    make_the_group()
    assert current_session() is None
