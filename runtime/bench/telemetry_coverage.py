"""How many of the collectives that two ranks issue are recorded, by the groups' own numbers.

Owns the program: every operation of torch.distributed that Gloo has, in each way it can be called
(by name, asynchronously, coalesced, as a functional collective, from another thread, in a
sub-group), one case at a time. A group's sequence number moves with what is really issued,
whoever does; the ring is read as the sidecar would.

A reduce_scatter is two operations to Gloo: one record stands for two of its numbers.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed import all_reduce as imported_all_reduce  # before the instrumentation

from onecast.comm.testing import run_ranks
from onecast.telemetry import TelemetrySettings, start_session
from onecast.telemetry.ring import COLLECTIVE, META
from onecast.telemetry.ring_reader import RingReader
from onecast.telemetry.run_directory import ring_path

_RANKS = 2


class Case(NamedTuple):
    name: str
    issued: int  # by the groups' own numbers
    recorded: int  # rows


def measure_coverage(rounds: int) -> list[Case]:
    """One row per case and rank."""
    ranks = run_ranks(_program, _RANKS, rounds, timeout_s=180.0)
    return [case for rank in ranks for case in rank]


def coverage(cases: Sequence[Case]) -> float:
    """Of what was issued, how much is recorded: 0 to 1."""
    return sum(min(case.recorded, case.issued) for case in cases) / sum(
        case.issued for case in cases
    )


def _program(rank: int, rounds: int) -> list[Case]:
    pairs = dist.new_group([0, 1], group_desc="pair")
    assert pairs is not None
    session = start_session(
        rank=rank, local_rank=rank, world_size=_RANKS, local_world_size=_RANKS,
        engine_id="bench-coverage", settings=TelemetrySettings(metrics_port=None, trace_one_in=0),
    )  # fmt: skip
    found = []
    # What is deprecated must be seen all the same.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        assert session.run_dir is not None, "nothing is recorded"
        reader = RingReader(ring_path(session.run_dir, rank))
        groups: list[Any] = [dist.group.WORLD, pairs]
        for name, run in _cases(rank, pairs):
            dist.barrier()
            _recorded(reader)
            before = [group._get_sequence_number_for_group() for group in groups]
            for _ in range(rounds):
                run()
            issued = sum(
                group._get_sequence_number_for_group() - number
                for group, number in zip(groups, before, strict=True)
            )
            per_call = 2 if name == "reduce_scatter" else 1
            found.append(Case(name, issued // per_call, _recorded(reader)))
        dist.barrier()
    finally:
        session.close()
    return found


def _recorded(reader: RingReader) -> int:
    """Collectives that have ended since the last look."""
    return int(np.count_nonzero((reader.drain().rows[:, META] & 0xF) == COLLECTIVE))


def _cases(rank: int, pair: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    other = 1 - rank
    one, two = torch.ones(64), torch.ones(128)
    parts = [torch.ones(64) for _ in range(_RANKS)]
    objects: list[Any] = [None] * _RANKS

    def waited(work: Any) -> None:
        work.wait()

    yield "all_reduce", lambda: dist.all_reduce(one)
    yield "all_reduce, async_op", lambda: waited(dist.all_reduce(one, async_op=True))
    yield "all_reduce, of a name imported before", lambda: imported_all_reduce(one)
    yield "all_reduce, of a sub-group", lambda: dist.all_reduce(one, group=pair)
    yield "all_reduce, of the group itself", lambda: waited(pair.allreduce([one]))
    backend = pair._get_backend(torch.device("cpu"))
    yield "all_reduce, of its backend", lambda: waited(backend.allreduce([one]))

    def in_a_thread() -> None:
        thread = threading.Thread(target=dist.all_reduce, args=(one,))
        thread.start()
        thread.join()

    def in_inference_mode() -> None:
        with torch.inference_mode():
            dist.all_reduce(torch.ones(64))

    yield "all_reduce, of another thread", in_a_thread
    yield "all_reduce, in inference mode", in_inference_mode
    yield "broadcast", lambda: dist.broadcast(one, src=0)
    yield "reduce", lambda: dist.reduce(one, dst=0)
    yield "all_gather", lambda: dist.all_gather(parts, one)
    yield "all_gather_into_tensor", lambda: dist.all_gather_into_tensor(two, one)
    yield "reduce_scatter", lambda: dist.reduce_scatter(one, parts)
    yield "reduce_scatter_tensor", lambda: dist.reduce_scatter_tensor(one, two)
    yield "all_to_all_single", lambda: dist.all_to_all_single(two, torch.ones(128))
    yield "gather", lambda: dist.gather(one, parts if rank == 0 else None, dst=0)
    yield "scatter", lambda: dist.scatter(one, parts if rank == 0 else None, src=0)
    yield "barrier", lambda: dist.barrier()
    yield "all_gather_object", lambda: dist.all_gather_object(objects, {"rank": rank})
    yield "broadcast_object_list", lambda: dist.broadcast_object_list([rank, "x"], src=0)
    yield "gather_object", lambda: dist.gather_object(rank, objects if rank == 0 else None, dst=0)

    def send_and_receive() -> None:
        for sender in range(_RANKS):
            if sender == rank:
                dist.send(one, dst=other)
            else:
                dist.recv(one, src=other)

    def batched() -> None:
        operations = [
            dist.P2POp(dist.isend, torch.ones(64), other),
            dist.P2POp(dist.irecv, torch.ones(64), other),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def coalesced() -> None:
        with dist._coalescing_manager(async_ops=True) as manager:  # type: ignore[attr-defined]
            for _ in range(3):
                dist.all_reduce(torch.ones(64))
        manager.wait()

    yield "send, recv", send_and_receive
    yield "send, recv, batched", batched
    yield "all_reduce, coalesced", coalesced

    world: Any = dist.group.WORLD
    wait: Any = functional.wait_tensor
    yield (
        "all_reduce, functional",
        lambda: wait(functional.all_reduce(one, "sum", world)),
    )
    yield (
        "all_gather_tensor, functional",
        lambda: wait(functional.all_gather_tensor(one, 0, world)),
    )
    yield (
        "reduce_scatter_tensor, functional",
        lambda: wait(functional.reduce_scatter_tensor(two, "sum", 0, world)),
    )
    yield (
        "all_to_all_single, functional",
        lambda: wait(functional.all_to_all_single(two, None, None, world)),
    )
    yield (
        "broadcast, functional",
        lambda: wait(functional.broadcast(one, 0, world)),
    )
