"""CUDA graphs: what was captured is written down once, and every replay is counted."""

import json
import threading

import pytest
import torch
from fake_cuda import FakeCuda, make_graph_class

from onecast.telemetry.cuda_graphs import (
    CapturedCollective,
    CaptureLog,
    Manifest,
    ManifestReader,
    graphs_path,
)
from onecast.telemetry.ring import GRAPH, RingWriter, meta_kind
from onecast.telemetry.ring_reader import RingReader
from onecast.telemetry.run_directory import ring_path

REDUCE = ("all_reduce", "tp\t3", 2, "bfloat16", 16384)
GATHER = ("all_gather_into_tensor", "tp\t3", 2, "float32", 64)


class Recorder:
    def __init__(self):
        self.rows = []
        self.record = lambda *row: self.rows.append(row)

    @property
    def numbers(self):
        return [row[3] for row in self.rows]


class Fixture:
    def __init__(self, folder):
        self.gpu, self.recorder = FakeCuda(), Recorder()
        self.graph_class = make_graph_class(self.gpu)
        self.log = CaptureLog(graphs_path(str(folder), 3), self.recorder)
        self.instrument()
        self.reader = ManifestReader(graphs_path(str(folder), 3))

    def instrument(self):
        self.log.instrument(self.graph_class, self.gpu.is_current_stream_capturing)

    def capture(self, *collectives, graph=None):
        graph = graph or self.graph_class()
        graph.capture_begin()
        for collective in collectives:
            assert self.log.capturing()
            self.log.captured(*collective)
        graph.capture_end()
        return graph


@pytest.fixture
def fake(tmp_path):
    fixture = Fixture(tmp_path)
    yield fixture
    fixture.log.uninstrument()


def test_a_manifest_per_graph_and_a_record_per_replay(fake):
    first, second = fake.capture(REDUCE, GATHER), fake.capture()
    for graph in (first, second, first, first):
        graph.replay()
    assert fake.recorder.numbers == [0, 1, 0, 0]
    for begin_ns, end_ns, meta, _, nbytes, aux in fake.recorder.rows:
        assert 0 < begin_ns <= end_ns and meta_kind(meta) == GRAPH and nbytes == aux == 0
    lines = fake.log.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "name": "graph 0",
            "collectives": [
                {
                    "op": "all_reduce",
                    "group": "tp\t3",
                    "group_size": 2,
                    "dtype": "bfloat16",
                    "bytes": 16384,
                },
                {
                    "op": "all_gather_into_tensor",
                    "group": "tp\t3",
                    "group_size": 2,
                    "dtype": "float32",
                    "bytes": 64,
                },
            ],
        },
        {"name": "graph 1", "collectives": []},
    ]
    assert first.log == ["begin None", "end", "replay", "replay", "replay"]


def test_the_reader_reads_on_and_waits_for_whole_lines(fake):
    assert fake.reader.get(0) is None  # no file yet
    fake.capture(REDUCE)
    assert fake.reader.get(0) == Manifest("graph 0", (CapturedCollective(*REDUCE),))
    assert fake.reader.get(1) is None
    fake.capture(GATHER)
    text = fake.log.path.read_bytes()
    fake.log.path.write_bytes(text[:-5])
    assert fake.reader.get(1) is None
    fake.log.path.write_bytes(text)
    assert fake.reader.get(1) == Manifest("graph 1", (CapturedCollective(*GATHER),))
    assert fake.reader.get(-1) is None


def test_a_graph_that_is_captured_anew_gets_a_new_manifest(fake):
    graph = fake.capture(REDUCE)
    graph.replay()
    fake.capture(GATHER, graph=graph)
    graph.replay()
    assert fake.recorder.numbers == [0, 1]
    assert fake.reader.get(1).collectives == (CapturedCollective(*GATHER),)


def test_a_capture_that_fails_leaves_nothing_behind(fake):
    graph = fake.graph_class()
    with pytest.raises(RuntimeError, match="already capturing"):
        graph.capture_begin(fail=True)
    assert fake.log.open == 0 and not fake.log.capturing()
    graph.capture_begin()
    fake.log.captured(*REDUCE)
    with pytest.raises(RuntimeError, match="invalidated"):
        graph.capture_end(fail=True)
    assert fake.log.open == 0 and not fake.log.path.exists()
    fake.capture(REDUCE, graph=graph)
    assert fake.reader.get(0).collectives == (CapturedCollective(*REDUCE),)


def test_captures_of_two_threads_are_told_apart(fake):
    begun, done = threading.Event(), threading.Event()
    graphs = []

    def other():
        graph = fake.graph_class()
        graph.capture_begin()
        fake.log.captured(*GATHER)
        begun.set()
        assert done.wait(10)
        graph.capture_end()
        graphs.append(graph)

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(10)
    mine = fake.capture(REDUCE)
    done.set()
    thread.join()
    mine.replay()
    graphs[0].replay()
    assert fake.recorder.numbers == [0, 1]
    assert [fake.reader.get(n).collectives[0].op for n in (0, 1)] == [REDUCE[0], GATHER[0]]


def test_what_autograds_thread_issues_goes_into_the_capture_that_is_open(fake):
    graph = fake.graph_class()
    graph.capture_begin()
    thread = threading.Thread(target=lambda: fake.log.captured(*REDUCE))
    thread.start()
    thread.join()
    graph.capture_end()
    assert fake.reader.get(0).collectives == (CapturedCollective(*REDUCE),)


def test_replays_of_graphs_from_before_are_only_counted(tmp_path):
    fake = Fixture(tmp_path)
    fake.log.uninstrument()
    graph = fake.graph_class()
    graph.capture_begin()
    graph.capture_end()
    fake.instrument()
    graph.replay()
    fake.log.uninstrument()
    assert fake.recorder.rows == [] and fake.log.unknown_replays == 1


def test_uninstrument_leaves_the_class_as_it_was(tmp_path):
    gpu = FakeCuda()
    graph_class = make_graph_class(gpu)
    before = dict(graph_class.__dict__)
    log = CaptureLog(graphs_path(str(tmp_path), 0), Recorder())
    log.instrument(graph_class, gpu.is_current_stream_capturing)
    assert dict(graph_class.__dict__) != before
    assert graph_class.replay.__doc__ == "Run it." and graph_class.capture_begin.__doc__ == "Begin."
    with pytest.raises(ValueError, match="already active"):
        log.instrument(graph_class, gpu.is_current_stream_capturing)
    log.uninstrument()
    assert dict(graph_class.__dict__) == before and [*graph_class.__dict__] == [*before]
    log.uninstrument()
    log.instrument(graph_class, gpu.is_current_stream_capturing)
    log.uninstrument()
    assert dict(graph_class.__dict__) == before


def test_logs_on_top_of_each_other_can_leave_in_any_order(tmp_path):
    gpu = FakeCuda()
    graph_class = make_graph_class(gpu)
    logs = [CaptureLog(graphs_path(str(tmp_path), rank), Recorder()) for rank in range(2)]
    for log in logs:
        log.instrument(graph_class, gpu.is_current_stream_capturing)
    graph = graph_class()
    graph.capture_begin()
    graph.capture_end()
    graph.replay()
    logs[0].uninstrument()  # lies beneath: becomes a pass-through
    graph.replay()
    logs[1].uninstrument()
    graph.replay()
    assert graph.log == ["begin None", "end", "replay", "replay", "replay"]


def test_a_manifest_that_cannot_be_written_costs_the_program_nothing(tmp_path, caplog):
    fake = Fixture(tmp_path / "gone")
    graph = fake.capture(REDUCE)
    graph.replay()
    fake.log.uninstrument()
    assert graph.log == ["begin None", "end", "replay"] and fake.recorder.rows == []
    assert "the collectives of a CUDA graph will be missing" in caplog.text


def test_records_name_manifests_that_are_there(tmp_path):
    """Through a real ring: manifest first, then the record."""
    ring = RingWriter(ring_path(str(tmp_path), 0), capacity=64, rank=0)
    gpu = FakeCuda()
    graph_class = make_graph_class(gpu)
    log = CaptureLog(graphs_path(str(tmp_path), 0), ring)
    log.instrument(graph_class, gpu.is_current_stream_capturing)
    graph = graph_class()
    graph.capture_begin()
    log.captured(*REDUCE)
    graph.capture_end()
    graph.replay()
    log.uninstrument()
    (row,) = RingReader(ring_path(str(tmp_path), 0)).drain().rows.tolist()
    manifest = ManifestReader(graphs_path(str(tmp_path), 0)).get(row[4])
    assert meta_kind(row[3]) == GRAPH and manifest.collectives == (CapturedCollective(*REDUCE),)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda_nothing_is_patched(tmp_path):
    before = dict(torch.cuda.CUDAGraph.__dict__)
    log = CaptureLog(graphs_path(str(tmp_path), 0), Recorder())
    log.instrument()
    assert dict(torch.cuda.CUDAGraph.__dict__) == before
    log.uninstrument()


def test_torchs_own_class_can_be_patched_and_restored(tmp_path):
    before = dict(torch.cuda.CUDAGraph.__dict__)
    log = CaptureLog(graphs_path(str(tmp_path), 0), Recorder())
    log.instrument(torch.cuda.CUDAGraph, lambda: False)
    assert torch.cuda.CUDAGraph.__dict__["replay"] is not before["replay"]
    log.uninstrument()
    assert dict(torch.cuda.CUDAGraph.__dict__) == before
