"""How `onecast serve` ends, idles, restarts and is measured; each test has its own server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from cli_runs import DEMO, finish, wait_for
from serve_runs import ask, completion_body, connect, serving, wait_until_serving

from onecast.runtime.serve_messages import STATUSES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left_behind")]

PATH = "/v1/completions"


def _long(url: str, answers: list[Any], **more: Any) -> threading.Thread:
    """A request of several hundred steps, under way when this returns."""
    body = completion_body(max_tokens=450, ignore_eos=True, stream=True, **more)
    connection = connect(url)
    connection.request("POST", PATH, json.dumps(body).encode())
    response = connection.getresponse()
    first = response.read(6)

    def read() -> None:
        answers.append((first + response.read()).decode())
        connection.close()

    thread = threading.Thread(target=read)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_answers_what_runs_and_leaves_with_0(number: int) -> None:
    with serving() as one:
        answers: list[str] = []
        thread = _long(one.url, answers)
        status, _, err = one.stop(number)
        thread.join(60)
    assert (status, err) == (0, "")
    assert answers[0].endswith("data: [DONE]\n\n")
    assert answers[0].count('"finish_reason":"length"') == 1


def test_what_is_not_done_when_draining_must_end_is_cut_and_said() -> None:
    with serving("--drain-timeout-s=0") as one:
        answers: list[str] = []
        thread = _long(one.url, answers)
        status, _, err = one.stop()
        thread.join(60)
    assert status == 0
    assert "--drain-timeout-s 0 was over, 1 requests were cut off" in err
    assert "engine_stopped" in answers[0]


def test_a_second_signal_ends_it_at_once() -> None:
    with serving("--drain-timeout-s=600") as one:
        answers: list[str] = []
        threads = [_long(one.url, answers, n=8)]
        body = completion_body(max_tokens=450, ignore_eos=True, n=8)
        more = [threading.Thread(target=ask, args=(one.url, PATH, body)) for _ in range(6)]
        for thread in more:
            thread.start()
        os.kill(one.process.pid, signal.SIGTERM)
        wait_for(lambda: ask(one.url, "/ready").status == 503, "draining", 20)
        os.kill(one.process.pid, signal.SIGTERM)
        status, _, err = finish(one.process)
        for thread in (*threads, *more):
            thread.join(60)
    assert status == 128 + signal.SIGTERM
    assert "onecast: stopped by SIGTERM\n" in err
    assert "engine_stopped" in answers[0]


def test_a_rank_that_dies_is_named_and_restarted_with_its_server() -> None:
    with serving("--max-restarts=1", "--port=0") as one:
        assert ask(one.url, "/ready").status == 200
        os.kill(one.ranks[1], signal.SIGKILL)
        again = wait_until_serving(one.process)
        answer = ask(again, PATH, completion_body())
        assert answer.status == 200
        os.kill(one.ranks[1], signal.SIGKILL)
        status, _, err = finish(one.process)
    assert status == 1
    assert re.search(r"rank 1 \(pid \d+\) was killed by SIGKILL", err), err


def test_a_rank_that_dies_while_it_is_being_ended_is_not_started_again() -> None:
    with serving("--max-restarts=2", "--drain-timeout-s=30") as one:
        answers: list[str] = []
        thread = _long(one.url, answers, n=8)
        os.kill(one.process.pid, signal.SIGTERM)
        wait_for(lambda: ask(one.url, "/ready").status == 503, "draining", 20)
        os.kill(one.ranks[1], signal.SIGKILL)
        status, out, err = finish(one.process)
        thread.join(60)
    assert "serving" not in out, "it was asked to end"
    assert status == 1
    assert re.search(r"rank 1 \(pid \d+\) was killed by SIGKILL\n", err), err
    assert "restart" not in err


def test_ranks_end_with_their_launcher_even_when_it_is_killed() -> None:
    with serving("--drain-timeout-s=600") as one:
        answers: list[str] = []
        thread = _long(one.url, answers, n=8)
        ranks = one.ranks.values()
        os.kill(one.process.pid, signal.SIGKILL)
        finish(one.process)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), "their end", 10)
        thread.join(60)
    assert "engine_stopped" in answers[0]


@pytest.mark.parametrize("channel", ["shared-memory", "process-group"])
def test_idle_beyond_every_time_out_it_sleeps_and_is_not_called_hung(channel: str) -> None:
    env = {"ONECAST_HANG_S": "3"}
    with serving(f"--channel={channel}", "--timeout-s=2", env=env) as one:
        assert ask(one.url, PATH, completion_body()).status == 200
        ranks = one.ranks.values()
        before = [_cpu_s(pid) for pid in ranks]
        time.sleep(6)
        spent = [_cpu_s(pid) - start for pid, start in zip(ranks, before, strict=True)]
        assert max(spent) < 3, f"CPU seconds of 6: {spent}"
        assert ask(one.url, PATH, completion_body()).status == 200
        status, _, err = one.stop()
    assert (status, err) == (0, "")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_requests_are_measured_and_idle_time_is_in_no_step() -> None:
    port = _free_port()
    with serving(f"--metrics-port={port}") as one:
        for _ in range(3):
            assert ask(one.url, PATH, completion_body()).status == 200
            time.sleep(1.5)
        assert ask(one.url, PATH, b"{").status == 400
        address = f"http://127.0.0.1:{port}/metrics"

        def scrape() -> dict[str, float]:
            with urllib.request.urlopen(address, timeout=10) as response:
                lines = response.read().decode().splitlines()
            pairs = (line.rsplit(" ", 1) for line in lines if line[:1] != "#" and "# {" not in line)
            return {name: float(value) for name, value in pairs}

        refused = 'onecast_http_responses_total{rank="0",status="400"}'
        served = 'onecast_request_duration_seconds_count{rank="0"}'
        wait_for(
            lambda: (found := scrape()).get(served) == 3 and found.get(refused) == 1,
            "the requests to be counted",
            20,
        )
        found = scrape()
    for name in ("queue", "time_to_first_token"):
        assert found[f'onecast_request_{name}_seconds_count{{rank="0"}}'] == 3
    for status in STATUSES:  # from the start on: what appears with its first event has no rate
        answers = found[f'onecast_http_responses_total{{rank="0",status="{status}"}}']
        assert answers == {200: 3, 400: 1}.get(status, 0)
    for rank in (0, 1):
        steps = found[f'onecast_step_duration_seconds_count{{rank="{rank}"}}']
        assert steps == 3 * 8, "an idle engine makes no steps"
        assert found[f'onecast_step_duration_seconds_sum{{rank="{rank}"}}'] < 3


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_torchrun_starts_and_drains_it_too() -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    process = subprocess.Popen(
        [torchrun, "--nproc-per-node=2", "-m", "onecast.runtime.worker", "--serve",
         f"--model={DEMO}", "--port=0", "--served-model-name=demo", "--num-blocks=256"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = wait_until_serving(process)
        answers: list[str] = []
        thread = _long(url, answers)
        process.send_signal(signal.SIGTERM)
        finish(process)
        thread.join(60)
    finally:
        process.kill()
    assert answers[0].endswith("data: [DONE]\n\n")
