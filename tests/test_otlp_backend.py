"""A backend that nobody here wrote takes a run's traces over OTLP and gives them back whole."""

import json
import secrets
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cli_runs import completion, finish, generate_args, start, write_batch
from phoenix import Phoenix, install_phoenix, phoenix

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phoenix]:
    install_phoenix()
    with phoenix(tmp_path_factory.mktemp("phoenix")) as served:
        yield served


def _sent(trace_file: Path) -> dict[str, tuple[Any, ...]]:
    """The spans of a run as its trace file has them: by id, all but links."""
    found = {}
    for trace in json.loads(trace_file.read_text())["data"]:
        for span in trace["spans"]:
            parents = [r["spanID"] for r in span["references"] if r["refType"] == "CHILD_OF"]
            tags = {tag["key"]: tag["value"] for tag in span["tags"]}
            tags.pop("span.kind", None)  # a field of its own in OTLP
            error = tags.pop("error", False)
            found[span["spanID"]] = (
                span["traceID"],
                parents[0] if parents else None,
                span["operationName"],
                "ERROR" if error else "UNSET",
                tags,
                (span["startTime"], span["startTime"] + span["duration"]),
            )
    return found


def _kept(span: dict[str, Any]) -> tuple[Any, ...]:
    # It reads the token counts by OpenTelemetry's names, and adds its own.
    attributes = {k: v for k, v in span["attributes"].items() if not k.startswith("llm.")}
    times = (datetime.fromisoformat(span[key]) for key in ("start_time", "end_time"))
    return (
        span["context"]["trace_id"],
        span["parent_id"],
        span["name"],
        span["status_code"],
        attributes,
        tuple(round(one.timestamp() * 1e6) for one in times),
    )


@pytest.mark.parametrize(
    ("protocol", "compression"),
    [("http/protobuf", "none"), ("http/protobuf", "gzip"), ("grpc", "gzip")],
)
def test_phoenix_gives_a_run_back_whole(
    tmp_path: Path, backend: Phoenix, protocol: str, compression: str
) -> None:
    trace_id, caller = secrets.token_hex(16), secrets.token_hex(8)
    metadata = {"traceparent": f"00-{trace_id}-{caller}-01"}
    batch = write_batch(
        tmp_path / "in.jsonl",
        [
            completion("asked", max_tokens=20, metadata=metadata),
            *(completion(f"r{n}", "begat " * (5 + 9 * n), max_tokens=20) for n in range(6)),
        ],
    )
    trace_file, project = tmp_path / "trace.json", f"{protocol[:4]}-{compression}"
    process = start(
        *generate_args(batch, tmp_path / "out.jsonl", f"--trace={trace_file}", "--num-blocks=28"),
        env={
            "OTEL_EXPORTER_OTLP_ENDPOINT": backend.grpc if protocol == "grpc" else backend.http,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_COMPRESSION": compression,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "30",
            "OTEL_RESOURCE_ATTRIBUTES": f"openinference.project.name={project}",
            "ONECAST_TRACE_ONE_IN": "1",
        },
    )
    status, _, err = finish(process)
    assert status == 0, err
    sent = _sent(trace_file)
    assert len(sent) > 300
    kept: dict[str, tuple[Any, ...]] = {}
    deadline = time.monotonic() + 60
    while len(kept) < len(sent) and time.monotonic() < deadline:  # it writes them down in the end
        time.sleep(0.5)
        kept = {span["context"]["span_id"]: _kept(span) for span in backend.spans(project)}
    assert kept.keys() == sent.keys()
    for span_id, (*facts, times) in sent.items():
        *kept_facts, kept_times = kept[span_id]
        assert kept_facts == facts
        # Jaeger's times and Phoenix's are whole microseconds, one of them perhaps rounded.
        assert all(abs(a - b) <= 1 for a, b in zip(times, kept_times, strict=True))
    (asked,) = [span for span in kept.values() if span[1] == caller]
    assert (asked[0], asked[2]) == (trace_id, "request")
