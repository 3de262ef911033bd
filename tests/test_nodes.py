"""A run over two hosts, two ranks each: the same tokens; cut off, it goes on, or says who is lost.

The hosts are network namespaces (`hosts`): the ranks of one reach those of the other by TCP alone,
and a cable between them can be taken down.
"""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import completion, generate_args, read_results, run, wait_for, write_batch
from hosts import NoHosts, TwoHosts, two_hosts
from node_runs import NodeRun

from onecast.runtime import neighbours
from onecast.runtime.config import RankEnvironment
from onecast.runtime.neighbours import Door, Neighbours

METRICS_PORT = 19464  # of each host: its network is its own


@pytest.fixture
def both() -> Iterator[TwoHosts]:
    try:
        with two_hosts() as made:
            yield made
    except NoHosts as error:
        pytest.skip(f"two hosts cannot be made: {error}")


def rank_of_four(rank: int, master_addr: str) -> RankEnvironment:
    return RankEnvironment(
        rank=rank,
        local_rank=rank % 2,
        world_size=4,
        local_world_size=2,
        node=rank // 2,
        run_id="",
        run_dir=None,
        launcher_pid=None,
        several_ranks_per_gpu=False,
        master_addr=master_addr,
        master_port=29500,
    )


def test_a_node_that_cannot_be_reached_is_named_with_its_ranks(both: TwoHosts) -> None:
    doors = [
        both.on_network(rank // 2, lambda rank=rank: Door(rank_of_four(rank, both.address)))
        for rank in range(4)
    ]
    addresses = [door.address for door in doors]
    assert [bool(address) for address in addresses] == [True, False, True, False]
    for rank, expected in (
        (0, "node 1 (10.0.0.2, ranks 2 and 3)"),
        (3, "node 0 (10.0.0.1, ranks 0 and 1)"),
    ):
        here = rank // 2
        others = both.on_network(here, lambda: Neighbours(addresses, rank))  # noqa: B023
        assert both.on_network(here, others.lost) is None
        both.cut(1)
        lost = both.on_network(here, others.lost)
        assert lost is not None and lost.startswith(f"{expected} cannot be reached: ")
        both.mend(1)
        wait_for(lambda: both.on_network(here, others.lost) is None, "the cable to carry", 10)  # noqa: B023
    others = both.on_network(0, lambda: Neighbours(addresses, 0))
    doors[2].close()
    assert both.on_network(0, others.lost) is None, "its process has ended, the node answers"
    for door in doors:
        door.close()


def test_a_node_behind_a_firewall_from_the_beginning_is_not_called_lost(
    both: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "TIMEOUT_S", 0.3)
    door = both.on_network(1, lambda: Door(rank_of_four(2, both.address)))
    both.cut(1)
    others = both.on_network(0, lambda: Neighbours(["", "", door.address, ""], 0))
    assert both.on_network(0, others.lost) is None
    door.close()


def write_short_batch(folder: Path) -> Path:
    lines = [completion(f"r{i}", "And the king said" * (1 + i), max_tokens=24) for i in range(5)]
    return write_batch(folder / "in.jsonl", lines)


def texts_of(output: Path) -> dict[str, str]:
    results = read_results(output)
    texts = {r["custom_id"]: r["response"]["body"]["choices"][0]["text"] for r in results}
    assert len(texts) == len(results), "a line was answered twice"
    return texts


def texts_on_one_node(batch: Path) -> dict[str, str]:
    output = batch.with_name("one-node.jsonl")
    status, _, err = run(*generate_args(batch, output, "--no-telemetry", tp=1))
    assert status == 0, err
    return texts_of(output)


def wait_for_a_result(output: Path, run: NodeRun) -> None:
    def there() -> bool:
        assert run.runs(), run.story()
        return output.exists() and b"\n" in output.read_bytes()

    wait_for(there, "a result", 90)


def scrape(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return ""


def ranks_scraped(text: str) -> set[str]:
    return set(
        re.findall(r'^onecast_step_duration_seconds_count\{.*?rank="(\d)"', text, re.MULTILINE)
    )


@pytest.mark.slow
def test_a_short_cut_is_sat_out_and_both_nodes_are_in_one_trace(
    both: TwoHosts, tmp_path: Path
) -> None:
    batch, output = write_short_batch(tmp_path), tmp_path / "out.jsonl"
    trace = tmp_path / "trace.json"
    files = f"--input={batch}", f"--output={output}"
    options = ("--max-batch-size=1", f"--metrics-port={METRICS_PORT}", f"--trace={trace}")
    with NodeRun(both, tmp_path, "generate", *files, *options) as run:
        wait_for_a_result(output, run)
        url = f"http://127.0.0.1:{METRICS_PORT}/metrics"
        for node, ranks in enumerate(({"0", "1"}, {"2", "3"})):
            wait_for(
                lambda node=node, ranks=ranks: (
                    ranks_scraped(both.on_network(node, lambda: scrape(url))) == ranks
                ),
                f"the ranks of node {node}, and no others, on its /metrics",
                30,
            )
        both.cut(1)
        before = len(output.read_bytes())
        wait_for(lambda: output.stat().st_size == before, "the last result to be written", 5)
        both.mend(1)
        assert run.finish() == [0, 0], run.story()
    assert texts_of(output) == texts_on_one_node(batch)
    by_node = [
        {
            (span["traceID"], span["operationName"])
            for entry in json.loads(file.read_text())["data"]
            for span in entry["spans"]
        }
        for file in (trace, trace.with_name("trace.node1.json"))
    ]
    steps = [{t for t, name in spans if name == "worker.step"} for spans in by_node]
    assert steps[0] & steps[1], "a step is one trace over both nodes"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "generate c10d"])
def test_a_long_cut_is_named_on_both_sides_and_the_run_comes_back_with_the_cable(
    both: TwoHosts, tmp_path: Path, launcher: str
) -> None:
    batch, output = write_short_batch(tmp_path), tmp_path / "out.jsonl"
    files = f"--input={batch}", f"--output={output}"
    options = ("--max-batch-size=1", "--timeout-s=3", "--no-telemetry")
    lost = (
        "node 1 (10.0.0.2, ranks 2 and 3) cannot be reached",
        "node 0 (10.0.0.1, ranks 0 and 1) cannot be reached",
    )
    with NodeRun(both, tmp_path, launcher, *files, *options, max_restarts=3) as run:
        wait_for_a_result(output, run)
        both.cut(1)
        wait_for(
            lambda: all(text in said for text, said in zip(lost, run.texts(), strict=True)),
            "both nodes to name the other",
            30,
        )
        both.mend(1)
        assert run.finish() == [0, 0], run.story()
        said = run.texts()
    assert texts_of(output) == texts_on_one_node(batch)
    if launcher != "torchrun":
        assert all(re.search(r"onecast: rank \d: NodeLost: .*; restart 1 of 3", s) for s in said)


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_a_server_answers_from_ranks_on_both_nodes_and_ends_on_both(
    both: TwoHosts, tmp_path: Path
) -> None:
    lines = [completion("one", max_tokens=20)]
    batch = write_batch(tmp_path / "in.jsonl", lines)
    url = "http://127.0.0.1:8000"
    with NodeRun(both, tmp_path, "serve", "--port=8000") as run:

        def ready() -> bool:
            assert run.runs(), run.story()
            return bool(both.on_network(0, lambda: scrape(f"{url}/ready")))

        wait_for(ready, "the server", 90)
        body = {**lines[0]["body"], "model": "checkpoint"}
        answer = both.on_network(0, lambda: post(f"{url}/v1/completions", body))
        assert {"one": answer["choices"][0]["text"]} == texts_on_one_node(batch)
        run.stop(0)
        assert run.finish(60) == [0, 0], run.story()
