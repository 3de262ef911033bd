"""A batch whose requests come with trace contexts: their spans, and the steps that link to them."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import completion, finish, generate_args, read_results, start, write_batch
from otlp_receivers import Requests, http_receiver

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

PROMPT = "It came to pass in those secret days"
TRACES = {f"r{n}": (0xA0000000000000000000000000000000 + n, 0xB000000000000000 + n) for n in (0, 1)}
SERVER, INTERNAL = 2, 1


def _lines() -> list[dict[str, Any]]:
    def asked(name: str, flags: str = "01", **more: str) -> dict[str, str]:
        trace_id, span_id = TRACES.get(name, (7, 7))
        return {"traceparent": f"00-{trace_id:032x}-{span_id:016x}-{flags}", **more}

    return [
        completion("r0", PROMPT, max_tokens=12, metadata=asked("r0", tracestate="v=1, w=2")),
        completion("r1", PROMPT, max_tokens=5, n=2, metadata=asked("r1")),
        completion("plain", PROMPT, max_tokens=8),
        completion("unsampled", PROMPT, max_tokens=8, metadata=asked("unsampled", "00")),
        completion("broken", PROMPT, max_tokens=8, metadata={"traceparent": "00-no"}),
        completion("refused", PROMPT, metadata={"traceparent": 5}),
    ]


def _spans(received: Requests) -> list[tuple[dict[str, Any], Any]]:
    """(attributes of the resource, span)"""
    found = []
    for request in received:
        for resource_spans in request.resource_spans:
            resource = {a.key: a.value for a in resource_spans.resource.attributes}
            for scope_spans in resource_spans.scope_spans:
                found += [(resource, span) for span in scope_spans.spans]
    return found


def test_requests_are_spans_in_their_callers_traces_and_steps_link_to_them(
    tmp_path: Path,
) -> None:
    batch = write_batch(tmp_path / "in.jsonl", _lines())
    output, trace_file = tmp_path / "out.jsonl", tmp_path / "trace.json"
    with http_receiver() as (endpoint, received):
        process = start(
            *generate_args(batch, output, f"--trace={trace_file}"),
            env={
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                "ONECAST_TRACE_ONE_IN": "1",
            },
        )
        status, _, err = finish(process)
    assert status == 0, err
    assert err.count("traceparent is ignored: '00-no'") == 1
    results = {result["custom_id"]: result["response"] for result in read_results(output)}
    assert "metadata.traceparent: 5 is not a text" in json.dumps(results["refused"])

    spans = _spans(received)
    requests = [span for _, span in spans if span.name == "request"]
    assert len(requests) == 4, "all that ran, but the one that its caller does not sample"
    by_trace = {int.from_bytes(span.trace_id): span for span in requests}
    for trace_id, parent in TRACES.values():
        span = by_trace[trace_id]
        assert (int.from_bytes(span.parent_span_id), span.kind) == (parent, SERVER)
    assert by_trace[TRACES["r0"][0]].trace_state == "v=1,w=2"
    others = [span for span in requests if not span.parent_span_id]
    assert len(others) == 2

    def attributes(span: Any) -> dict[str, Any]:
        return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}

    for name, (trace_id, _) in TRACES.items():
        usage = results[name]["body"]["usage"]
        told = attributes(by_trace[trace_id])
        assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
        assert told["onecast.request.finish_reason"] == "length"
        span = by_trace[trace_id]
        duration_us = (span.end_time_unix_nano - span.start_time_unix_nano) / 1000
        assert 0 < told["onecast.request.queue_us"] <= told["onecast.request.first_token_us"]
        assert told["onecast.request.first_token_us"] <= duration_us

    # Every step links to the requests whose tokens it made, and each request was in as many steps.
    steps = sorted(
        (span for _, span in spans if span.name == "engine.step"),
        key=lambda span: span.start_time_unix_nano,
    )
    linked: dict[int, int] = {}
    for step in steps:
        assert step.links
        for link in step.links:
            span_id = int.from_bytes(link.span_id)
            linked[span_id] = linked.get(span_id, 0) + 1
            request = next((s for s in requests if s.span_id == link.span_id), None)
            if request is not None:
                assert request.trace_id == link.trace_id
                assert request.start_time_unix_nano < step.end_time_unix_nano
                assert step.start_time_unix_nano < request.end_time_unix_nano
    assert len(linked) == 5, "a link needs no span at its end"
    assert linked[int.from_bytes(by_trace[TRACES["r0"][0]].span_id)] == 12
    assert linked[int.from_bytes(by_trace[TRACES["r1"][0]].span_id)] == 5

    # The file says the same; and no word of prompt or answer is in spans or file.
    file = json.loads(trace_file.read_text())
    shown = [span for trace in file["data"] for span in trace["spans"]]
    assert len(shown) == len(spans)
    engine_steps = [span for span in shown if span["operationName"] == "engine.step"]
    followed = [ref for span in engine_steps for ref in span["references"]]
    assert len(followed) == sum(linked.values())
    answers = [choice["text"] for name in TRACES for choice in results[name]["body"]["choices"]]
    sent = b"".join(request.SerializeToString() for request in received)
    written = trace_file.read_text()
    for secret in [PROMPT, PROMPT[-12:], *(answer for answer in answers if len(answer) > 8)]:
        assert secret.encode() not in sent
        assert json.dumps(secret)[1:-1] not in written
