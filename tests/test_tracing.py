"""Tracing: from the rings of a node to an endpoint and a file, as settings say; no step half."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
from otlp_receivers import Endpoint, http_endpoint

from onecast.telemetry import RingReader, RingWriter, TelemetrySettings, ring
from onecast.telemetry.requests import RequestRecorder
from onecast.telemetry.ring import pack_meta
from onecast.telemetry.spans import engine_span_id, request_span_id, worker_span_id
from onecast.telemetry.steps import StepJoiner
from onecast.telemetry.tracing import KeptStep, Tracing


class Node:
    """The rings of some ranks, driven by hand, and the tracing of their node."""

    def __init__(self, folder: Path, tracing: Tracing, ranks: tuple[int, ...] = (0, 1)) -> None:
        self.tracing = tracing
        self.rings = {
            rank: RingWriter(
                folder / f"rank-{rank}.ring", capacity=1024, rank=rank, local_rank=place
            )
            for place, rank in enumerate(ranks)
        }
        self.readers = {rank: RingReader(writer.path) for rank, writer in self.rings.items()}
        self.requests = RequestRecorder(self.rings[ranks[0]])
        self.joiner = StepJoiner(len(ranks))
        for writer in self.rings.values():
            self.meta = pack_meta(
                ring.COLLECTIVE,
                writer.intern("all_reduce"),
                writer.intern("tp\tu"),
                writer.intern("float32"),
                len(ranks),
            )
        tracing.attach(self.readers)

    def step(self, number: int, batch: Set[int] = frozenset(), error: bool = False) -> None:
        for rank, writer in self.rings.items():
            writer.set_step(number)
            whole = writer.begin(pack_meta(ring.STEP_KIND), number, len(batch))
            if rank == min(self.rings) and batch:
                self.requests.scheduled(number, batch)
            collective = writer.begin(self.meta, number + 1, 64)
            if error and rank:
                writer.fail(collective, KeyError("x"))
            else:
                writer.end(collective)
            writer.end(whole)
            writer.set_step(-1)

    def drain(self) -> list[KeptStep]:
        for rank, reader in self.readers.items():
            rows = reader.drain().rows
            assert reader.names
            self.tracing.requests(rank, rows)
            self.joiner.add(rank, rows)
        return self.tracing.steps(self.joiner.release({}))


def settings(endpoint: Endpoint | None = None, **changes: Any) -> TelemetrySettings:
    url = None if endpoint is None else f"{endpoint.url}/v1/traces"
    quiet: dict[str, Any] = {"trace_slow": False, "trace_skew_s": 0, "otlp_endpoint": url}
    return TelemetrySettings(**quiet | changes)


def spans(endpoint: Endpoint) -> list[Any]:
    return [
        span
        for request in endpoint.received
        for resource_spans in request.resource_spans
        for span in resource_spans.scope_spans[0].spans
    ]


def test_steps_leave_whole_with_links_up_to_the_limit(tmp_path: Path) -> None:
    with http_endpoint() as endpoint:
        node = Node(tmp_path, Tracing(settings(endpoint, span_links=3), "e", {}))
        node.step(0, {0, 1})
        node.step(1, {0, 1, 2, 3, 4})
        kept = node.drain()
        node.tracing.finish()
    assert [(one.step, one.reason) for one in kept] == [(0, "all"), (1, "all")]
    found = spans(endpoint)
    assert node.tracing.exported == len(found) == 2 * 5
    assert node.tracing.dropped == {}
    engines = sorted(
        (span for span in found if span.name == "engine.step"), key=lambda span: len(span.links)
    )
    assert [(len(span.links), span.dropped_links_count) for span in engines] == [(2, 0), (3, 2)]
    assert int.from_bytes(engines[0].links[0].span_id) == request_span_id("e", 0)


def test_the_ids_that_exemplars_name_are_those_of_the_spans(tmp_path: Path) -> None:
    with http_endpoint() as endpoint:
        node = Node(tmp_path, Tracing(settings(endpoint), "e", {}))
        node.step(7)
        (kept,) = node.drain()
        node.tracing.finish()
    told = {
        span_id for rank in (0, 1) for span_id in kept.span_ids(rank, kept.rows_of(rank)).tolist()
    }
    found = {int.from_bytes(span.span_id) for span in spans(endpoint)}
    assert told | {engine_span_id("e", 7)} == found
    assert {worker_span_id("e", 7, 0), worker_span_id("e", 7, 1)} < told


def test_one_step_in_n_and_every_failed_one_is_kept(tmp_path: Path) -> None:
    with http_endpoint() as endpoint:
        node = Node(tmp_path, Tracing(settings(endpoint, trace_one_in=4), "e", {}))
        for number in range(9):
            node.step(number, error=number == 6)
        kept = node.drain()
        node.tracing.finish()
    assert [(one.step, one.reason) for one in kept] == [
        (0, "one_in_n"), (4, "one_in_n"), (6, "error"), (8, "one_in_n"),
    ]  # fmt: skip
    assert list(node.tracing.kept) == kept
    failed = {span.name for span in spans(endpoint) if span.status.code == 2}
    assert failed == {"all_reduce"}


def test_a_sampler_that_is_off_lets_nothing_out(tmp_path: Path) -> None:
    with http_endpoint() as endpoint:
        node = Node(tmp_path, Tracing(settings(endpoint, trace_one_in=0), "e", {}))
        node.step(0, {0}, error=True)
        node.requests.finished(0, 1, 2, 3, 4, 5, "stop")
        assert node.drain() == []
        node.tracing.finish()
    assert endpoint.received == [] and not node.tracing.kept


def test_a_node_without_rank_0_sends_no_engine_span(tmp_path: Path) -> None:
    with http_endpoint() as endpoint:
        node = Node(tmp_path, Tracing(settings(endpoint), "e", {}), ranks=(2, 3))
        node.step(5)
        node.drain()
        node.tracing.finish()
    found = spans(endpoint)
    assert node.tracing.exported == len(found) == 4
    workers = [span for span in found if span.name == "worker.step"]
    assert {int.from_bytes(span.parent_span_id) for span in workers} == {engine_span_id("e", 5)}


def test_file_and_endpoint_hold_the_same_spans(tmp_path: Path) -> None:
    with http_endpoint() as endpoint:
        both = settings(endpoint, trace_file=str(tmp_path / "trace.json"))
        node = Node(tmp_path, Tracing(both, "e", {}))
        for number in range(3):
            node.step(number, {number, 9})
        node.requests.finished(9, 1, 2, 3, 4, 5, "stop")
        node.drain()
        node.tracing.finish()
    traces = json.loads((tmp_path / "trace.json").read_text())["data"]
    in_file = {span["spanID"]: span for trace in traces for span in trace["spans"]}
    sent = {span.span_id.hex(): span for span in spans(endpoint)}
    assert in_file.keys() == sent.keys() and len(sent) == 3 * 5 + 1
    for span_id, span in sent.items():
        links = [ref for ref in in_file[span_id]["references"] if ref["refType"] == "FOLLOWS_FROM"]
        assert [(one.trace_id.hex(), one.span_id.hex()) for one in span.links] == [
            (link["traceID"], link["spanID"]) for link in links
        ]


def test_what_cannot_be_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its directory does not exist"):
        Tracing(settings(trace_file=str(tmp_path / "no" / "trace.json")), "e", {})
    bad = {"OTEL_EXPORTER_OTLP_COMPRESSION": "zip"}
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_COMPRESSION is 'zip'"):
        Tracing(settings(otlp_endpoint="http://h/v1/traces"), "e", bad)
    assert Tracing(settings(), "e", bad).exported == 0, "without OTLP nobody reads it"


def test_a_trace_file_that_cannot_be_written_counts_its_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    node = Node(tmp_path, Tracing(settings(trace_file=str(folder / "t.json")), "e", {}))
    node.step(0)
    node.step(1)
    node.drain()
    folder.rmdir()
    node.tracing.finish()
    assert node.tracing.dropped == {("steps", "trace_file"): 2}
    assert "cannot write the trace file" in caplog.text
