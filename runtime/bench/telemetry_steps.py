"""How much longer a step takes while everything of it is exported: two ranks, 130 collectives.

Owns the step and its launch. Steps with and without the instrumentation take turns, block by block,
in one run; the pauses between the blocks are long enough for the sidecar to have read and sent what
a block left, so that it takes no core from a block without.

    synthetic   5 ms: each `dist.all_reduce` works for 35 us with the GIL released and returns a
                Work, in the place of the group's own method and beneath the interception. Two ranks
                that wait for each other would add what the machine's other cores do to both.
    gloo        the same number of real all_reduces of 16 KiB over Gloo: what two ranks on this
                machine see, with all the noise of their waiting for each other.
    naive       synthetic, with an SDK span and a histogram inline instead

While one runs: a sidecar, every step kept, every span sent by OTLP to a receiver on this host, the
metrics scraped once a second.
"""

import contextlib
import statistics
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.futures import Future

from onecast.comm.testing import run_ranks
from onecast.telemetry import TelemetrySettings, start_session

from .telemetry_naive import Naive
from .telemetry_toggle import Toggle

COLLECTIVES = 130
_BYTES = 16 << 10
_WORK_NS = 35_000
_RANKS = 2
_BATCH = 64
_WARM = 2  # steps of a block that do not count

Blocks = list[list[float]]  # seconds of each step, block by block


class StepPlan(NamedTuple):
    blocks: int  # with, and as many without
    steps: int  # a block
    gloo_blocks: int
    gloo_steps: int
    pause_s: float


class Steps(NamedTuple):
    """Of all ranks: blocks without and with, in pairs of neighbours."""

    without: Blocks
    with_it: Blocks

    @property
    def p50(self) -> float:
        """The median pair's ratio of medians."""
        return statistics.median(
            statistics.median(after) / statistics.median(before)
            for before, after in zip(self.without, self.with_it, strict=True)
        )

    @property
    def p99(self) -> float:
        return _p99(self.with_it) / _p99(self.without)


def _p99(blocks: Blocks) -> float:
    ordered = sorted(one for block in blocks for one in block)
    return ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)]


def measure_steps(plan: StepPlan, endpoint: str, folder: Path) -> dict[str, Steps]:
    """Of the synthetic and the Gloo step, with the sidecar's work going on beside them."""
    address = folder / "metrics_url"
    with _scrapes(address):
        return _join(
            run_ranks(_with_session, _RANKS, plan, endpoint, str(address), timeout_s=600.0)
        )


def measure_naive(plan: StepPlan, endpoint: str) -> dict[str, Steps]:
    """Of the naive one; the receiver is the same."""
    return _join(run_ranks(_with_naive, _RANKS, plan, endpoint, timeout_s=600.0))


def _join(ranks: list[dict[str, Steps]]) -> dict[str, Steps]:
    return {
        name: Steps(
            [block for rank in ranks for block in rank[name].without],
            [block for rank in ranks for block in rank[name].with_it],
        )
        for name in ranks[0]
    }


@contextlib.contextmanager
def _scrapes(address: Path) -> Iterator[None]:
    """Ask for the metrics once a second, as soon as the file says where."""
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(1.0):
            if address.exists():
                with contextlib.suppress(OSError):  # the sidecar has ended
                    urllib.request.urlopen(address.read_text(), timeout=5).read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# ---- on a rank


def _with_session(rank: int, plan: StepPlan, endpoint: str, address: str) -> dict[str, Steps]:
    tensor = torch.ones(_BYTES // 2, dtype=torch.bfloat16)
    found = {}
    gloo = plan._replace(blocks=plan.gloo_blocks, steps=plan.gloo_steps)
    for name, turns in (("synthetic", plan), ("gloo", gloo)):
        with _stand_in() if name == "synthetic" else contextlib.nullcontext():
            toggle = Toggle()
            session = start_session(
                rank=rank, local_rank=rank, world_size=_RANKS, local_world_size=_RANKS,
                engine_id=f"bench-{name}",
                settings=TelemetrySettings(otlp_endpoint=endpoint, trace_one_in=1),
            )  # fmt: skip
            toggle.instrumented()
            if rank == 0 and session.metrics_url is not None:
                Path(address).write_text(session.metrics_url)
            numbers = iter(range(1 << 30))

            def recorded(session: Any = session, numbers: Any = numbers) -> None:
                with session.step(next(numbers), _BATCH), session.phase("model.forward"):
                    _step(tensor)

            try:
                found[name] = _take_turns(turns, lambda: _step(tensor), recorded, toggle.switch)
            finally:
                toggle.switch(True)
                session.close()
    return found


def _with_naive(rank: int, plan: StepPlan, endpoint: str) -> dict[str, Steps]:
    tensor = torch.ones(_BYTES // 2, dtype=torch.bfloat16)
    with _stand_in():
        naive = Naive(endpoint, rank)

        def instrumented() -> None:
            all_reduce = naive.all_reduce
            for _ in range(COLLECTIVES):
                all_reduce(tensor)

        def switch(on: bool) -> None:
            if not on:
                naive.flush()

        try:
            return {"naive": _take_turns(plan, lambda: _step(tensor), instrumented, switch)}
        finally:
            naive.close()


def _step(tensor: torch.Tensor) -> None:
    all_reduce = dist.all_reduce
    for _ in range(COLLECTIVES):
        all_reduce(tensor)


def _take_turns(
    plan: StepPlan,
    without: Callable[[], None],
    with_it: Callable[[], None],
    switch: Callable[[bool], None],
) -> Steps:
    """Both ranks begin a block together; nothing else makes them wait for each other."""
    steps = Steps([], [])
    for number in range(-1, plan.blocks):  # the first pair only warms up
        for on in (True, False) if number % 2 else (False, True):
            switch(False)
            time.sleep(plan.pause_s)
            dist.barrier()
            switch(on)
            block = _block(with_it if on else without, plan.steps)
            if number >= 0:
                (steps.with_it if on else steps.without).append(block)
    switch(False)
    return steps


def _block(step: Callable[[], None], steps: int) -> list[float]:
    now, times = time.perf_counter, []
    for _ in range(_WARM + steps):
        begin = now()
        step()
        times.append(now() - begin)
    return times[_WARM:]


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    """In the place of the group's own all_reduce: work of 35 us that releases the GIL.

    The group's own number moves with it, as it does with a real one, and its documentation is that
    of the method: the interception reads there what to expect.
    """
    group_class: Any = dist.ProcessGroup
    names = ("allreduce", "_get_sequence_number_for_group")
    methods = {name: group_class.__dict__[name] for name in names}
    done: Future[Any] = Future()
    done.set_result(None)
    data = bytes(_bytes_of_work())
    make_work: Any = _distributed_c10d._create_work_from_future  # type: ignore[attr-defined]
    work = zlib.crc32  # releases the GIL above 5 KiB
    calls = 0

    def allreduce(group: Any, tensors: Any, options: Any = None) -> Any:
        nonlocal calls
        calls += 1
        work(data)
        return make_work(done)

    allreduce.__doc__ = methods["allreduce"].__doc__
    for name, stand_in in zip(names, (allreduce, lambda group: calls), strict=True):
        setattr(group_class, name, stand_in)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(group_class, name, method)


def _bytes_of_work() -> int:
    """How many bytes take 35 us in the machine's better moments."""
    size = 1 << 16
    data = bytes(size)
    best = 1 << 62
    deadline = time.perf_counter() + 0.3
    while time.perf_counter() < deadline:
        begin = time.perf_counter_ns()
        zlib.crc32(data)
        best = min(best, time.perf_counter_ns() - begin)
    return max(8 << 10, size * _WORK_NS // best)
