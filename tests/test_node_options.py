"""The options of a run over several nodes: refused by name, and handed on in torchrun's words."""

import argparse
import inspect
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
from cli_runs import DEMO, completion, generate_args, run, write_batch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher import api as launcher_api

from onecast.runtime import launch, memory
from onecast.runtime.config import RunConfig
from onecast.runtime.failure import root_cause
from onecast.runtime.nodes import Nodes, add_node_options, nodes_of
from onecast.runtime.preflight import check
from onecast.runtime.wiring import trace_path

MEET = "--rdzv-endpoint=node-0:29500"


def parse(*argv: str) -> Nodes:
    parser = argparse.ArgumentParser()
    add_node_options(parser)
    return nodes_of(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nnodes=0"], "--nnodes: 0 is below 1"),
        (["--nnodes=2"], "--nnodes: 2 nodes need --rdzv-endpoint HOST:PORT to meet at"),
        (["--nnodes=2", "--node-rank=2", MEET], "--node-rank: 2, but nodes count from 0 to 1"),
        (["--nnodes=2", "--rdzv-endpoint=node-0"], "--rdzv-endpoint: node-0 is not HOST:PORT"),
        (["--nnodes=2", "--rdzv-endpoint=:29500"], "--rdzv-endpoint: :29500 is not HOST:PORT"),
        (["--nnodes=2", "--rdzv-endpoint=a:70000"], "--rdzv-endpoint: a:70000 is not HOST:PORT"),
        (["--nnodes=2", "--rdzv-backend=static", MEET], "--rdzv-backend: static needs --node-rank"),
        (
            ["--nnodes=2", "--rdzv-backend=c10d", "--node-rank=0", MEET],
            "--node-rank: 0, but with --rdzv-backend c10d the rendezvous gives out ranks",
        ),
        (["--max-restarts=-1"], "--max-restarts: -1 is below 0"),
    ],
)
def test_what_cannot_be_is_refused_by_the_option(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse(*argv)
    assert str(refused.value).startswith(message)


def test_ranks_are_shared_out_alike_or_not_at_all() -> None:
    two = parse("--nnodes=2", "--node-rank=1", MEET)
    assert two.ranks_per_node(4) == 2
    with pytest.raises(ValueError, match=r"--tp: 3 ranks do not divide by --nnodes 2"):
        two.ranks_per_node(3)


def test_torch_is_told_what_torchrun_would_tell_it() -> None:
    static = parse("--nnodes=2", "--node-rank=1", MEET, "--rdzv-id=run", "--max-restarts=3")
    told = static.rendezvous(join_timeout_s=60.5)
    assert told == {
        "min_nodes": 2,
        "max_nodes": 2,
        "max_restarts": 3,
        "run_id": "run",
        "rdzv_backend": "static",
        "rdzv_endpoint": "node-0:29500",
        "rdzv_configs": {"rank": 1, "timeout": 60},
        "local_addr": None,
    }
    assert not static.may_have_rank_0
    c10d = parse("--nnodes=2", MEET, "--local-addr=node-0")
    assert c10d.may_have_rank_0
    assert c10d.rendezvous(60)["rdzv_configs"] == {
        "join_timeout": 60,
        "read_timeout": 60,
        "is_host": True,
    }
    assert "is_host" not in parse("--nnodes=2", MEET).rendezvous(60)["rdzv_configs"]


def test_one_node_meets_at_an_address_of_its_own() -> None:
    one, other = (parse().rendezvous(60) for _ in range(2))
    assert one["rdzv_endpoint"] == "127.0.0.1:0" and one["run_id"] != other["run_id"]


@pytest.mark.parametrize("name", ["block_size", "max_batch_tokens", "max_batch_size"])
def test_sizes_beyond_reason_are_refused_before_any_rank_starts(name: str) -> None:
    given: dict[str, Any] = {name: 10**15}
    with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')}: 10{{15}} is above"):
        RunConfig(model=Path("model"), input=Path("in"), output=Path("out"), **given)


def test_a_restarted_run_goes_on_even_where_the_first_one_was_to_overwrite() -> None:
    config = RunConfig(model=Path("model"), input=Path("in"), output=Path("out"), overwrite=True)
    assert (config.resumed().resume, config.resumed().overwrite) == (True, False)


def test_a_launcher_waits_seconds_and_not_minutes_for_nodes_that_failed_at_their_end() -> None:
    agent = vars(launcher_api)["LocalElasticAgent"]
    with launch._our_agent():
        short = vars(launcher_api)["LocalElasticAgent"]
        assert issubclass(short.func, agent)
        assert short.keywords == {"exit_barrier_timeout": 30}
        assert short.keywords.keys() <= inspect.signature(agent).parameters.keys()
    assert vars(launcher_api)["LocalElasticAgent"] is agent


def test_loggers_with_a_level_of_their_own_are_silenced_with_those_above() -> None:
    below = logging.getLogger("onecast-test.agent.api")
    below.setLevel(logging.WARNING)
    other = logging.getLogger("onecast-tests")
    launch._silence("onecast-test")
    assert not below.isEnabledFor(logging.ERROR) and other.isEnabledFor(logging.ERROR)


def test_nodes_that_do_not_meet_say_where_and_how_long(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def nobody(*arguments: str) -> None:
        raise RendezvousConnectionError("nobody there.")

    handlers = {number: signal.getsignal(number) for number in (*launch._SIGNALS, signal.SIGALRM)}
    config = RunConfig(model=DEMO, input=tmp_path, output=tmp_path / "none", join_timeout_s=7)
    nodes = parse("--nnodes=2", "--node-rank=0", MEET)
    try:
        assert launch._run(config, nodes, nobody) == 1  # type: ignore[arg-type]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == (
        "onecast: the 2 nodes did not meet at node-0:29500 (--join-timeout-s 7): nobody there\n"
    )


def test_a_node_that_meets_nobody_says_so_in_one_line(tmp_path: Path) -> None:
    write_batch(tmp_path / "batch.jsonl", [completion("a")])
    more = ("--nnodes=2", "--node-rank=1", "--rdzv-endpoint=127.0.0.1:1", "--join-timeout-s=1")
    arguments = generate_args(tmp_path / "batch.jsonl", tmp_path / "out.jsonl", *more)
    status, _, err = run(*arguments)
    assert status == 1
    assert err.startswith("onecast: the 2 nodes did not meet at 127.0.0.1:1 (--join-timeout-s 1)")
    assert err.count("\n") == 1, err


def test_nodes_that_share_a_folder_write_a_trace_each() -> None:
    assert trace_path(Path("out/trace.json"), 0) == Path("out/trace.json")
    assert trace_path(Path("out/trace.json"), 3) == Path("out/trace.node3.json")


def test_a_lost_node_is_the_cause_and_not_the_rank_that_was_ended_for_it(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    text = "NodeLost: node 1 (b, ranks 2 and 3) cannot be reached: No route to host (RuntimeError: "
    extra = '"extraInfo": {"timestamp": "7"}'
    file.write_text(f'{{"message": {{"message": "{text}Connection reset by peer)", {extra}}}}}')
    failures = {
        0: ProcessFailure(0, 1000, 1, str(file)),
        1: ProcessFailure(1, 1001, -signal.SIGTERM, str(tmp_path / "none")),
    }
    cause, resumable = root_cause(failures)
    assert cause.startswith("rank 0 (pid 1000) failed: NodeLost: node 1 (b, ranks 2 and 3)")
    assert resumable


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"block_size": 2**20}, "--num-blocks, --num-host-blocks, --block-size: 1 blocks of "),
        (
            {"block_size": 1, "max_batch_size": 2**20, "max_batch_tokens": 2**24},
            "--max-batch-tokens, --max-batch-size, --block-size: a step of 16,777,216 tokens",
        ),
    ],
)
def test_sizes_that_memory_cannot_hold_are_refused_by_their_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int], named: str
) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 10**9)
    batch = write_batch(tmp_path / "in.jsonl", [completion("a")])
    config = RunConfig(model=DEMO, input=batch, output=tmp_path / "out.jsonl", tp=2, **options)
    with pytest.raises(ValueError) as refused:
        check(config, tp=2, local_ranks=2)
    assert str(refused.value).startswith(named)
