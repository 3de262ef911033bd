"""Device times of collectives: exact where they are told, never at the cost of the program."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fake_cuda import FakeCuda, make_graph_class

from onecast.comm.testing import run_ranks
from onecast.runtime.bench import telemetry_gpu
from onecast.telemetry import CollectiveInstrumentor
from onecast.telemetry.cuda_graphs import CaptureLog, ManifestReader, graphs_path
from onecast.telemetry.cuda_streams import DriverStreams
from onecast.telemetry.device_time import CudaDeviceTimer
from onecast.telemetry.gpu_recording import GpuRecording, open_gpu_recording
from onecast.telemetry.ring import COLLECTIVE, DEVICE, GRAPH, RingWriter, pack_meta
from onecast.telemetry.ring_reader import RingReader
from onecast.telemetry.run_directory import ring_path

META = pack_meta(COLLECTIVE, 3, 4, 5, 2)
TENSOR = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))
OTHER = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=1))


class Recorder:
    def __init__(self):
        self.rows = []
        self.record_in_step = lambda *row: self.rows.append(row)
        self.record = lambda *row: None

    @property
    def durations(self):
        return [end - begin for _, begin, end, *_ in self.rows]


class Fixture:
    def __init__(self, pool=64):
        self.gpu, self.recorder, self.coalescing = FakeCuda(), Recorder(), set()
        self.captures = CaptureLog(Path("/nowhere"), self.recorder)
        self.timer = CudaDeviceTimer(
            self.recorder, self.captures, pool=pool, cuda=self.gpu, coalescing=self.coalescing,
            make_stream=self.gpu.new_stream,
        )  # fmt: skip
        self.sequence = 0

    def synchronous(self, duration_ns, tensor=TENSOR, group="tp"):
        """async_op=False: the kernel goes onto the current stream, and there is no Work."""
        mark = self.timer.issued(group, tensor)
        self.gpu.current_stream(tensor.device.index).run(duration_ns)
        self._finish(mark, None)
        return mark

    def asynchronous(self, duration_ns, group="tp"):
        mark = self.timer.issued(group, TENSOR)
        work = self.gpu.issue(group, duration_ns)
        self._finish(mark, work)
        return mark, work

    def _finish(self, mark, work):
        self.sequence += 1
        if mark is not None:
            self.timer.finished(mark, work, 7, 5_000, META, self.sequence, 4096)

    def wait(self, mark, work):
        work.wait()
        self.timer.waited(mark, work)


@pytest.fixture
def fake():
    return Fixture()


def test_a_synchronous_operation_is_timed_on_the_stream_it_runs_on(fake):
    fake.gpu.current.run(50_000)  # compute before it does not count
    fake.synchronous(20_000)
    fake.gpu.current.run(90_000)  # nor what comes after
    fake.timer.resolve()
    assert fake.recorder.rows == []  # not over yet: nobody waits for it
    fake.gpu.now += 75_000
    fake.timer.resolve()
    assert fake.recorder.rows == [(7, 5_000, 25_000, META & ~0xF | DEVICE, 1, 4096, 0)]
    assert fake.timer.timed == 1 and not fake.timer.skipped and fake.timer.waiting == 0


def test_later_operations_resolve_earlier_ones_a_few_at_a_time(fake):
    for _ in range(10):
        fake.synchronous(10_000)
    fake.gpu.now += 1_000_000
    fake.synchronous(10_000)
    assert len(fake.recorder.rows) == 4
    fake.synchronous(10_000)
    assert [row[4] for row in fake.recorder.rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert fake.recorder.durations == [10_000] * 8


def test_an_asynchronous_operation_ends_when_it_ends_and_not_after_the_compute_behind_it(fake):
    mark, work = fake.asynchronous(30_000)
    fake.gpu.current.run(500_000)  # overlapped
    before = list(fake.gpu.current.waited_for)
    fake.wait(mark, work)
    assert fake.gpu.current.waited_for == [*before, "work"]  # the program's own wait, no other
    fake.gpu.now += 40_000  # the compute still runs
    fake.timer.resolve()
    assert fake.recorder.durations == [30_000]


def test_it_waits_for_a_work_only_after_the_program_has(fake):
    """Else tensors would be released that NCCL still writes; the fake asserts the order."""
    mark, work = fake.asynchronous(30_000)
    assert not work.released
    fake.wait(mark, work)
    assert fake.gpu.made[0].waited_for == ["work"]


def test_what_was_over_before_it_was_waited_for_is_counted_and_not_guessed(fake):
    mark, work = fake.asynchronous(30_000)
    fake.gpu.now += 1_000_000
    fake.wait(mark, work)
    fake.timer.close()
    assert fake.recorder.rows == []
    assert fake.timer.skipped == {"over": 1}


def test_groups_have_side_streams_of_their_own(fake):
    slow, quick = fake.asynchronous(900_000, "dp"), fake.asynchronous(10_000, "tp")
    fake.wait(*slow)
    fake.wait(*quick)
    fake.gpu.now += 1_000_000
    fake.timer.resolve()
    assert sorted(fake.recorder.durations) == [10_000, 900_000]
    assert len(fake.gpu.made) == 2


def test_a_stream_that_is_late_holds_up_no_other(fake):
    fake.wait(*fake.asynchronous(10_000_000, "dp"))
    for _ in range(20):
        fake.synchronous(1_000, OTHER)
        fake.gpu.now += 100_000
    fake.timer.resolve()
    assert fake.recorder.durations == [1_000] * 20 and fake.timer.waiting == 1


def test_several_devices_are_timed_each_with_its_own_events(fake):
    fake.synchronous(10_000)
    fake.synchronous(20_000, OTHER)
    fake.gpu.now += 100_000
    fake.timer.resolve()
    assert sorted(fake.recorder.durations) == [10_000, 20_000]
    fake.synchronous(30_000, OTHER)
    assert fake.gpu.events == 4  # the second device's pair, again


def test_the_pool_is_bounded_and_what_does_not_fit_is_counted():
    fake = Fixture(pool=3)
    for _ in range(5):
        fake.synchronous(10_000)
    assert fake.timer.skipped == {"pool_full": 2} and fake.gpu.events == 6
    fake.gpu.now += 100_000
    for _ in range(3):
        fake.synchronous(10_000)
    assert fake.timer.skipped == {"pool_full": 2} and fake.gpu.events == 6


def test_nothing_is_recorded_or_asked_while_a_graph_is_captured(fake):
    fake.synchronous(10_000)
    mark, work = fake.asynchronous(20_000)
    fake.gpu.now += 5_000
    fake.gpu.captures = fake.captures.open = 1  # by another thread, say: the fake asserts the rest
    assert fake.timer.issued("tp", TENSOR) is None
    fake.timer.resolve()
    fake.wait(mark, work)
    assert fake.timer.skipped == {"capturing": 1}
    fake.gpu.captures = fake.captures.open = 0
    fake.gpu.now += 100_000
    fake.timer.resolve()
    assert fake.recorder.durations == [10_000]


def test_a_capture_that_begins_waits_for_a_question_that_is_being_asked(fake):
    fake.synchronous(10_000)
    with fake.captures.lock:  # as a capture that is about to begin
        fake.timer.resolve()  # does not wait either
    assert fake.gpu.queries == 0


def test_operations_that_are_coalesced_are_not_timed(fake):
    fake.coalescing.add("pp")
    assert fake.timer.issued("pp", TENSOR) is None
    assert fake.timer.issued("tp", TENSOR) is not None


def test_nested_lists_and_what_is_not_on_a_gpu(fake):
    assert fake.timer.issued("tp", [[TENSOR, TENSOR]]) is not None
    for value in (torch.zeros(2), [torch.zeros(2)], [], [[]], (), None, 7):
        assert fake.timer.issued("tp", value) is None
    assert not fake.timer.skipped


def test_marks_of_calls_that_raised_go_back_to_the_pool():
    fake = Fixture(pool=1)
    for _ in range(3):
        fake.timer.dropped(fake.timer.issued("tp", TENSOR))
    assert fake.timer.skipped == {"unwaited": 3}
    fake.synchronous(1_000)
    assert fake.timer.waiting == 1


def test_close_waits_a_moment_for_what_is_running_and_no_longer(fake):
    fake.synchronous(10_000)
    fake.synchronous(10**12)
    fake.gpu.now += 20_000
    fake.timer.close(timeout_s=0.02)
    assert fake.recorder.durations == [10_000]
    assert fake.timer.skipped == {"unfinished": 1} and fake.timer.waiting == 0
    assert fake.timer.issued("tp", TENSOR) is None


def test_an_error_of_cuda_is_told_once_and_ends_the_timing(fake, caplog):
    mark, work = fake.asynchronous(10_000)
    fake.gpu.broken = True
    fake.wait(mark, work)
    assert fake.timer.issued("tp", TENSOR) is None
    fake.timer.close()
    assert [record.getMessage() for record in caplog.records] == [
        "no more device times of collectives: CUDA error: an illegal memory access was encountered"
    ]


def test_without_a_stream_of_the_driver_only_operations_with_a_work_go_untimed(fake):
    fake.timer._make_stream = lambda device: None
    fake.wait(*fake.asynchronous(10_000))
    fake.synchronous(10_000)
    fake.gpu.now += 100_000
    fake.timer.resolve()
    assert fake.timer.skipped == {"no_stream": 1} and fake.recorder.durations == [10_000]


def test_streams_are_bounded_however_many_groups_come_and_go(fake):
    for number in range(100):
        fake.wait(*fake.asynchronous(1_000, f"group {number}"))
        fake.gpu.now += 100_000
    assert len(fake.gpu.made) == 32


def test_threads_may_issue_at_the_same_time():
    fake = Fixture(pool=5000)

    def issue():
        for _ in range(300):
            fake.synchronous(0)
            fake.gpu.now += 10

    threads = [threading.Thread(target=issue) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fake.gpu.now += 10**9
    fake.timer.close()
    assert len(fake.recorder.rows) == fake.timer.timed == 1200


def test_a_pool_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="pool is 0; it must be at least 1"):
        Fixture(pool=0)


def test_without_cuda_there_is_nothing_to_record_of_it(tmp_path):
    ring = RingWriter(ring_path(str(tmp_path), 0), capacity=64, rank=0)
    recording = open_gpu_recording(ring)
    assert (recording is None) == (torch.version.cuda is None)
    recording = recording or GpuRecording(ring)  # harmless where there is none
    assert recording.timer.issued(None, torch.zeros(1)) is None
    assert not recording.captures.capturing()
    recording.resolve()
    recording.close()


class OnAGpu(torch.Tensor):
    """A tensor of the host that says otherwise."""

    is_cuda = property(lambda self: True)


def intercept(rank, folder):
    gpu = FakeCuda()
    ring = RingWriter(ring_path(folder, rank), capacity=256, rank=rank)
    captures = CaptureLog(graphs_path(folder, rank), ring)
    graph_class = make_graph_class(gpu)
    captures.instrument(graph_class, gpu.is_current_stream_capturing)
    timer = CudaDeviceTimer(ring, captures, cuda=gpu, coalescing=())
    instrumentor = CollectiveInstrumentor()
    instrumentor.instrument(ring, device_timer=timer, capture_log=captures)
    tensor = torch.ones(64).as_subclass(OnAGpu)
    for _ in range(3):
        dist.all_reduce(tensor)
    dist.all_reduce(tensor, async_op=True).wait()
    dist.all_reduce(torch.ones(4))
    gpu.current.run(0)
    graph = graph_class()
    graph.capture_begin()
    for _ in range(2):
        dist.all_reduce(tensor)
    graph.capture_end()
    graph.replay()
    timer.close()
    instrumentor.uninstrument()
    captures.uninstrument()
    ring.close()
    time.sleep(0.01)
    kinds = [row & 0xF for row in RingReader(ring.path).drain().rows[:, 3].tolist()]
    return kinds, dict(timer.skipped), ManifestReader(captures.path).get(0)


def test_the_interception_tells_the_timer_and_the_log(tmp_path):
    """Over Gloo, whose operations are over when their wait returns: none of them has an end."""
    for kinds, skipped, manifest in run_ranks(intercept, 2, str(tmp_path)):
        assert kinds == [COLLECTIVE] * 5 + [GRAPH]  # and none of what was captured
        assert skipped == {"over": 4}
        assert [
            (one.op, one.group_size, one.dtype, one.nbytes) for one in manifest.collectives
        ] == [("all_reduce", 2, "float32", 256)] * 2


# ---- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CYCLES = 40_000_000  # of a kernel that does nothing else: some 20 ms


def time_real_work(rank):
    recorder = Recorder()
    timer = CudaDeviceTimer(recorder, CaptureLog(Path("/nowhere"), recorder))
    tensor = torch.zeros(4, device="cuda")
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    mark = timer.issued(object(), tensor)
    torch.cuda._sleep(CYCLES)
    timer.finished(mark, None, 7, 5_000, META, 1, 16)
    timer.resolve()
    early = list(recorder.rows)
    torch.cuda.synchronize()
    timer.resolve()
    return early, recorder.durations, dict(timer.skipped)


@pytest.mark.cuda
@needs_gpu
def test_real_events_time_real_work_and_nobody_waits():
    ((early, durations, skipped),) = run_ranks(time_real_work, 1)
    assert early == [] and skipped == {}
    assert 5e6 < durations[0] < 500e6


def wait_beside_the_default_stream(rank):
    torch.zeros(4, device="cuda")
    stream = DriverStreams(torch.cuda).make(0)
    torch.cuda._sleep(10 * CYCLES)  # on the default stream
    event = torch.cuda.Event()
    event.record(stream)
    event.synchronize()
    still_busy = not torch.cuda.current_stream(0).query()
    torch.cuda.synchronize()
    return still_busy


@pytest.mark.cuda
@needs_gpu
def test_a_stream_of_the_driver_is_tied_to_no_other():
    assert run_ranks(wait_beside_the_default_stream, 1) == [True]


@pytest.mark.cuda
@needs_gpu
def test_all_reduces_over_nccl_and_replays_are_timed_and_counted():
    rows = telemetry_gpu.measure("cuda", 10, 100.0)  # it checks what it counts
    methods = {row["method"] for row in rows}
    assert {telemetry_gpu.DEVICE_TIME, telemetry_gpu.REFERENCE, telemetry_gpu.REPLAY} <= methods
