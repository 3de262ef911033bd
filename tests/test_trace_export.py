"""Traces: whole steps, children inside their parents, in a file that two pages open."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onecast.comm.testing import run_ranks
from onecast.telemetry import TelemetrySettings, make_run_dir, start_session
from onecast.telemetry import ring as layout
from onecast.telemetry.kept_step import KeptStep
from onecast.telemetry.probe import pack_frame
from onecast.telemetry.ring import pack_meta
from onecast.telemetry.span_builder import SpanBuilder
from onecast.telemetry.spans import Link, Span, trace_id, worker_span_id
from onecast.telemetry.step_facts import step_facts
from onecast.telemetry.steps import JoinedStep, StepJoiner
from onecast.telemetry.trace_file import TraceFile

NAMES = ["", "model.forward", "all_reduce", "tp\t0", "float32", "KeyError", "published", "step"]
STEP = pack_meta(layout.STEP_KIND)
FORWARD = pack_meta(layout.PHASE, 1)
ALL_REDUCE = pack_meta(layout.COLLECTIVE, 2, 3, 4, 2)
FRAME = pack_meta(layout.FRAME, 6, 7)


def rows(*records: tuple[int, ...], step: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(begin, end, meta[, sequence, nbytes, aux]) each; tickets in order."""
    padded = [
        [begin, end, step, meta, *[*rest, 0, 0, 0][:3], ticket + 1]
        for ticket, (begin, end, meta, *rest) in enumerate(records)
    ]
    return np.array(padded, np.int64).reshape(-1, 8)


TABLES = {0: NAMES, 1: NAMES}


def keep(joined: JoinedStep) -> KeptStep:
    (facts,) = step_facts([joined], TABLES)
    return KeptStep(joined.step, trace_id("e", joined.step), "all", joined, facts.arrivals)


def build(joined: JoinedStep) -> list[Span]:
    return list(SpanBuilder("e", TABLES, 1_000_000_000).build([keep(joined)]).spans())


def assert_nested(spans: list[Span]) -> None:
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    for span in spans:
        assert span.start_ns <= span.end_ns
        if span.parent_id is not None:
            parent = by_id[span.parent_id]
            assert parent.start_ns <= span.start_ns and span.end_ns <= parent.end_ns


def test_a_step_becomes_one_trace_of_all_ranks() -> None:
    first = rows(
        (100, 900, STEP, 0, 4),
        (110, 500, FORWARD),
        (120, 130, ALL_REDUCE, 1, 64),
        (140, 150, ALL_REDUCE, 2, 64),
        (600, 700, ALL_REDUCE, 3, 64),
    )
    second = rows((50, 950, STEP, 0, 4), (115, 505, FORWARD))
    spans = build(JoinedStep(0, {0: first, 1: second}))
    assert_nested(spans)
    assert {span.trace_id for span in spans} == {trace_id("e", 0)}
    shape = [(span.name, span.rank, span.start_ns - 10**9, span.end_ns - 10**9) for span in spans]
    assert shape == [
        ("engine.step", None, 50, 950),
        ("worker.step", 0, 100, 900),
        ("model.forward", 0, 110, 500),
        ("all_reduce", 0, 120, 130),
        ("all_reduce", 0, 140, 150),
        ("all_reduce", 0, 600, 700),
        ("worker.step", 1, 50, 950),
        ("model.forward", 1, 115, 505),
    ]
    parents = {span.span_id: span.name for span in spans}
    assert [parents.get(span.parent_id or 0) for span in spans] == [
        None, "engine.step", "worker.step", "model.forward", "model.forward", "worker.step",
        "engine.step", "worker.step",
    ]  # fmt: skip
    assert spans[1].span_id == worker_span_id("e", 0, 0)
    assert spans[1].attributes == {"onecast.step.id": 0, "onecast.batch.size": 4}
    assert spans[3].attributes == {
        "onecast.collective.op": "all_reduce",
        "onecast.collective.group": "tp",
        "onecast.collective.seq": 1,
        "onecast.collective.bytes": 64,
        "onecast.collective.dtype": "float32",
    }


def test_an_operation_that_outlives_its_phase_is_cut_and_says_so() -> None:
    records = rows((0, 100, STEP), (10, 50, FORWARD), (40, 130, ALL_REDUCE, 1, 8))
    spans = build(JoinedStep(0, {0: records}))
    assert_nested(spans)
    assert spans[-1].end_ns - 10**9 == 50
    assert spans[-1].attributes["onecast.cut_off_ns"] == 80


def test_errors_and_what_never_ended_are_errors_of_their_spans() -> None:
    failed = rows((0, 100, STEP), (10, 20, ALL_REDUCE, 1, 8, layout.ERROR | 5 << 8))
    stuck = rows((5, 0, STEP, 0, 3), (10, 0, FORWARD), (30, 0, ALL_REDUCE, 1, 8))
    spans = build(JoinedStep(0, {0: failed}, {1: stuck}))
    assert_nested(spans)
    assert [(span.name, span.rank, span.error) for span in spans] == [
        ("engine.step", None, "never ended"),
        ("worker.step", 0, None),
        ("all_reduce", 0, "KeyError"),
        ("worker.step", 1, "never ended"),
        ("model.forward", 1, "never ended"),
        ("all_reduce", 1, "never ended"),
    ]


def test_a_frame_is_told_on_the_phase_that_carried_it() -> None:
    frame = pack_frame(18_000, 33, 1, 25)
    records = rows((0, 100, STEP), (10, 60, FORWARD), (12, 50, FRAME, 9, *frame))
    spans = build(JoinedStep(0, {0: records}))
    assert [span.name for span in spans] == ["engine.step", "worker.step", "model.forward"]
    assert spans[-1].attributes == {
        "onecast.frame.sequence": 9,
        "onecast.frame.bytes": 18_000,
        "onecast.frame.metadata_bytes": 33,
        "onecast.frame.broadcasts": 1,
        "onecast.frame.encode_ns": 13,
        "onecast.frame.publish_ns": 25,
    }


def test_only_the_node_of_rank_0_sends_the_engine_span_and_ids_agree() -> None:
    records = rows((0, 100, STEP))
    near = list(SpanBuilder("e", TABLES, 0).build([keep(JoinedStep(3, {0: records}))]).spans())
    other = SpanBuilder("e", TABLES, 7, with_engine_span=False)
    far = list(other.build([keep(JoinedStep(3, {1: records}))]).spans())
    assert [span.name for span in far] == ["worker.step"]
    assert far[0].trace_id == near[0].trace_id and far[0].parent_id == near[0].span_id
    assert far[0].span_id != near[1].span_id
    assert trace_id("e", 3) != trace_id("e", 4) != trace_id("f", 4)


def test_steps_leave_in_order_once_all_ranks_have_ended_them() -> None:
    joiner = StepJoiner(2)
    nothing = {0: rows(), 1: rows()}
    joiner.add(0, np.concatenate([rows((0, 1, STEP)), rows((2, 3, STEP), step=1)]))
    assert joiner.release(nothing) == []
    joiner.add(1, rows((2, 3, STEP), step=1))
    assert joiner.release(nothing) == [], "step 0 is still out at rank 1"
    joiner.add(1, rows((0, 1, STEP)))
    busy = {0: rows((0, 0, ALL_REDUCE)), 1: rows()}
    assert joiner.release(busy) == [], "an asynchronous operation of step 0 is in flight"
    assert [joined.step for joined in joiner.release(nothing)] == [0, 1]
    joiner.add(0, rows((5, 6, ALL_REDUCE)))
    assert joiner.late == 1
    joiner.add(0, rows((7, 8, ALL_REDUCE), step=-1))
    assert joiner.release(nothing, everything=True) == []


def test_a_discarded_step_leaves_no_trace() -> None:
    joiner = StepJoiner(2)
    for rank in (0, 1):
        joiner.add(rank, rows((0, 1, STEP)))
    joiner.add(1, rows((3, 4, FORWARD), step=1))  # read before the rank knew
    joiner.add(1, rows((2, 5, STEP, 0, 0, layout.DISCARDED), step=1))
    assert [joined.step for joined in joiner.release({}, everything=True)] == [0]


def test_a_rank_that_stays_away_holds_back_a_bounded_number_of_steps() -> None:
    joiner = StepJoiner(2)
    left = 0
    for step in range(1000):
        joiner.add(0, rows((0, 1, STEP), step=step))
        left += len(joiner.release({}))
    assert 700 <= left < 1000
    assert left + len(joiner.release({}, everything=True)) == 1000


def _traced(rank: int, run_dir: str, trace_file: str) -> Any:
    import torch
    import torch.distributed as dist

    session = start_session(
        rank=rank,
        local_rank=rank,
        world_size=2,
        local_world_size=2,
        engine_id='engine "é"',
        settings=TelemetrySettings(
            trace_file=trace_file, trace_steps=8, trace_skew_s=0, metrics_port=None
        ),
        run_dir=run_dir,
    )
    x = torch.ones(512)
    for step in range(12):
        with session.step(step, batch_size=3):
            with session.phase("model.forward"):
                dist.all_reduce(x)
                dist.all_reduce(x)
            dist.broadcast(x, 0)
    return session.close()


def test_the_trace_file_is_what_both_pages_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    final, _ = run_ranks(_traced, 2, make_run_dir(), str(path))
    assert final["trace_file"] == str(path)
    assert final["dropped_by_reason"] == {"steps/trace_file_full": 4}
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]
    text = path.read_text(encoding="ascii")
    assert text.startswith('{"traceEvents":['), "Perfetto takes it for JSON by its first bytes"
    file = json.loads(text)
    assert list(file) == ["traceEvents", "displayTimeUnit", "data", "otherData"]
    assert file["otherData"]["steps"] == "8" and file["otherData"]["steps_left_out"] == "4"

    # Perfetto: complete events with numbers, names for every process, and nesting by time alone.
    by_kind: dict[str, list[Any]] = {"X": [], "b": [], "e": [], "M": []}
    for event in file["traceEvents"]:
        by_kind[event["ph"]].append(event)
    events = by_kind["X"]
    named = {event["pid"] for event in by_kind["M"] if event["name"] == "process_name"}
    assert {event["pid"] for event in events + by_kind["b"]} == named and len(named) == 3
    assert len(events) == 8 * 2 * 5
    for begin, end in zip(by_kind["b"], by_kind["e"], strict=True):
        assert begin["id"] == end["id"] and begin["ts"] <= end["ts"]
    assert len({event["id"] for event in by_kind["b"]}) == 8
    for thread in {event["tid"] for event in events}:
        own = [event for event in events if event["tid"] == thread]
        open_ends: list[float] = []
        for event in sorted(own, key=lambda event: (event["ts"], -event["dur"])):
            while open_ends and event["ts"] >= open_ends[-1]:
                open_ends.pop()
            end = event["ts"] + event["dur"]
            assert not open_ends or end <= open_ends[-1] + 1e-6
            open_ends.append(end)
    assert min(event["ts"] for event in events + by_kind["b"]) == 0

    # Jaeger: one trace a step, references that resolve, processes for all, unique span ids.
    assert len(file["data"]) == 8
    for trace in file["data"]:
        assert len(trace["traceID"]) == 32 and int(trace["traceID"], 16)
        by_id = {span["spanID"]: span for span in trace["spans"]}
        assert len(by_id) == len(trace["spans"]) == 11
        assert {span["processID"] for span in trace["spans"]} == set(trace["processes"])
        assert {process["serviceName"] for process in trace["processes"].values()} == {"onecast"}
        roots = [span for span in trace["spans"] if not span["references"]]
        assert [span["operationName"] for span in roots] == ["engine.step"]
        for span in trace["spans"]:
            assert span["traceID"] == trace["traceID"] and len(span["spanID"]) == 16
            assert type(span["startTime"]) is int and span["startTime"] > 1_600_000_000_000_000
            assert type(span["duration"]) is int and span["duration"] >= 0
            assert span["logs"] == [] and span["warnings"] is None
            for tag in span["tags"]:
                assert set(tag) == {"key", "type", "value"}
            for reference in span["references"]:
                assert reference["refType"] == "CHILD_OF"
                assert reference["traceID"] == trace["traceID"]
                parent = by_id[reference["spanID"]]
                assert parent["startTime"] <= span["startTime"]
                assert (
                    span["startTime"] + span["duration"] <= parent["startTime"] + parent["duration"]
                )
        ids = {
            tag["value"]
            for span in trace["spans"]
            for tag in span["tags"]
            if tag["key"] == "onecast.step.id"
        }
        assert len(ids) == 1 and ids <= set(range(4, 12))


def _file(tmp_path: Path, **limits: int) -> TraceFile[JoinedStep]:
    return TraceFile(
        str(tmp_path / "t.json"),
        engine_id="e",
        service_name="onecast",
        **{"max_steps": 100, "max_spans": 100, **limits},
    )


def test_the_trace_file_is_bounded_by_spans_too(tmp_path: Path) -> None:
    file = _file(tmp_path, max_spans=10)
    for step in range(20):
        file.add(JoinedStep(step, {0: rows((0, 9, STEP), (1, 2, FORWARD), step=step)}))
    assert file.left_out == 15
    file.write(build)
    assert len(json.loads(file.path.read_text())["data"]) == 5


def test_a_full_trace_file_keeps_the_steps_that_show_something(tmp_path: Path) -> None:
    def left(notable: set[int]) -> list[int]:
        file = _file(tmp_path, max_steps=10)
        for step in range(100):
            records = rows((0, 9, STEP), (1, 2, FORWARD), step=step)
            file.add(JoinedStep(step, {0: records}), notable=step in notable)
        assert file.left_out == 90
        found: list[int] = []

        def look(joined: JoinedStep) -> list[Span]:
            found.append(joined.step)
            return build(joined)

        file.write(look)
        return found[-10:]  # in the order of the file

    assert left({3, 50}) == [3, 50, *range(92, 100)]
    assert left(set(range(0, 80, 2))) == [70, 72, 74, 76, 78, *range(95, 100)], "half, the latest"
    assert left(set(range(100))) == list(range(90, 100))


def test_overlapping_operations_get_threads_of_their_own(tmp_path: Path) -> None:
    records = rows(
        (0, 100_000, STEP),
        (10_000, 50_000, ALL_REDUCE, 1),
        (20_000, 80_000, ALL_REDUCE, 2),
        (60_000, 90_000, ALL_REDUCE, 3),
    )
    file = _file(tmp_path)
    file.add(JoinedStep(0, {0: records}))
    file.write(build)
    events = json.loads(file.path.read_text())["traceEvents"]
    found = [(event["ts"], event["tid"]) for event in events if event["name"] == "all_reduce"]
    assert found == [(10.0, 1), (20.0, 1001), (60.0, 1)]


def test_requests_and_the_links_to_them_are_in_the_file(tmp_path: Path) -> None:
    asked = Span(77, 78, 5, "request", None, 1_000_000_000, 1_000_009_000, {"n": 1}, None,
                 serves=True)  # fmt: skip
    alone = asked._replace(trace_id=80, span_id=81, parent_id=None, error="KeyError")
    file: TraceFile[KeptStep] = TraceFile(
        str(tmp_path / "t.json"), engine_id="e", service_name="s", max_steps=9, max_spans=99
    )
    kept = keep(JoinedStep(0, {0: rows((5000, 9000, STEP))}))
    kept.links = (Link(77, 78), Link(80, 81))
    file.add(kept)
    file.add_requests([asked, alone, asked._replace(span_id=79)])
    builder = SpanBuilder("e", TABLES, 1_000_000_000)
    file.write(lambda kept: list(builder.build([kept]).spans()))
    written = json.loads(file.path.read_text())
    traces = {trace["traceID"][-4:]: trace["spans"] for trace in written["data"]}
    assert len(traces) == 3 and [span["spanID"][-2:] for span in traces["004d"]] == ["4e", "4f"]
    (engine,) = [
        s for spans in traces.values() for s in spans if s["operationName"] == "engine.step"
    ]
    assert [
        (reference["refType"], int(reference["traceID"], 16), int(reference["spanID"], 16))
        for reference in engine["references"]
    ] == [("FOLLOWS_FROM", 77, 78), ("FOLLOWS_FROM", 80, 81)]
    (lonely,) = traces["0050"]
    assert (
        lonely["references"] == []
        and {"key": "error", "type": "bool", "value": True} in (lonely["tags"])
    )
    events = [event for event in written["traceEvents"] if event["ph"] in "be"]
    assert {event["cat"] for event in events} == {"step", "request"}
    assert min(event["ts"] for event in events) == 0
    (step,) = [event for event in events if event["cat"] == "step" and event["ph"] == "b"]
    identities = {
        event["args"]["trace/span"]
        for event in events
        if event["cat"] == "request" and event["ph"] == "b"
    }
    assert set(step["args"]["links"]) < identities


def test_an_empty_trace_file_is_still_valid(tmp_path: Path) -> None:
    file = _file(tmp_path)
    file.write(build)
    assert json.loads(file.path.read_text())["data"] == []


def test_a_trace_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    file = _file(tmp_path)
    file.path.write_text("old")
    file.add(JoinedStep(0, {0: rows((0, 9, STEP))}))

    def broken(joined: JoinedStep) -> list[Span]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        file.write(broken)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.json"]
    assert file.path.read_text() == "old"
