"""Programs that know nothing of us, run as a user runs them, with metrics and traces."""

import json
import os
import re
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from auto_runs import BIN, ONECAST_RUN, OPENTELEMETRY, Program, wait_until
from otlp_receivers import Requests, http_receiver

Start = Callable[..., Program]

RANKS = ("0", "1")
STEPS = 5
DDP_START = dict.fromkeys(("verify_params", "broadcast_coalesced", "rebuild_buckets"), 1)
COMMANDS = pytest.mark.parametrize("command", [ONECAST_RUN, OPENTELEMETRY], ids=["onecast", "otel"])


@pytest.fixture
def start(tmp_path: Path, nothing_left_behind: None) -> Iterator[Start]:
    """Starts programs, each in a directory of its own."""
    started: list[Program] = []

    def start(*arguments: Any, **options: Any) -> Program:
        started.append(Program(tmp_path / str(len(started)), *arguments, **options))
        return started[-1]

    yield start
    for program in started:
        program.stop()


def same_on_all_ranks(**counts: float) -> dict[tuple[str, ...], float]:
    return {(op, rank): count for op, count in counts.items() for rank in RANKS}


def traces_to(endpoint: str) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{endpoint}/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "ONECAST_TRACE_ONE_IN": "1",
    }


def spans_by_trace(requests: Requests) -> dict[bytes, dict[tuple[Any, str], int]]:
    """How many spans of which (rank, name) a trace has; rank None: the engine."""
    traces: dict[bytes, dict[tuple[Any, str], int]] = defaultdict(lambda: defaultdict(int))
    for request in requests:
        for of_resource in request.resource_spans:
            attributes = {each.key: each.value for each in of_resource.resource.attributes}
            rank = attributes["onecast.rank"].int_value if "onecast.rank" in attributes else None
            for of_scope in of_resource.scope_spans:
                assert of_scope.scope.name == "onecast.telemetry"
                for span in of_scope.spans:
                    traces[span.trace_id][rank, span.name] += 1
    return {trace: dict(spans) for trace, spans in traces.items()}


def assert_each_step_is_a_trace_of_both_ranks(requests: Requests, steps: int, **spans: int) -> None:
    wanted = {(None, "engine.step"): 1}
    for rank in (0, 1):
        wanted |= {(rank, "worker.step"): 1, (rank, "optimizer.step"): 1}
        wanted |= {(rank, name): count for name, count in spans.items()}
    traces = list(spans_by_trace(requests).values())
    assert len(traces) == steps
    # The first step also holds what sets the model up, and DDP's second its new buckets.
    for trace in traces:
        assert {key: trace.get(key) for key in wanted} == wanted
    assert sum(trace == wanted for trace in traces) >= steps - 2


def ddp_with_the_hook(start: Start, command: tuple[str, ...]) -> None:
    with http_receiver() as (endpoint, received):
        program = start(command, "ddp.py", STEPS, ONECAST_DDP_HOOK="1", **traces_to(endpoint))
        program.meet()
        # One for the mean loss and one for the gradients in each step; the rest is DDP's start.
        program.await_counts(same_on_all_ranks(all_reduce=2 * STEPS, **DDP_START))
        assert set(program.counts("rank", metric="collective_unrecorded_total").values()) <= {0.0}
        steps = program.counts("rank", metric="step_duration_seconds_count")
        assert steps == {(rank,): STEPS for rank in RANKS}
        assert program.finish() == 0
        assert_each_step_is_a_trace_of_both_ranks(received, STEPS, all_reduce=2)


def fsdp_as_it_is(start: Start, command: tuple[str, ...]) -> None:
    with http_receiver() as (endpoint, received):
        program = start(command, "fsdp.py", STEPS, **traces_to(endpoint))
        program.meet()
        # Two layers are gathered, forward and backward; their gradients are scattered.
        wanted = same_on_all_ranks(
            all_gather_into_tensor=4 * STEPS, reduce_scatter_tensor=2 * STEPS, all_reduce=STEPS
        )
        program.await_counts(wanted)
        assert set(program.counts("rank", metric="collective_unrecorded_total").values()) <= {0.0}
        assert program.finish() == 0
        assert_each_step_is_a_trace_of_both_ranks(
            received, STEPS, all_gather_into_tensor=4, reduce_scatter_tensor=2, all_reduce=1
        )


def test_ddp_under_onecast(start: Start) -> None:
    ddp_with_the_hook(start, ONECAST_RUN)


def test_fsdp_under_opentelemetry(start: Start) -> None:
    fsdp_as_it_is(start, OPENTELEMETRY)


@pytest.mark.slow
def test_ddp_under_opentelemetry(start: Start) -> None:
    ddp_with_the_hook(start, OPENTELEMETRY)


@pytest.mark.slow
def test_fsdp_under_onecast(start: Start) -> None:
    fsdp_as_it_is(start, ONECAST_RUN)


@pytest.mark.slow
def test_ddp_without_the_hook_computes_the_same_and_shows_what_went_by(start: Start) -> None:
    plain = start((), "ddp.py", STEPS, meet=False)
    hooked = start(ONECAST_RUN, "ddp.py", STEPS, options=("--ddp-hook",), meet=False)
    program = start(ONECAST_RUN, "ddp.py", STEPS)
    program.meet()
    program.await_counts(same_on_all_ranks(all_reduce=STEPS, **DDP_START))
    wanted = {(rank,): STEPS for rank in RANKS}  # a bucket of gradients in each step
    metric = "collective_unrecorded_total"
    wait_until(lambda: program.counts("rank", metric=metric) == wanted, "the coverage", 10)
    all_three = plain, hooked, program
    assert [each.finish() for each in all_three] == [0, 0, 0]
    results = [sorted(re.findall(r"rank . parameters [-.\d]+", each.out)) for each in all_three]
    assert results[0] == results[1] == results[2] and len(results[0]) == 2


@pytest.mark.slow
@COMMANDS
def test_a_crash_stays_the_programs_own(
    start: Start, tmp_path: Path, command: tuple[str, ...]
) -> None:
    plain = start((), "ddp.py", STEPS, CRASH="1", meet=False)
    program = start(command, "ddp.py", STEPS,
        CRASH="1", meet=False, ONECAST_FLIGHT_DIR=str(tmp_path / "flight"),
    )  # fmt: skip
    assert program.finish() == plain.finish() == 1
    assert "RuntimeError: as the test wants" in program.err
    assert "RuntimeError: as the test wants" in plain.err
    assert f"{os.sep}telemetry{os.sep}" not in program.err


@pytest.mark.slow
def test_two_programs_on_one_host_do_not_meet(start: Start) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    both = [start(ONECAST_RUN, "ddp.py", STEPS, options=("--port", str(port))) for _ in range(2)]
    for program in both:
        program.meet()
    wanted = same_on_all_ranks(all_reduce=STEPS, **DDP_START)
    for program in both:
        program.await_counts(wanted)
    urls = sorted(program.metrics_url for program in both)
    assert len(set(urls)) == 2 and any(f":{port}/" in url for url in urls)
    late = next(program for program in both if f":{port}/" not in program.metrics_url)
    assert f"{port} " in late.err and "in use" in late.err
    assert [program.finish() for program in both] == [0, 0]


@pytest.mark.slow
def test_nodes_have_their_own_sidecars_and_one_trace_a_step(start: Start) -> None:
    """Two nodes that are one host: they share /dev/shm, and all that could mix them up."""
    with socket.socket() as found, http_receiver() as (endpoint, received):
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        nodes = [
            start(
                ONECAST_RUN, "fsdp.py", STEPS, meet=False, **traces_to(endpoint),
                launcher=(str(BIN / "torchrun"), "--nnodes=2", f"--node-rank={node}",
                          "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"),
            )
            for node in range(2)
        ]  # fmt: skip
        assert [node.finish() for node in nodes] == [0, 0]
        assert all("metrics of 1 rank at" in node.err for node in nodes)
        assert nodes[0].metrics_url != nodes[1].metrics_url
        wait_until(lambda: len(spans_by_trace(received)) == STEPS, "traces", 10)
        for spans in spans_by_trace(received).values():
            assert {rank for rank, name in spans if name == "worker.step"} == {0, 1}
            assert spans[None, "engine.step"] == 1


@pytest.mark.slow
def test_groups_of_collectives_are_steps(start: Start) -> None:
    program = start(ONECAST_RUN, "loader.py", 10, options=("--step", "collectives:4"))
    program.meet()
    wanted = same_on_all_ranks(all_reduce=10, barrier=1)
    program.await_counts(wanted)
    steps = program.counts("rank", metric="step_duration_seconds_count")
    assert steps == {(rank,): (10 + 1) // 4 for rank in RANKS}
    assert program.finish() == 0


@pytest.mark.slow
def test_a_programs_own_steps_win(start: Start, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    program = start(ONECAST_RUN, "own_steps.py", 2, 3, options=("--trace", str(trace)))
    program.meet()
    wanted = same_on_all_ranks(all_reduce=2 + 3)
    program.await_counts(wanted)
    assert program.finish() == 0
    steps = {
        tag["value"]
        for one in json.loads(trace.read_text())["data"]
        for span in one["spans"]
        for tag in span["tags"]
        if tag["key"] == "onecast.step.id"
    }
    assert steps == {0, 1, 100, 101, 102}


@pytest.mark.slow
@COMMANDS
def test_ranks_that_a_program_starts_itself_are_seen(
    start: Start, command: tuple[str, ...]
) -> None:
    program = start(command, "spawned.py", 6, launcher=(sys.executable,))
    program.meet()
    wanted = same_on_all_ranks(all_reduce=6)
    program.await_counts(wanted)
    assert "metrics of 2 ranks" in program.err
    assert program.finish() == 0


@COMMANDS
def test_a_program_without_torch_is_left_alone(command: tuple[str, ...]) -> None:
    code = "import sys; print('torch' in sys.modules); sys.exit(3)"
    result = subprocess.run(
        [*command, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "OTEL_PYTHON_CONFIGURATOR": "none"},  # the SDK is not what is tested
    )
    assert (result.returncode, result.stdout) == (3, "False\n")
    assert "onecast" not in result.stderr


def test_the_launcher_and_its_helpers_start_nothing(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch.distributed\n"
        "print(sorted(name for name in sys.modules if name.startswith('onecast')))\n"
    )
    program = start(ONECAST_RUN, script, num_ranks=1, meet=False)
    assert program.finish() == 0
    assert program.out == "['onecast.telemetry.auto_hook']\n"
    assert "onecast" not in program.err
