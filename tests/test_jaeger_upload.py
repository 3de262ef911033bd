"""The trace file is what Jaeger's upload page reads, field by field and type by type."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_runs import completion, generate_args, run, write_batch
from jaeger_upload import orphans, problems, read_upload, roots

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a run that swaps, copies, serves a caller's trace, and fails a request."""
    folder = tmp_path_factory.mktemp("jaeger")
    lines = [
        completion(f"r{n}", "begat " * (5 + 9 * n), max_tokens=20, n=1 + n % 2) for n in range(8)
    ]
    lines[0]["body"]["metadata"] = {"traceparent": PARENT}
    batch, trace = write_batch(folder / "in.jsonl", lines), folder / "trace.json"
    args = generate_args(batch, folder / "out.jsonl", "--num-blocks=28", f"--trace={trace}")
    status, _, err = run(*args)
    assert status == 0, err
    return trace.read_bytes()


def test_every_field_of_a_runs_trace_file_is_one_of_jaegers(uploaded: bytes) -> None:
    traces = read_upload(uploaded)
    assert not [problem for trace in traces for problem in problems(trace)]
    names = {span.operationName for trace in traces for span in trace.spans}
    assert {"engine.step", "worker.step", "kv.swap_out", "kv.copy", "all_reduce"} <= names
    assert {"request", "step.publish", "step.receive", "model.forward"} <= names


def test_the_page_shows_each_step_as_one_tree_named_by_its_engine_step(uploaded: bytes) -> None:
    steps = 0
    for trace in read_upload(uploaded):
        (top,) = roots(trace)
        if top.operationName == "request":
            continue
        steps += 1
        assert top.operationName == "engine.step"
        assert [one.ref_type for one in top.references] == ["FOLLOWS_FROM"] * len(top.references)
        processes = {
            tag.value for p in trace.processes.values() for tag in p.tags if "rank" in tag.key
        }
        assert processes == {0, 1}
    assert steps > 5


def test_a_request_stands_under_its_caller_whom_another_service_knows(uploaded: bytes) -> None:
    _, trace_id, parent, _ = PARENT.split("-")
    (trace,) = [trace for trace in read_upload(uploaded) if trace.traceID == trace_id]
    (span,) = trace.spans
    assert [orphan for trace in read_upload(uploaded) for orphan in orphans(trace)] == [span]
    assert [(one.ref_type, one.spanID) for one in span.references] == [("CHILD_OF", parent)]


def _first(top: dict[str, Any]) -> dict[str, Any]:
    return next(trace for trace in top["data"] if len(trace["spans"]) > 3)


def _span(top: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _first(top)["spans"][-1]
    return found


@pytest.mark.parametrize(
    "spoil",
    [
        lambda top: top.update(resourceSpans=[]),
        lambda top: top.pop("data"),
        lambda top: _span(top).update(startTime=1.5e15 + 0.5),
        lambda top: _span(top).update(startTime=str(_span(top)["startTime"])),
        lambda top: _span(top).update(duration=-1),
        lambda top: _span(top).update(processId=_span(top)["processID"]),
        lambda top: _span(top).update(processID="nobody"),
        lambda top: _span(top).update(spanID="0" * 16),
        lambda top: _span(top).update(spanID=_first(top)["spans"][0]["spanID"]),
        lambda top: _span(top).update(traceID="1" * 32),
        lambda top: _span(top)["references"][0].update(refType="PARENT"),
        lambda top: _span(top)["references"][0].update(spanID="1" * 16),
        lambda top: _span(top)["tags"].append({"key": "k", "type": "int64", "value": "7"}),
        lambda top: _span(top)["tags"].append({"key": "k", "type": "integer", "value": 7}),
        lambda top: _span(top)["tags"].extend([{"key": "k", "type": "bool", "value": True}] * 2),
        lambda top: _first(top).pop("processes"),
    ],
)
def test_what_the_page_would_misread_is_found(
    uploaded: bytes, spoil: Callable[[dict[str, Any]], object]
) -> None:
    top = json.loads(uploaded)
    spoil(top)
    try:
        traces = read_upload(json.dumps(top).encode())
    except (msgspec.ValidationError, ValueError):
        return
    lost = [span.operationName for trace in traces for span in orphans(trace)]
    assert [problem for trace in traces for problem in problems(trace)] or lost != ["request"]


def test_a_file_without_a_step_is_an_upload_too(tmp_path: Path) -> None:
    from onecast.telemetry.trace_file import TraceFile

    file: TraceFile[Any] = TraceFile(
        str(tmp_path / "trace.json"), engine_id="e", service_name="s", max_steps=1, max_spans=1
    )
    file.write(lambda step: [])
    assert read_upload((tmp_path / "trace.json").read_bytes()) == []
