"""Blocks on a GPU are where a plain model has them, and nothing but events orders the streams.

Without a GPU, `racing_streams` stands for it: late, wild, and strict about what is not ordered.
"""

import contextlib
import gc
import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from racing_cuda import racing_streams
from racing_streams import Event, Machine, Race

from onecast.runtime import cuda_mover
from onecast.runtime.cuda_mover import CudaMover
from onecast.runtime.kv_cache import CacheSpec, KVCache
from onecast.runtime.swap_choice import COPIES, KERNEL, Cost, SwapChoice

CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BLOCKS, HOST_BLOCKS = 24, 16
Pair = tuple[int, int]


def as_pairs(pairs: list[Pair]) -> np.ndarray[Any, Any]:
    return np.array(pairs, dtype=np.int64).reshape(len(pairs), 2)


def make_cache(device: str, head_dim: int, make_mover: Any) -> KVCache:
    """With blocks of 8 bytes for each of `head_dim`."""
    return KVCache(
        CacheSpec(num_layers=1, num_kv_heads=1, head_dim=head_dim, dtype=torch.float32),
        num_blocks=BLOCKS,
        num_host_blocks=HOST_BLOCKS,
        block_size=1,
        device=device,
        make_mover=make_mover,
    )


class Plans:
    """Steps as a driver makes them, and which newest swap each has to wait for."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.step = -1
        self._swapped: dict[int, int] = {}  # device block: the step of its last swap

    def next(self) -> "Plan":
        """At random, by the rules of `block_ops.py`."""
        self.step += 1
        rng = self.rng
        device, host = list(range(BLOCKS)), list(range(HOST_BLOCKS))
        rng.shuffle(device)
        rng.shuffle(host)
        busy = rng.random() < 0.6
        outs, ins, copies = (rng.randrange(4) if busy else 0 for _ in range(3))
        if rng.random() < 0.3:  # neighbours: one run
            first, to = rng.randrange(BLOCKS - 4), rng.randrange(HOST_BLOCKS - 4)
            swap_out = [(first + i, to + i) for i in range(outs)]
        else:
            swap_out = [(device.pop(), host.pop()) for _ in range(outs)]
        filled_host = {to for _, to in swap_out}
        sources = [block for block in host if block not in filled_host]
        # A swap-in may land where a swap-out read: it comes later on the same stream.
        targets = rng.sample(range(BLOCKS), ins)
        swap_in = list(zip(sources[:ins], targets, strict=False))
        rest = [block for block in range(BLOCKS) if block not in targets]
        rng.shuffle(rest)
        copy = [(rest.pop(), rest.pop()) for _ in range(copies)]
        if rng.random() < 0.7:  # else blocks that were swapped just now may be used at once
            known = [block for block in range(BLOCKS) if self._swapped.get(block, -1) < self.step]
        else:
            known = list(range(BLOCKS))
        used = rng.sample(known, 3)
        reads, writes = used[:2], used[2:]
        for block, _ in swap_out:
            self._swapped[block] = self.step
        for _, block in swap_in:
            self._swapped[block] = self.step
        touched = [*reads, *writes, *(block for pair in copy for block in pair)]
        awaited = max(self._swapped.get(block, -1) for block in touched)
        return Plan(self.step, swap_out, swap_in, copy, reads, writes, awaited)


class Plan:
    def __init__(
        self,
        step: int,
        swap_out: list[Pair],
        swap_in: list[Pair],
        copy: list[Pair],
        reads: list[int],
        writes: list[int],
        awaited: int,
    ) -> None:
        self.step, self.awaited = step, awaited
        self.swap_out, self.swap_in, self.copy = swap_out, swap_in, copy
        self.reads, self.writes = reads, writes

    def apply(self, cache: KVCache) -> None:
        pairs = {name: as_pairs(getattr(self, name)) for name in ("swap_out", "swap_in", "copy")}
        cache.apply({"step": self.step, "swaps_awaited": self.awaited, **pairs})


class Model:
    """The two pools as rows of numbers, moved at once."""

    def __init__(self, device: torch.Tensor, host: torch.Tensor) -> None:
        self.device, self.host = (np.array(rows.tolist(), np.uint8) for rows in (device, host))

    def apply(self, plan: Plan) -> np.ndarray[Any, Any]:
        """What the step's forward reads."""
        for source, to in plan.swap_out:
            self.host[to] = self.device[source]
        for source, to in plan.swap_in:
            self.device[to] = self.host[source]
        for source, to in plan.copy:
            self.device[to] = self.device[source]
        read = self.device[plan.reads].copy()
        self.device[plan.writes] = plan.step % 251
        return read


class Bench:
    """A mover over pools that the machine has, and a forward in the current stream."""

    def __init__(self, machine: Machine, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if way != COPIES:
            kernels = pytest.importorskip("onecast.runtime.kernels", exc_type=ImportError)
            monkeypatch.setattr(kernels, "move_rows", machine.move_rows)
        else:
            monkeypatch.setattr(cuda_mover, "_load_kernel", lambda device, host: None)
        self.machine = machine
        self.cache = make_cache("cpu", 5, lambda *rows: self._make_mover(*rows, way))
        machine.finish()
        self.model = Model(self.device, self.host)
        self.forwards: list[tuple[list[Any], np.ndarray[Any, Any]]] = []

    def _make_mover(self, device: torch.Tensor, host: torch.Tensor, way: str) -> CudaMover:
        self.machine.adopt(device, "device block")
        self.machine.adopt(host, "host block")
        self.machine.homes[device.untyped_storage().data_ptr()] = "default"
        numbers = np.random.default_rng(0)
        for rows in (device, host):
            rows.copy_(torch.from_numpy(numbers.integers(0, 256, rows.shape, dtype=np.uint8)))
        self.device, self.host = device, host
        self.mover = CudaMover(device, host, way)
        return self.mover

    def run(self, plan: Plan) -> None:
        plan.apply(self.cache)
        found: list[Any] = []
        rows = [self.machine.rows(self.device[block : block + 1])[0] for block in range(BLOCKS)]

        def forward() -> None:
            found.append(np.asarray(self.device[plan.reads].tolist()))
            for block in plan.writes:
                self.device[block] = plan.step % 251

        reads, writes = ([rows[block] for block in of] for of in (plan.reads, plan.writes))
        self.machine.submit(reads, writes, forward, f"forward {plan.step}")
        self.forwards.append((found, self.model.apply(plan)))

    def check(self) -> None:
        self.machine.finish()
        for step, (found, expected) in enumerate(self.forwards):
            np.testing.assert_array_equal(found[0], expected, f"forward {step}")
        np.testing.assert_array_equal(np.asarray(self.device.tolist()), self.model.device)
        np.testing.assert_array_equal(np.asarray(self.host.tolist()), self.model.host)
        self.forwards.clear()


@contextlib.contextmanager
def bench(seed: int, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    machine = Machine(seed)
    with racing_streams(machine):
        made = Bench(machine, way, monkeypatch)
        try:
            yield made
        finally:
            machine.abandon()
            made.mover.close()


WAY = pytest.mark.parametrize("way", [COPIES, KERNEL, "auto"])


@WAY
@pytest.mark.parametrize("ahead", [1, 8, 300])
def test_however_late_the_gpu_is_blocks_are_where_the_plans_want_them(
    way: str, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ahead`: steps that the host is ahead at most."""
    with bench(ahead, way, monkeypatch) as made:
        plans = Plans(ahead)
        for number in range(1200):
            made.run(plans.next())
            made.machine.tick(made.machine.rng.randrange(8))
            if number % ahead == 0:
                made.check()
        made.check()


@WAY
@pytest.mark.parametrize("deaf", ["default", "side 1"])
def test_a_wait_that_is_missing_is_a_race(
    way: str, deaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the forward for swaps, and of swaps for the forward before."""
    with bench(0, way, monkeypatch) as made:
        made.machine.deaf.add(deaf)
        plans = Plans(0)
        with pytest.raises(Race, match="device block"):
            for _ in range(200):
                made.run(plans.next())
                made.machine.tick(4)


def test_a_wait_for_too_old_a_step_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = CudaMover.wait
    monkeypatch.setattr(CudaMover, "wait", lambda self, step: wait(self, step - 1))
    with bench(0, COPIES, monkeypatch) as made, pytest.raises(Race, match="device block"):
        plans = Plans(0)
        for _ in range(300):
            made.run(plans.next())
            made.machine.tick(4)


def test_pairs_that_are_written_over_before_they_are_read_are_a_race(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bench(0, KERNEL, monkeypatch) as made:
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
        with pytest.raises(Race, match="page-locked pairs"):
            for step in range(60):
                made.mover.swap_out(step, as_pairs([(step % 3, step % 5)]))
            made.machine.finish()


@WAY
def test_any_stream_may_be_current(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with bench(1, way, monkeypatch) as made:
        machine, plans = made.machine, Plans(1)
        default, user = machine.current, machine.stream("user")
        made.device.record_stream(user)  # as a program does whose pool was made on another
        for number in range(600):
            stream, other = (user, default) if machine.rng.random() < 0.5 else (default, user)
            stream.wait_stream(other)  # the program's own order
            with torch.cuda.stream(stream):
                made.run(plans.next())
            machine.tick(machine.rng.randrange(8))
            if number % 50 == 0:
                made.check()
        made.check()


def test_the_sequence_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours in one copy; two events and two waits for each swap, one for the forward."""
    with bench(0, COPIES, monkeypatch) as made:
        log = made.machine.log
        log.clear()
        made.mover.swap_out(4, as_pairs([(7, 2), (3, 9), (8, 3), (9, 4)]))
        made.mover.swap_in(4, as_pairs([(0, 7)]))
        assert log == [
            "event on default",
            "side 1 waits for default",
            "copy of 1 on side 1",
            "copy of 3 on side 1",
            "event on side 1",
            "event on default",
            "side 1 waits for default",
            "copy of 1 on side 1",
            "event on side 1",
        ]
        log.clear()
        made.mover.wait(3)
        assert log == []
        made.mover.wait(4)
        assert log == ["default waits for side 1"]
        made.machine.finish()
        log.clear()
        made.mover.wait(4)
        assert log == []  # over: nothing to wait for


def test_a_wait_passes_over_what_is_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 5's blocks are not held up by the swaps of step 7."""
    with bench(0, COPIES, monkeypatch) as made:
        made.mover.swap_out(5, as_pairs([(1, 1)]))
        side = made.machine.streams[1]
        older = side.put
        made.mover.swap_out(7, as_pairs([(2, 2)]))
        made.mover.wait(6)
        assert made.machine.current.clock["side 1"] == older
        made.mover.wait(7)
        assert made.machine.current.clock["side 1"] == side.put > older


def test_a_step_that_falls_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench(0, COPIES, monkeypatch) as made:
        made.mover.swap_out(5, as_pairs([(1, 1)]))
        with pytest.raises(AssertionError, match="step 4 after step 5"):
            made.mover.swap_in(4, as_pairs([(1, 1)]))


@WAY
def test_events_are_used_again(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even of a host that is never held up: only so many steps' swaps are under way."""
    with bench(0, way, monkeypatch) as made:
        plans = Plans(0)
        for _ in range(1000):
            plans.next().apply(made.cache)
        most = cuda_mover._MOST_PENDING
        assert len(made.mover._pending) + len(made.mover._spare) <= most
        assert made.machine.events_made <= most + 12
        side = made.machine.streams[1]
        assert side.put - side.done <= most * 14


def test_the_host_does_not_wait_for_pairs_to_be_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench(0, KERNEL, monkeypatch) as made:
        made.machine.log.clear()
        for step in range(8):
            made.mover.swap_out(step, as_pairs([(1, 1)]))
        assert "the host waits" not in made.machine.log


def test_a_long_list_gets_a_longer_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    from onecast.runtime import pair_uploads

    monkeypatch.setattr(pair_uploads, "_PAIRS", 1)
    with bench(3, KERNEL, monkeypatch) as made:
        plans = Plans(3)
        for _ in range(300):
            made.run(plans.next())
        made.check()


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here three copies cost what the kernel costs."""
    with bench(0, "auto", monkeypatch) as made:
        choice = SwapChoice(copies=Cost(0.0, 1.0, 0.0), kernel=Cost(3.0, 0.0, 0.0))
        made.mover._choices = {cuda_mover.OUT: choice, cuda_mover.IN: choice}
        for step, pairs, said in (
            (0, [(i, i) for i in range(9)], "copy of 9"),
            (1, [(2 * i, i) for i in range(3)], "copy of 1"),
            (2, [(2 * i, i) for i in range(4)], "kernel of 4"),
        ):
            for move in (made.mover.swap_out, made.mover.swap_in):
                made.machine.log.clear()
                move(step, as_pairs(pairs))
                moved = [line for line in made.machine.log if line.startswith(("copy", "kernel"))]
                assert moved[0] == f"{said} on side 1"


def test_what_it_costs_is_measured_once_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, cuda_mover.__name__), bench(0, "auto", monkeypatch) as made:
        lines = [record.getMessage() for record in caplog.records]
        assert [line.partition(": copies ")[0] for line in lines] == ["swap out", "swap in"]
        moves = [line for line in made.machine.log if line.startswith(("copy", "kernel"))]
        sizes = ["copy of 1", f"copy of {HOST_BLOCKS}", *["copy of 1"] * HOST_BLOCKS]
        sizes += ["kernel of 1", f"kernel of {HOST_BLOCKS}"]
        assert moves[1 : 1 + len(sizes)] == [f"{size} on side 1" for size in sizes]
        # Every block came back as it was: the same numbers on both sides, out and then in.
        measured = min(BLOCKS, HOST_BLOCKS)
        assert torch.equal(made.device[:measured], made.host[:measured])


def test_a_pool_that_goes_while_a_swap_is_under_way_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bench(0, COPIES, monkeypatch) as made:
        for step in range(5):
            made.mover.swap_out(step, as_pairs([(1, 1)]))
        side = made.machine.streams[1]
        made.mover = CudaMover(made.device, made.host, COPIES)  # beside the cache's
        assert side.queue
        made.cache = None
        gc.collect()
        assert not side.queue


def test_close_waits_for_what_is_under_way_and_may_come_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bench(0, COPIES, monkeypatch) as made:
        made.mover.swap_out(0, as_pairs([(1, 1)]))
        made.mover.close()
        assert not made.machine.streams[1].queue
        made.mover.close()


# ---- what is missing


def test_without_triton_copies_do_it_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onecast.runtime.kernels", None)
    machine = Machine(0)
    device, host = (torch.zeros(4, 8, dtype=torch.uint8) for _ in range(2))
    with racing_streams(machine):
        machine.adopt(device, "device block")
        machine.adopt(host, "host block")
        mover = CudaMover(device, host)
        assert "blocks are moved by copies alone" in caplog.text
        machine.log.clear()
        mover.copy(as_pairs([(0, 2), (1, 3)]))
        assert machine.log == ["copy of 2 on default"]
        with pytest.raises(ValueError, match="way 'kernel' needs Triton and a page-locked host"):
            CudaMover(device, host, "kernel")
        mover.close()


def test_a_kernel_that_cannot_be_compiled_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = pytest.importorskip("onecast.runtime.kernels", exc_type=ImportError)

    def move_rows(*arguments: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "move_rows", move_rows)
    with racing_streams(Machine(0)):
        device, host = (torch.zeros(4, 8, dtype=torch.uint8) for _ in range(2))
        CudaMover(device, host).close()
    assert "Failed to find C compiler" in caplog.text


def test_a_host_pool_that_is_not_page_locked_is_left_to_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = pytest.importorskip("onecast.runtime.kernels", exc_type=ImportError)
    machine = Machine(0)
    monkeypatch.setattr(kernels, "move_rows", machine.move_rows)
    with racing_streams(machine):
        device, host = (torch.zeros(4, 8, dtype=torch.uint8) for _ in range(2))
        machine.adopt(device, "device block")
        machine.recorded.add((device.untyped_storage().data_ptr(), "side 1"))
        mover = CudaMover(device, host)  # nobody adopted the host's: it is not page-locked
        assert mover._way == COPIES
        machine.adopt(host, "host block")
        machine.log.clear()
        mover.swap_out(0, as_pairs([(0, 0), (2, 1)]))
        assert machine.log.count("copy of 1 on side 1") == 2
        mover.wait(0)
        mover.copy(as_pairs([(0, 2), (1, 3)]))
        assert machine.log[-1] == "kernel of 2 on default"  # within the device it still is best
        mover.close()


def test_an_empty_host_pool_is_no_reason_to_do_without_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = pytest.importorskip("onecast.runtime.kernels", exc_type=ImportError)
    machine = Machine(0)
    monkeypatch.setattr(kernels, "move_rows", machine.move_rows)
    with racing_streams(machine):
        device, host = (torch.zeros(count, 8, dtype=torch.uint8) for count in (4, 0))
        machine.adopt(device, "device block")
        mover = CudaMover(device, host)
        mover.copy(as_pairs([(0, 2), (1, 3)]))
        assert machine.log[-1] == "kernel of 2 on default"
        mover.close()


def test_a_way_that_is_none_is_refused() -> None:
    rows = torch.zeros(1, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="way 'fast' is none of auto, copies, kernel"):
        CudaMover(rows, rows, "fast")


# ---- on a GPU


@pytest.mark.parametrize("way", [pytest.param(way, marks=CUDA) for way in (COPIES, KERNEL, "auto")])
@pytest.mark.parametrize("stream", ["default", "user"])
def test_random_steps_on_a_gpu(way: str, stream: str) -> None:
    """Blocks large enough for swaps to be under way while the forward runs."""
    with contextlib.ExitStack() as stack:
        if stream == "user":
            torch.cuda.synchronize()
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        cache = make_cache("cuda", 1 << 17, lambda *rows: CudaMover(*rows, way))
        pools = (cache.device_pool, cache.host_pool)
        device, host = (pool.view(len(pool), -1).view(torch.uint8) for pool in pools)
        device.copy_(torch.arange(BLOCKS)[:, None])
        host.copy_(100 + torch.arange(HOST_BLOCKS)[:, None])
        torch.cuda.synchronize()
        model, plans = Model(device[:, :1], host[:, :1]), Plans(7)
        for number in range(400):
            plan = plans.next()
            plan.apply(cache)
            # No indexing by lists: the host would wait for their upload, and so for the stream.
            read = torch.stack([device[block, :1] for block in plan.reads])
            for block in plan.writes:
                device[block].fill_(plan.step % 251)
            expected = model.apply(plan)
            if number % 20 == 0:
                assert (read.cpu().numpy() == expected).all()
        cache.close()
        torch.cuda.synchronize()
        assert (device.cpu().numpy() == model.device).all()
        assert (host.numpy() == model.host).all()
