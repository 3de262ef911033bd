"""OTLP: real receivers get one trace a step from both ranks; an absent one costs only spans."""

import time
from typing import Any

import pytest
from otlp_receivers import grpc_receiver, http_receiver

from onecast.comm.testing import run_ranks
from onecast.telemetry import TelemetrySettings, make_run_dir, start_session
from onecast.telemetry.spans import trace_id

_OF_A_COLLECTIVE = ("op", "group", "seq", "bytes", "dtype", "arrival_wait_ns", "is_last")


def _run(rank: int, run_dir: str, steps: int) -> Any:
    import torch
    import torch.distributed as dist

    session = start_session(
        rank=rank,
        local_rank=rank,
        world_size=2,
        local_world_size=2,
        engine_id="engine",
        settings=TelemetrySettings.from_env(metrics_port=None),
        run_dir=run_dir,
    )
    x = torch.ones(512)
    for step in range(steps):
        with session.step(step, batch_size=3):
            with session.phase("model.forward"):
                dist.all_reduce(x)
            dist.broadcast(x, 0)
    begin = time.monotonic()
    final = session.close()
    return time.monotonic() - begin, final


@pytest.mark.parametrize(
    "receiver, protocol", [(http_receiver, "http/protobuf"), (grpc_receiver, "grpc")]
)
def test_a_receiver_gets_one_trace_a_step_from_both_ranks(receiver: Any, protocol: str) -> None:
    with receiver() as (endpoint, received):
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_SERVICE_NAME": "tested",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=caf%C3%A9,service.name=no",
            "ONECAST_TRACE_ONE_IN": "1",
        }
        (_, final), _ = run_ranks(_run, 2, make_run_dir(), 6, env=env)
    assert final["dropped"] == 0
    traces: dict[bytes, list[tuple[int | None, Any]]] = {}
    for request in received:
        for resource_spans in request.resource_spans:
            resource = {
                attribute.key: attribute.value for attribute in resource_spans.resource.attributes
            }
            assert resource["service.name"].string_value == "tested"
            assert resource["deployment.environment.name"].string_value == "café"
            rank = resource["onecast.rank"].int_value if "onecast.rank" in resource else None
            instance = "engine" if rank is None else f"engine/rank-{rank}"
            assert resource["service.instance.id"].string_value == instance
            assert rank is None or resource["onecast.device"].string_value == "cpu"
            for scope_spans in resource_spans.scope_spans:
                assert scope_spans.scope.name == "onecast.telemetry"
                for span in scope_spans.spans:
                    traces.setdefault(span.trace_id, []).append((rank, span))
    assert set(traces) == {trace_id("engine", step).to_bytes(16) for step in range(6)}
    assert final["spans_exported"] == sum(map(len, traces.values())) == 6 * 9
    for spans in traces.values():
        names = sorted((-1 if rank is None else rank, span.name) for rank, span in spans)
        assert names == [
            (-1, "engine.step"),
            (0, "all_reduce"), (0, "broadcast"), (0, "model.forward"), (0, "worker.step"),
            (1, "all_reduce"), (1, "broadcast"), (1, "model.forward"), (1, "worker.step"),
        ]  # fmt: skip
        for name in ("all_reduce", "broadcast"):
            waits = {
                rank: {attribute.key: attribute.value for attribute in span.attributes}
                for rank, span in spans
                if span.name == name
            }
            last = [
                rank
                for rank, attributes in waits.items()
                if attributes["onecast.collective.is_last"].bool_value
            ]
            assert len(last) == 1, "one rank came last, and waited for nobody"
            for rank, attributes in waits.items():
                waited = attributes["onecast.collective.arrival_wait_ns"].int_value
                assert waited == 0 if rank in last else waited >= 0
        by_id = {span.span_id: (rank, span) for rank, span in spans}
        assert len(by_id) == 9
        inside = {
            "worker.step": "engine.step", "model.forward": "worker.step",
            "all_reduce": "model.forward", "broadcast": "worker.step",
        }  # fmt: skip
        for rank, span in spans:
            if span.name == "engine.step":
                assert span.parent_span_id == b""
                continue
            parent_rank, parent = by_id[span.parent_span_id]
            assert parent.name == inside[span.name] and parent_rank in (rank, None)
            assert parent.start_time_unix_nano <= span.start_time_unix_nano
            assert span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= parent.end_time_unix_nano
            keys = {attribute.key for attribute in span.attributes}
            if span.name in ("all_reduce", "broadcast"):
                assert keys == {f"onecast.collective.{key}" for key in _OF_A_COLLECTIVE}
            elif span.name == "worker.step":
                assert keys == {"onecast.step.id", "onecast.batch.size"}


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_without_a_receiver_the_run_ends_promptly_and_counts_what_it_dropped(protocol: str) -> None:
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",  # nobody listens on the discard port
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "ONECAST_TRACE_ONE_IN": "1",
    }
    (seconds, final), _ = run_ranks(_run, 2, make_run_dir(), 6, env=env)
    assert seconds < 8
    assert final["spans_exported"] == 0
    assert final["dropped"] == 6 * 9
    assert sum(final["dropped_by_reason"].values()) == 6 * 9
    assert set(final["dropped_by_reason"]) <= {"spans/export_failed", "spans/shutdown"}
