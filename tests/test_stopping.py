"""A run that is asked to stop twice, at any moment, ends as after once and leaves nothing."""

import os
import signal
import time
from pathlib import Path

import pytest
from cli_runs import (
    completion,
    finish,
    generate_args,
    rank_processes,
    start,
    wait_for,
    write_batch,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    return write_batch(
        tmp_path / "in.jsonl", [completion(f"r{i}", max_tokens=200) for i in range(200)]
    )


def wait_for_a_result(output: Path) -> None:
    wait_for(lambda: output.exists() and output.stat().st_size > 0, "a result")


@pytest.mark.parametrize(
    "pause_s", [*(pytest.param(pause, marks=pytest.mark.slow) for pause in (0.0, 0.02, 1.0)), 0.3]
)
def test_a_second_interrupt_ends_as_the_first_does(batch: Path, pause_s: float) -> None:
    output = batch.with_name("out.jsonl")
    process = start(*generate_args(batch, output))
    wait_for_a_result(output)
    process.send_signal(signal.SIGINT)
    time.sleep(pause_s)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    status, out, err = finish(process, 40)
    assert status == 128 + signal.SIGINT, err
    assert "Traceback" not in out + err
    assert err.count("stopped by SIGINT") == 1, err


def test_a_second_interrupt_ends_ranks_that_do_not_end_by_themselves(batch: Path) -> None:
    output = batch.with_name("out.jsonl")
    process = start(*generate_args(batch, output))
    wait_for_a_result(output)
    ranks = rank_processes(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)  # the elastic launcher gives it 30 s
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process, 20)
    assert status == 128 + signal.SIGINT, err
    assert "Traceback" not in out + err
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), "ranks", 5)
