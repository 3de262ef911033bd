"""What a real run shows: exact counts on /metrics while it goes on, one trace a step over OTLP."""

import json
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cli_runs import completion, finish, generate_args, start, write_batch
from otlp_receivers import Requests, grpc_receiver, http_receiver
from prometheus_client.parser import text_string_to_metric_families
from tiny_checkpoints import make_checkpoint

from onecast.comm import open_all_reduce, open_channel
from onecast.comm.testing import run_ranks
from onecast.runtime.engine import Engine
from onecast.runtime.executor import StepExecutor
from onecast.runtime.kv_cache import KVCache
from onecast.runtime.model_config import ModelConfig
from onecast.runtime.model_runner import load_model
from onecast.runtime.request import Request, SamplingParams
from onecast.runtime.sampling import Sampler
from onecast.runtime.scheduler import Scheduler, SchedulerConfig
from onecast.runtime.tokenizer import Tokenizer
from onecast.telemetry import TelemetrySettings, make_run_dir, start_session

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

Samples = dict[tuple[Any, ...], float]


def scrape(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def collective_counts(
    samples: Samples,
    op: str,
    group: str,
    series: str = "onecast_collective_duration_seconds_count",
) -> dict[str, float]:
    """Rank -> observations in a histogram, all size classes together."""
    counts: dict[str, float] = {}
    for (name, *labels), value in samples.items():
        found = dict(labels)
        if name == series and (
            found["op"],
            found["group"],
        ) == (op, group):
            counts[found["rank"]] = counts.get(found["rank"], 0) + value
    return counts


def _observed_engine(
    rank: int, checkpoint: Path, run_dir: str, transport: str
) -> dict[str, Any] | None:
    """Run requests to their end and scrape before anything is closed."""
    torch.set_num_threads(1)
    model_group = dist.new_group(group_desc="tp")
    control_group = dist.new_group(group_desc="control")
    session = start_session(
        rank=rank,
        local_rank=rank,
        world_size=2,
        local_world_size=2,
        engine_id="observed",
        settings=TelemetrySettings(),
        run_dir=run_dir,
    )
    reducer = open_all_reduce(model_group, transport=transport, probe=session.collectives)
    assert reducer.name == transport
    model = load_model(checkpoint, group=model_group, device="cpu", all_reduce=reducer.all_reduce)
    kv_cache = KVCache(
        model.cache_spec, num_blocks=10, num_host_blocks=40, block_size=4, device="cpu"
    )
    channel = open_channel(
        control_group, transport="process-group", probe=session.probe, timeout_s=60
    )
    executor = StepExecutor(model, kv_cache, session)
    seen = None
    if rank == 0:
        config = ModelConfig.from_dir(checkpoint)
        limits = SchedulerConfig(
            block_size=4,
            num_blocks=10,
            num_host_blocks=40,
            max_batch_tokens=64,
            max_batch_size=8,
            max_model_len=config.max_position_embeddings,
        )
        engine = Engine(
            scheduler=Scheduler(limits, config.eos_token_ids),
            channel=channel,
            executor=executor,
            sampler=Sampler(),
            tokenizer=Tokenizer(checkpoint),
            observer=session,
        )
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        for number in range(6):
            engine.add(Request(str(number), tuple(range(5, 12 + number)), params))
        while engine.has_unfinished:
            engine.step()
        steps = engine.scheduler.step
        assert session.metrics_url is not None
        samples = {}
        expected = steps * (1 + 2 * config.num_layers)
        for _ in range(100):  # the other rank may be at its last step, the sidecar reads at 20 Hz
            samples = scrape(session.metrics_url)
            counts = collective_counts(samples, "all_reduce", "tp")
            ended = [
                samples.get(("onecast_step_duration_seconds_count", ("rank", rank)), 0)
                for rank in "01"
            ]
            if min(counts.values(), default=0) >= expected and min(ended) >= steps:
                break
            time.sleep(0.05)
        seen = {
            "samples": samples,
            "steps": steps,
            "layers": config.num_layers,
            "counters": engine.scheduler.counters,
        }
    else:
        executor.follow(channel)
    channel.close()
    reducer.close()
    session.close()
    return seen


@pytest.mark.parametrize("transport", ["shared-memory", "process-group"])
def test_a_scrape_finds_exactly_the_collectives_that_the_model_must_have_issued(
    tmp_path: Path, transport: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    run_dir = make_run_dir()
    seen, _ = run_ranks(_observed_engine, 2, checkpoint, run_dir, transport, timeout_s=120)
    samples, steps, counters = seen["samples"], seen["steps"], seen["counters"]
    reductions = steps * (1 + 2 * seen["layers"])
    assert collective_counts(samples, "all_reduce", "tp") == {"0": reductions, "1": reductions}
    assert collective_counts(samples, "gather", "tp") == {"0": steps, "1": steps}
    waits = "onecast_collective_arrival_wait_seconds_count"
    assert collective_counts(samples, "all_reduce", "tp", waits) == {
        "0": reductions,
        "1": reductions,
    }
    ended = ("onecast_requests_total", ("finish_reason", "length"), ("rank", "0"))
    assert samples[ended] == 6
    for name in ("duration", "queue", "time_to_first_token"):
        assert samples[f"onecast_request_{name}_seconds_count", ("rank", "0")] == 6
    for rank in "01":
        exposed = "onecast_step_exposed_communication_seconds"
        assert samples[f"{exposed}_count", ("rank", rank)] == steps
        assert (
            0
            < samples[f"{exposed}_sum", ("rank", rank)]
            < samples["onecast_step_duration_seconds_sum", ("rank", rank)]
        )
    broadcasts = collective_counts(samples, "broadcast", "control")
    assert broadcasts["0"] >= steps
    assert counters.swapped_out > 0
    for direction, value in (
        ("swap_out", counters.swapped_out),
        ("swap_in", counters.swapped_in),
        ("copy", counters.copied),
    ):
        name = ("onecast_kv_blocks_moved_total", ("direction", direction), ("rank", "0"))
        assert samples[name] == value
    hits, queried = counters.prefix_hit_tokens, counters.prefix_queried_tokens
    assert 0 < hits < queried
    for result, value in (("hit", hits), ("computed", queried - hits)):
        name = ("onecast_prefix_cache_tokens_total", ("rank", "0"), ("result", result))
        assert samples[name] == value
    phase = ("onecast_step_phase_seconds_count", ("phase", "schedule.ahead"), ("rank", "0"))
    assert samples[phase] == steps
    unrecorded = [v for k, v in samples.items() if k[0] == "onecast_collective_unrecorded_total"]
    assert unrecorded and not any(unrecorded)


def spans_by_trace(received: Requests) -> dict[bytes, list[tuple[int | None, Any]]]:
    traces: dict[bytes, list[tuple[int | None, Any]]] = {}
    for request in received:
        for resource_spans in request.resource_spans:
            attributes = {a.key: a.value for a in resource_spans.resource.attributes}
            rank = attributes["onecast.rank"].int_value if "onecast.rank" in attributes else None
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    traces.setdefault(span.trace_id, []).append((rank, span))
    return traces


def steps_printed(out: str) -> int:
    (row,) = [line for line in out.splitlines() if "│ steps" in line]
    return int(row.split("│")[2].strip().replace(",", ""))


@pytest.mark.parametrize(
    ("receiver", "protocol"),
    [
        (http_receiver, "http/protobuf"),
        pytest.param(grpc_receiver, "grpc", marks=pytest.mark.slow),
    ],
)
def test_a_generate_run_is_scraped_while_it_goes_on_and_traced_step_by_step(
    tmp_path: Path, receiver: Any, protocol: str
) -> None:
    lines = [
        completion(f"r{i}", "begat " * (5 + 9 * i), max_tokens=30, n=1 + i % 2) for i in range(8)
    ]
    batch, trace = write_batch(tmp_path / "in.jsonl", lines), tmp_path / "trace.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    live: list[dict[str, float]] = []
    with receiver() as (endpoint, received):
        process = start(
            *generate_args(
                batch,
                tmp_path / "out.jsonl",
                "--num-blocks=28",
                f"--metrics-port={port}",
                f"--trace={trace}",
            ),
            env={
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
                "OTEL_TRACES_SAMPLER": "always_on",
            },
        )
        while process.poll() is None:
            try:
                samples = scrape(f"http://127.0.0.1:{port}/metrics")
            except (urllib.error.URLError, ConnectionError):
                process_ended = process.poll() is not None  # not yet there, or just gone
                if process_ended:
                    break
                continue
            live.append(collective_counts(samples, "all_reduce", "tp"))
        status, out, err = finish(process)
    assert status == 0, err
    steps = steps_printed(out)
    counted = [counts for counts in live if counts.keys() == {"0", "1"}]
    assert counted, "both ranks were on /metrics while the run went on"
    traces = spans_by_trace(received)
    requests = {key for key, spans in traces.items() if {s.name for _, s in spans} == {"request"}}
    assert len(requests) == len(lines)
    traces = {key: spans for key, spans in traces.items() if key not in requests}
    assert len(traces) == steps
    reductions = 0
    for spans in traces.values():
        by_id = {span.span_id: (rank, span) for rank, span in spans}
        assert len(by_id) == len(spans)
        assert {rank for rank, span in spans if span.name == "worker.step"} == {0, 1}
        (root,) = [span for _, span in spans if not span.parent_span_id]
        assert root.name == "engine.step"
        assert root.links and {link.trace_id for link in root.links} <= requests
        for rank, span in spans:
            if span is root:
                continue
            parent_rank, parent = by_id[span.parent_span_id]
            assert parent_rank in (rank, None)
            assert parent.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= parent.end_time_unix_nano
            reductions += span.name == "all_reduce"
            if span.name == "all_reduce":
                assert parent.name == "model.forward"
        names = {(rank, span.name) for rank, span in spans}
        assert {(0, "schedule"), (0, "step.publish"), (0, "sample"), (0, "commit")} <= names
        assert (1, "step.receive") in names
    assert max(counts["0"] for counts in counted) <= reductions / 2
    per_step = reductions / 2 / steps
    assert (
        per_step
        == 1
        + 2
        * json.loads(
            Path(generate_args(batch, trace)[1].removeprefix("--model="), "config.json").read_text()
        )["num_hidden_layers"]
    )
    every_name = {span.name for spans in traces.values() for _, span in spans}
    assert {"kv.swap_out", "kv.swap_in", "kv.copy"} <= every_name
    shown = json.loads(trace.read_text())
    shown_steps = {
        span["traceID"]
        for span in _jaeger_spans(shown)
        if span["operationName"] in ("engine.step", "worker.step")
    }
    assert len(shown_steps) == steps


def _jaeger_spans(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [span for entry in trace["data"] for span in entry["spans"]]
