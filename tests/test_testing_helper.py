"""run_ranks: real processes in, results out, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from onecast.comm.testing import RankFailed, RanksHung, run_ranks


def record_pid(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()


def assert_all_gone(folder: Path) -> None:
    pids = [int(entry.name) for entry in folder.iterdir()]
    assert pids
    deadline = time.monotonic() + 5
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.05)


def add_ranks(rank: int, offset: int) -> dict[str, object]:
    total = torch.tensor([rank])
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OF_THIS_TEST")
    return {
        "rank": rank,
        "sum": int(total) + offset,
        "tensor": total,
        "env": [os.environ[name] for name in names],
        "threads": torch.get_num_threads(),
    }


def test_results_come_back_in_rank_order_from_a_real_world():
    results = run_ranks(add_ranks, 3, 100, env={"OF_THIS_TEST": "yes"})
    assert [r["rank"] for r in results] == [0, 1, 2]
    assert [r["sum"] for r in results] == [103, 103, 103]
    assert [r["env"] for r in results] == [[str(k), "3", str(k), "yes"] for k in range(3)]
    assert {r["threads"] for r in results} == {1}
    assert torch.equal(results[2]["tensor"], torch.tensor([3]))
    assert "OF_THIS_TEST" not in os.environ


def fail_on_one(rank: int, folder: str) -> str:
    record_pid(folder)
    if rank == 1:
        raise KeyError("the reason")
    return f"rank {rank} is well"


def test_a_failing_rank_is_named_with_its_traceback_and_all_are_reaped(tmp_path):
    with pytest.raises(RankFailed, match="the reason") as caught:
        run_ranks(fail_on_one, 2, str(tmp_path))
    assert caught.value.rank == 1
    assert "fail_on_one" in caught.value.details
    assert caught.value.results == {0: "rank 0 is well"}
    assert_all_gone(tmp_path)


def hang_on_zero(rank: int, folder: str) -> None:
    record_pid(folder)
    if rank == 0:
        child = subprocess.Popen(["sleep", "100"])
        Path(folder, str(child.pid)).touch()
        sleep_for_ever()


def sleep_for_ever() -> None:
    time.sleep(1000)


def test_a_hung_rank_is_named_with_its_stack_and_reaped_with_its_children(tmp_path):
    with pytest.raises(RanksHung, match="sleep_for_ever") as caught:
        run_ranks(hang_on_zero, 2, str(tmp_path), timeout_s=12)
    assert caught.value.ranks == [0]
    assert caught.value.results == {1: None}
    assert_all_gone(tmp_path)


def kill_itself(rank: int, folder: str) -> None:
    record_pid(folder)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_is_named_with_its_signal(tmp_path):
    with pytest.raises(RankFailed, match="SIGKILL") as caught:
        run_ranks(kill_itself, 2, str(tmp_path))
    assert caught.value.rank == 0
    assert_all_gone(tmp_path)


def fail_when_the_other_is_dead(rank: int, folder: str) -> None:
    kill_itself(rank - 1, folder)
    time.sleep(0.5)
    raise RuntimeError("I lost my peer")


def test_the_first_that_failed_is_named_whatever_its_rank(tmp_path):
    with pytest.raises(RankFailed) as caught:
        run_ranks(fail_when_the_other_is_dead, 2, str(tmp_path))
    assert caught.value.rank == 1
    first, _, others = caught.value.details.partition("--- rank 0 failed too")
    assert "SIGKILL" in first and "I lost my peer" in others


def run_hanging_ranks(folder: str) -> None:
    run_ranks(hang_on_zero, 2, folder)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_survives_an_interrupted_or_killed_parent(tmp_path, how):
    script = (
        "import signal, sys, test_testing_helper as t\n"
        # A shell that starts jobs in the background has them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "t.run_hanging_ranks(sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-P", "-c", script, str(tmp_path)]
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 40
        while len(list(tmp_path.iterdir())) < 3:  # two ranks and the child of one
            assert time.monotonic() < deadline, "the ranks never started"
            time.sleep(0.05)
        parent.send_signal(how)
        parent.wait(20)
    finally:
        parent.kill()
        parent.wait()
    assert_all_gone(tmp_path)


def test_a_world_without_ranks_is_refused():
    with pytest.raises(ValueError, match="world_size is 0"):
        run_ranks(add_ranks, 0)
