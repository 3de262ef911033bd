"""A rank that dies, and a user who stops the run: a clear word, no leftovers, nothing lost."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_runs import (
    completion,
    finish,
    generate_args,
    onecast_processes,
    rank_processes,
    read_results,
    run,
    start,
    wait_for,
    write_batch,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

NUM_REQUESTS = 60


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    rng = random.Random(1)
    return write_batch(
        tmp_path / "in.jsonl",
        [
            completion(f"r{i}", "begat " * rng.randrange(1, 60), max_tokens=rng.randrange(20, 100))
            for i in range(NUM_REQUESTS)
        ],
    )


def args(batch: Path, *more: object) -> list[object]:
    # Small steps: enough of them that a run can be met in its middle.
    return generate_args(
        batch, batch.with_name("out.jsonl"), "--max-batch-size=6", "--num-blocks=48", *more
    )


def wait_for_results(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    def enough() -> bool:
        assert process.poll() is None, "the run ended before it was met in its middle"
        return output.exists() and output.read_bytes().count(b"\n") >= count

    wait_for(enough, f"{count} results in {output}")


def wait_for_end(pids: set[int]) -> None:
    wait_for(lambda: not pids & onecast_processes(), f"the ranks {pids} to end", 20)


def assert_all_answered_once(output: Path) -> None:
    names = [result["custom_id"] for result in read_results(output)]
    assert sorted(names) == sorted(f"r{i}" for i in range(NUM_REQUESTS))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_within_seconds_and_resume_finishes_the_rest(
    batch: Path, victim: int
) -> None:
    output = batch.with_name("out.jsonl")
    process = start(*args(batch))
    wait_for_results(output, 5, process)
    pid = rank_processes(process.pid)[victim]
    os.kill(pid, signal.SIGKILL)
    killed_s = time.monotonic()
    status, _, err = finish(process, 60)
    assert time.monotonic() - killed_s < 15
    assert status != 0
    assert f"rank {victim} (pid {pid}) was killed by SIGKILL" in err
    match = re.search(rf"(\d+) of {NUM_REQUESTS} results are complete", err)
    assert match is not None, err
    survivors = output.read_bytes()
    assert int(match[1]) == survivors.count(b"\n") >= 5
    status, _, err = run(*args(batch, "--resume"))
    assert status == 0, err
    assert output.read_bytes().startswith(survivors)
    assert_all_answered_once(output)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_restart_is_told_once_with_its_cause(batch: Path, victim: int) -> None:
    output = batch.with_name("out.jsonl")
    process = start(*args(batch, "--max-restarts=2", "--no-telemetry"))
    wait_for_results(output, 5, process)
    pid = rank_processes(process.pid)[victim]
    os.kill(pid, signal.SIGKILL)
    status, _, err = finish(process, 60)
    assert status == 0, err
    cause = f"onecast: rank {victim} (pid {pid}) was killed by SIGKILL; restart 1 of 2\n"
    assert err.count("; restart ") == err.count(cause) == 1, err
    assert_all_answered_once(output)


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing_and_double_nothing(batch: Path) -> None:
    rng = random.Random(os.getpid())
    output = batch.with_name("out.jsonl")
    kills = 0
    for _ in range(40):
        process = start(*args(batch, "--resume", "--no-telemetry"))
        time.sleep(rng.uniform(0.5, 9.0))
        ranks = rank_processes(process.pid)
        target = rng.choice([*ranks.values(), process.pid])
        if process.poll() is None:
            os.kill(target, signal.SIGKILL)
            kills += 1
        status, _, err = finish(process, 60)
        wait_for_end(set(ranks.values()))
        assert status in (0, 1, -signal.SIGKILL), err
        if status == 0:
            if kills:
                break
            output.unlink()  # the run was over before its first kill
    else:
        status, _, err = run(*args(batch, "--resume", "--no-telemetry"))
        assert status == 0, err
    assert kills
    assert_all_answered_once(output)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_cleanly_and_says_how_to_go_on(
    batch: Path, stop: signal.Signals
) -> None:
    output = batch.with_name("out.jsonl")
    process = start(*args(batch))
    wait_for_results(output, 3, process)
    process.send_signal(stop)
    status, out, err = finish(process, 30)
    assert status == 128 + stop
    assert "Traceback" not in out + err
    assert f"stopped by {stop.name}" in err
    assert "--resume" in err
    read_results(output)


@pytest.mark.parametrize("when", ["at the start", "in the middle"])
def test_a_killed_launcher_takes_its_ranks_with_it(batch: Path, when: str) -> None:
    process = start(*args(batch))
    if when == "in the middle":
        wait_for_results(batch.with_name("out.jsonl"), 2, process)
    wait_for(lambda: len(rank_processes(process.pid)) == 2, "two ranks")
    ranks = set(rank_processes(process.pid).values())
    process.kill()
    finish(process, 30)
    wait_for_end(ranks)
