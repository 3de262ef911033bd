"""Interception: every collective is recorded once, and nothing of torch stays changed."""

import collections
import importlib
import time
from typing import Any

import pytest

from onecast.comm.testing import run_ranks
from onecast.telemetry import CollectiveInstrumentor, RingReader, RingWriter, make_run_dir
from onecast.telemetry import ring as layout
from onecast.telemetry.aggregate import bus_factor, group_label
from onecast.telemetry.run_directory import remove_run_dir, ring_path

Seen = dict[tuple[str, str], list[tuple[int, int, str, int]]]


class Recording:
    """Instruments this process and reads its own ring back."""

    def __init__(self, rank: int, *gpu: Any) -> None:
        run_dir = make_run_dir()
        self.ring = RingWriter(ring_path(run_dir, rank), capacity=4096, rank=rank)
        self.reader = RingReader(self.ring.path)
        remove_run_dir(run_dir)  # both have it mapped
        self.instrumentor = CollectiveInstrumentor()
        self.instrumentor.instrument(self.ring, *gpu)

    def rows(self) -> list[list[int]]:
        found: list[list[int]] = self.reader.drain().rows.tolist()
        return found

    def seen(self) -> Seen:
        """By (op, group label): (sequence, bytes, dtype, status) of each."""
        names = self.reader.names
        found: Seen = collections.defaultdict(list)
        for row in self.rows():
            meta = row[layout.META]
            key = (
                names[layout.meta_name(meta)],
                group_label(names[layout.meta_group(meta)]),
            )
            found[key].append(
                (
                    row[layout.SEQUENCE],
                    row[layout.NBYTES],
                    names[layout.meta_dtype(meta)],
                    row[layout.AUX] & 0xFF,
                )
            )
        return dict(found)

    def unrecorded(self) -> int:
        self.instrumentor.sample_coverage()
        return sum(self.reader.coverage)

    def close(self) -> None:
        self.instrumentor.uninstrument()


def _state_of_torch() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The classes and modules that are patched, entry by entry, and the dispatcher's kernels."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import Backend, Reducer, Work
    from torch.distributed import ProcessGroup, distributed_c10d

    owners: list[Any] = [ProcessGroup, Backend, Work, Reducer, torch._C.Future]
    modules = [  # without what other modules they import in time
        {name: entry for name, entry in module.__dict__.items() if callable(entry)}
        for module in (dist, distributed_c10d)
    ]
    operators = [
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(("_c10d_functional", "c10d::"))
    ]
    kernels = {
        name: torch._C._dispatch_dump(name) + torch._C._dispatch_dump_table(name)
        for name in operators
    }
    return [dict(owner.__dict__) for owner in owners] + modules, kernels


def test_instrument_and_uninstrument_leave_torch_as_it_was() -> None:

    importlib.import_module("torch.distributed._functional_collectives")  # registers kernels
    before, kernels = _state_of_torch()
    recording = Recording(0)
    changed, changed_kernels = _state_of_torch()
    assert changed[0]["allreduce"] is not before[0]["allreduce"]
    assert changed[2]["wait"] is not before[2]["wait"]
    assert changed[0]["allreduce"].__name__ == "allreduce"
    assert {name for name in kernels if kernels[name] != changed_kernels[name]} >= {
        "_c10d_functional::all_reduce", "_c10d_functional::wait_tensor"
    }  # fmt: skip
    recording.close()
    after, kernels_after = _state_of_torch()
    for old, new in zip(before, after, strict=True):
        assert list(old) == list(new)
        assert all(old[name] is new[name] for name in old)
    assert kernels == kernels_after
    with pytest.raises(ValueError, match="already active"):
        _instrument_twice()


def _instrument_twice() -> None:
    recording = Recording(0)
    try:
        recording.instrumentor.instrument(recording.ring)
    finally:
        recording.close()


def test_two_instrumentors_may_end_in_either_order() -> None:
    before, kernels = _state_of_torch()
    first, second = Recording(0), Recording(1)
    first.close()  # beneath the second one
    second.close()
    first.instrumentor.uninstrument()
    again = Recording(2)
    again.close()
    inner, outer = Recording(0), Recording(1)
    outer.close()
    inner.close()
    after, kernels_after = _state_of_torch()
    assert [list(part) for part in before] == [list(part) for part in after]
    assert kernels == kernels_after


def _all_collectives(rank: int) -> Seen:
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    recording = Recording(rank)
    x = torch.ones(4)  # 16 bytes
    pair = torch.ones(8)
    dist.all_reduce(x)
    dist.all_reduce(x, async_op=True).wait()
    dist.broadcast(x, 0)
    dist.all_gather([torch.empty(4), torch.empty(4)], x)
    dist.all_gather_into_tensor(torch.empty(8), x)
    dist.reduce_scatter(torch.empty(4), [x.clone(), x.clone()])
    dist.reduce_scatter_tensor(torch.empty(4), pair)
    dist.all_to_all_single(torch.empty(8), pair)
    dist.all_to_all([torch.empty(4), torch.empty(4)], [x, x])
    dist.gather(x, [torch.empty(4), torch.empty(4)] if rank == 0 else None, 0)
    dist.scatter(torch.empty(4), [x.clone(), x.clone()] if rank == 0 else None, 0)
    dist.reduce(x, 0)
    dist.barrier()
    dist.monitored_barrier()
    if rank == 0:
        dist.send(x.to(torch.int32), 1)
        dist.isend(pair, 1).wait()
        dist.recv(x, 1)
    else:
        dist.recv(torch.empty(4, dtype=torch.int32), 0)
        dist.irecv(torch.empty(8), 0).wait()
        dist.send(x, 0)
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, torch.empty(4), 1 - rank)]
    ):
        work.wait()
    with distributed_c10d._coalescing_manager():
        dist.all_reduce(x)
        dist.all_reduce(pair)
    seen = recording.seen()
    assert recording.unrecorded() == 0
    recording.close()
    return seen


def test_every_collective_is_recorded_exactly_once() -> None:
    results = run_ranks(_all_collectives, 2)
    for rank, seen in enumerate(results):
        assert {group for _, group in seen} == {"default_pg"}
        f = "float32"
        # Collectives share the group's numbers in the order of the calls; send, recv have theirs.
        expected = {
            "all_reduce": [(1, 16, f, 0), (2, 16, f, 0)],
            "broadcast": [(3, 16, f, 0)],
            "all_gather": [(4, 32, f, 0)],
            "all_gather_into_tensor": [(5, 32, f, 0)],
            "reduce_scatter": [(6, 32, f, 0)],
            "reduce_scatter_tensor": [(7, 32, f, 0)],
            "all_to_all_single": [(8, 32, f, 0)],
            "all_to_all": [(9, 32, f, 0)],
            "gather": [(10, 32, f, 0)],
            "scatter": [(11, 32, f, 0)],
            "reduce": [(12, 16, f, 0)],
            "barrier": [(13, 0, "", 0)],
            "monitored_barrier": [(14, 0, "", 0)],
            "send": [(1, 16, "int32", 0), (2, 32, f, 0), (4, 16, f, 0)],
            "recv": [(3, 16, f, 0), (5, 16, f, 0)],
            "all_reduce_coalesced": [(15, 48, f, 0)],
        }
        if rank == 1:
            expected["send"] = [(3, 16, f, 0), (4, 16, f, 0)]
            expected["recv"] = [(1, 16, "int32", 0), (2, 32, f, 0), (5, 16, f, 0)]
        assert {op: found for (op, _), found in seen.items()} == expected


def _groups_and_objects(rank: int) -> tuple[Seen, int]:
    import torch
    import torch.distributed as dist

    recording = Recording(rank)
    named = dist.new_group([0, 1], group_desc="tp")
    plain = dist.new_group([0, 1])
    alone = dist.new_group([0])
    recording.rows()  # making a group may issue collectives of its own
    x = torch.ones(4)
    dist.all_reduce(x, group=named)
    dist.all_reduce(x, group=plain)
    dist.all_reduce(x, group=plain)
    if rank == 0:
        dist.all_reduce(x, group=alone)
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank}, group=named)
    assert objects == [{"rank": 0}, {"rank": 1}]
    dist.broadcast_object_list(["text"], 0, group=named)
    # Straight on the group, and straight on its backend
    named.allreduce([x]).wait()
    named.allreduce(x).wait()
    named.allreduce(tensors=[x]).wait()
    named._get_backend(torch.device("cpu")).allreduce([x]).wait()
    named.barrier().wait()
    seen = recording.seen()
    unrecorded = recording.unrecorded()
    recording.close()
    return seen, unrecorded


def test_groups_objects_and_direct_calls_are_told_apart_and_counted_once() -> None:
    for rank, (seen, unrecorded) in enumerate(run_ranks(_groups_and_objects, 2)):
        counts = {key: len(found) for key, found in seen.items()}
        labels = sorted({group for _, group in seen} - {"tp"})
        assert counts.pop(("all_reduce", labels[0])) == 2
        if rank == 0:
            assert counts.pop(("all_reduce", labels[1])) == 1
        assert counts == {
            ("all_reduce", "tp"): 5,
            ("all_gather", "tp"): 2,  # the sizes, then the bytes
            ("broadcast", "tp"): 2,
            ("barrier", "tp"): 1,
        }
        assert unrecorded == 0


def _two_recordings(rank: int) -> list[dict[tuple[str, str], int]]:
    import torch
    import torch.distributed as dist
    import torch.distributed._functional_collectives as functional

    group = dist.new_group([0, 1], group_desc="tp")
    recordings = [Recording(rank), Recording(rank)]
    for _ in range(3):
        dist.all_reduce(torch.ones(4), group=group)
        group._get_backend(torch.device("cpu")).broadcast([torch.ones(4)]).wait()
        functional.all_gather_tensor(torch.ones(4), 0, group).numpy()
        dist.all_reduce(torch.ones(4), group=group, async_op=True).get_future().wait()
    found = []
    for recording in reversed(recordings):
        assert recording.unrecorded() == 0
        found.append({key: len(rows) for key, rows in recording.seen().items()})
        recording.close()
    return found


def test_two_instrumentors_both_record_everything() -> None:
    for found in run_ranks(_two_recordings, 2):
        counts = {
            ("all_reduce", "tp"): 6, ("broadcast", "tp"): 3, ("all_gather_into_tensor", "tp"): 3
        }  # fmt: skip
        assert found == [counts, counts]


def _errors(rank: int) -> Seen:
    import datetime

    import torch
    import torch.distributed as dist

    recording = Recording(rank)
    with pytest.raises(NotImplementedError):
        dist.group.WORLD.allreduce([])  # type: ignore[union-attr]
    with pytest.raises(TypeError):
        dist.group.WORLD.allreduce("no tensor")  # type: ignore[union-attr, arg-type]
    dist.barrier()
    if rank == 0:  # nobody else calls it
        group = dist.group.WORLD
        assert group is not None
        with pytest.raises(RuntimeError):
            group.recv([torch.ones(2)], 1, 5).wait(datetime.timedelta(seconds=0.3))
    seen = recording.seen()
    recording.close()
    return {
        key: [
            (seq, nbytes, dtype, status and status & 0xFF) for seq, nbytes, dtype, status in found
        ]
        for key, found in seen.items()
    }


def test_an_exception_marks_the_record_and_reaches_the_caller() -> None:
    first, second = run_ranks(_errors, 2)
    failed = [(1, 0, "", layout.ERROR), (2, 0, "", layout.ERROR)]
    assert first["all_reduce", "default_pg"] == second["all_reduce", "default_pg"] == failed
    assert first["recv", "default_pg"] == [(1, 8, "float32", layout.ERROR)]


def _asynchronous(rank: int) -> dict[int, tuple[float, float, int]]:
    import torch
    import torch.distributed as dist

    recording = Recording(rank)
    x = torch.ones(4)
    waited = dist.all_reduce(x, async_op=True)
    assert recording.rows() == []
    time.sleep(0.2)
    assert recording.rows() == [], "it has not ended until somebody has waited"
    waited.wait()
    waited.wait()  # a second wait changes nothing
    dist.all_reduce(x)  # 2: waits itself
    by_future = dist.all_reduce(x, async_op=True)
    by_future.get_future().wait()
    time.sleep(0.2)
    del by_future
    polled = dist.all_reduce(x, async_op=True)
    while not polled.is_completed():
        time.sleep(0.001)
    time.sleep(0.2)
    polled.wait()
    dropped = dist.all_reduce(x, async_op=True)
    time.sleep(0.2)
    del dropped
    recording.instrumentor.sample_coverage()
    rows = recording.rows()
    recording.close()
    return {
        row[layout.SEQUENCE]: (
            (row[layout.END] - row[layout.BEGIN]) * 1e-9,
            (row[layout.AUX] >> 8) * 1e-9,
            row[layout.AUX] & 0xFF,
        )
        for row in rows
    }


def test_an_operation_ends_when_it_has_been_waited_for_or_dropped() -> None:
    for found in run_ranks(_asynchronous, 2):
        took, hidden, status = zip(*(found[number] for number in range(1, 6)), strict=True)
        assert status == (layout.OK, layout.OK, layout.OK, layout.OK, layout.UNWAITED)
        assert 0.2 <= hidden[0] <= took[0] < 5
        assert hidden[1] == 0, "who waits in the call itself hides nothing"
        assert took[2] < 0.2 and took[3] < 0.2, "over before anybody waited"
        assert hidden[3] == took[3]


def _past_every_method(rank: int) -> list[tuple[int, int]]:
    import torch
    from torch.distributed import ProcessGroup, distributed_c10d

    past = ProcessGroup.allreduce  # as C++ calls it
    recording = Recording(rank)
    group = distributed_c10d._get_default_group()
    found = []
    for number in (0, 3, 1):
        group.allreduce([torch.ones(4)]).wait()
        for _ in range(number):
            past(group, [torch.ones(4)]).wait()
        found.append((sum(map(len, recording.seen().values())), recording.unrecorded()))
    recording.instrumentor.sample_coverage(at_most_every_s=60)
    past(group, [torch.ones(4)]).wait()
    recording.instrumentor.sample_coverage(at_most_every_s=60)
    assert sum(recording.reader.coverage) == 4, "not so soon again"
    recording.close()
    assert sum(recording.reader.coverage) == 5, "at the end at the latest"
    return found


def test_what_cannot_be_seen_is_counted() -> None:
    assert run_ranks(_past_every_method, 2) == [[(1, 0), (1, 3), (1, 4)]] * 2


def _recorder_comes_later(rank: int) -> tuple[Seen, int, list[int]]:
    import torch
    import torch.distributed as dist
    import torch.distributed._functional_collectives as functional

    run_dir = make_run_dir()
    ring = RingWriter(ring_path(run_dir, rank), capacity=64, rank=rank)
    reader = RingReader(ring.path)
    remove_run_dir(run_dir)
    asked = 0

    def factory() -> RingWriter | None:
        nonlocal asked
        asked += 1
        dist.barrier()  # what it calls itself does not ask again
        return ring if asked == 2 else None

    before = _state_of_torch()
    instrumentor = CollectiveInstrumentor()
    instrumentor.instrument(factory)
    counts = [asked]
    for _ in range(2):
        dist.all_reduce(torch.ones(4))
        counts.append(asked)
    named = dist.new_group([0, 1], group_desc="tp")
    functional.all_reduce(torch.ones(4), "sum", named).numpy()
    counts.append(asked)
    dist.all_reduce(torch.ones(8), group=named)
    dist.broadcast(torch.ones(4), 0)
    counts.append(asked)
    recording = Recording.__new__(Recording)
    recording.reader, recording.instrumentor = reader, instrumentor
    seen, unrecorded = recording.seen(), recording.unrecorded()
    instrumentor.uninstrument()
    after = _state_of_torch()
    for old, new in zip(before[0], after[0], strict=True):
        assert [name for name in old if old[name] is not new[name]] == []
    assert before[1] == after[1]
    return seen, unrecorded, counts


def test_a_recorder_may_come_with_a_later_group() -> None:
    f = "float32"
    for seen, unrecorded, counts in run_ranks(_recorder_comes_later, 2):
        assert counts == [0, 1, 1, 2, 2]
        assert seen == {
            ("all_reduce", "tp"): [(1, 16, f, 0), (2, 32, f, 0)],
            ("broadcast", "default_pg"): [(1, 16, f, 0)],
        }
        assert unrecorded == 0


class _CoalescingGroup:
    """What NCCL does with a batch: operations return nothing to wait for, its end does."""

    group_name, group_desc = "7", "pipeline"

    def __init__(self) -> None:
        self.sequence = 0

    def size(self) -> int:
        return 4

    def _get_sequence_number_for_group(self) -> int:
        return self.sequence


def test_operations_of_a_batch_end_with_the_batch() -> None:
    import torch
    from torch._C._distributed_c10d import Work

    from onecast.telemetry.intercept_calls import Calls, Method

    recording = Recording(0)
    recording.close()
    calls, group, work = Calls(recording.ring), _CoalescingGroup(), Work()

    def end_coalescing(group: Any) -> Work:
        group.sequence += 1
        return work

    start = calls.start_coalescing(lambda group: None)
    send = calls.method(lambda *_: None, Method("send", 0, False), False)
    recv = calls.method(lambda *_: None, Method("recv", 0, False), False)
    end = calls.end_coalescing(end_coalescing)
    wait = calls.works.wait(lambda work: True)
    for _ in range(3):
        start(group)
        send(group, [torch.ones(4)], 1, 0)
        recv(group, [torch.ones(8)], 1, 0)
        assert recording.rows() == []
        assert end(group) is work
        assert recording.rows() == [], "its end only issues them"
        wait(work)
        assert [(row[layout.NBYTES], row[layout.AUX] & 0xFF) for row in recording.rows()] == [
            (16, layout.OK), (32, layout.OK)
        ]  # fmt: skip


def _fake_group(rank: int) -> tuple[Seen, list[Any]]:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers the backend)

    group = dist.new_group([0, 1], backend="fake")
    recording = Recording(rank)
    for _ in range(3):
        dist.all_reduce(torch.ones(4), group=group)
    recording.instrumentor.sample_coverage()
    result = recording.seen(), [one for one in recording.instrumentor.coverage() if one.issued]
    recording.close()
    return result


def test_a_backend_without_sequence_numbers_is_recorded_too() -> None:
    for seen, coverage in run_ranks(_fake_group, 2):
        ((_, found),) = seen.items()
        assert [(number, nbytes) for number, nbytes, *_ in found] == [(1, 16), (2, 16), (3, 16)]
        assert coverage == []


class _Gpu:
    """A timer and a capture log that write down what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.open = 0

    def issued(self, handle: Any, value: Any) -> str | None:
        while isinstance(value, list):
            value = value[0]
        return f"mark {value.numel()}" if value.is_cuda else None

    def finished(self, mark: str, work: Any, *words: int) -> None:
        step, begin_ns, meta, sequence, nbytes = words
        assert work is not None and begin_ns > 0 and layout.meta_kind(meta) == layout.COLLECTIVE
        self.told.append(("finished", mark, step, sequence, nbytes))

    def waited(self, mark: str, work: Any) -> None:
        self.told.append(("waited", mark))

    def dropped(self, mark: str) -> None:
        self.told.append(("dropped", mark))

    def capturing(self) -> bool:
        return self.open > 0

    def captured(self, *what: Any) -> None:
        self.told.append(("captured", *what))


def _on_gpu(rank: int) -> tuple[list[tuple[Any, ...]], list[tuple[int, int]], int]:
    import torch
    import torch.distributed as dist

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    def tensor(count: int) -> torch.Tensor:
        return torch.ones(count).as_subclass(OnGpu)

    gpu = _Gpu()
    recording = Recording(rank, gpu, gpu)
    recording.ring.set_step(7)
    for count in (1, 2):  # the first call of an operation and the ones after it go different ways
        dist.all_reduce(tensor(count))
    dist.all_reduce(torch.ones(3))  # not on a GPU
    dist.all_reduce(tensor(4), async_op=True).get_future().wait()
    with pytest.raises(TypeError):
        dist.group.WORLD.allreduce([tensor(5)], dist.BarrierOptions())  # type: ignore[union-attr]
    gpu.open = 1
    dist.all_reduce(tensor(6))
    gpu.open = 0
    dist.all_reduce(tensor(7))
    rows = recording.rows()
    unrecorded = recording.unrecorded()
    recording.close()
    kept = [(row[layout.SEQUENCE], row[layout.NBYTES]) for row in rows]
    return gpu.told, kept, unrecorded


def test_a_timer_hears_of_what_is_on_a_gpu_and_a_log_of_what_is_captured() -> None:
    ((told, rows, unrecorded),) = run_ranks(_on_gpu, 1)
    assert told == [
        ("finished", "mark 1", 7, 1, 4), ("waited", "mark 1"),
        ("finished", "mark 2", 7, 2, 8), ("waited", "mark 2"),
        ("finished", "mark 4", 7, 4, 16), ("dropped", "mark 4"),
        ("dropped", "mark 5"),
        ("captured", "all_reduce", "default_pg\t0", 1, "float32", 24),
        ("finished", "mark 7", 7, 6, 28), ("waited", "mark 7"),
    ]  # fmt: skip
    assert rows == [(1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (6, 28)]
    assert unrecorded == 0


def test_bus_bytes_follow_nccl_tests() -> None:
    assert bus_factor("all_reduce", 4) == 1.5
    assert bus_factor("all_gather_into_tensor", 4) == bus_factor("reduce_scatter", 4) == 0.75
    assert bus_factor("all_to_all_single", 2) == 0.5
    assert bus_factor("broadcast", 4) == bus_factor("send", 4) == 1.0
    assert bus_factor("barrier", 4) == bus_factor("all_reduce", 1) == 0.0


def _begin_again(rank: int) -> list[tuple[str, int]]:
    import torch
    import torch.distributed as dist

    recording = Recording(rank)
    store = dist.distributed_c10d._get_default_store()
    for _ in range(3):
        dist.all_reduce(torch.ones(4))
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=2)
    dist.all_reduce(torch.ones(4))
    names = recording.reader.names
    found = [
        (names[layout.meta_group(row[layout.META])], row[layout.SEQUENCE])
        for row in recording.rows()
    ]
    recording.close()
    return found


def test_groups_that_begin_again_by_the_same_name_are_told_apart() -> None:
    first, second = run_ranks(_begin_again, 2)
    assert first == second
    assert [number for _, number in first] == [1, 2, 3, 1]
    names = [name for name, _ in first]
    assert len(set(names[:3])) == 1 and names[3] != names[0]
    assert group_label(names[3]) == group_label(names[0])
