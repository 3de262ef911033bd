"""What a torch.distributed program can do, case by case, on two Gloo ranks.

A case issues its operations once; `EXPECTED` says what must have been recorded of it, in order of
begin: operation, bytes, error. x has 16 bytes, a pair of them 32.
"""

import datetime
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed import all_reduce as all_reduce_by_name  # before anything is patched
from torch.distributed import distributed_c10d


@dataclass(frozen=True)
class World:
    rank: int
    named: Any  # a group of both, of the description "tp"

    @property
    def x(self) -> torch.Tensor:
        return torch.ones(4)

    @property
    def pair(self) -> torch.Tensor:
        return torch.ones(8)

    @property
    def parts(self) -> list[torch.Tensor]:
        return [torch.empty(4), torch.empty(4)]


Recorded = list[tuple[str, int, str | None]]
CASES: dict[str, tuple[Callable[[World], None], list[Recorded]]] = {}


def case(*recorded: Any, rank_1: Recorded | None = None) -> Callable[[Any], Any]:
    """`recorded`: (operation, bytes) or (operation, bytes, error) of rank 0, and of 1 if alike."""

    def add(function: Callable[[World], None]) -> Callable[[World], None]:
        first = [(*one, None)[:3] for one in recorded]
        second = first if rank_1 is None else [(*one, None)[:3] for one in rank_1]
        CASES[function.__name__] = function, [first, second]  # type: ignore[assignment]
        return function

    return add


@case(("all_reduce", 16))
def all_reduce(world: World) -> None:
    dist.all_reduce(world.x)


@case(("all_reduce", 16))
def all_reduce_async(world: World) -> None:
    dist.all_reduce(world.x, async_op=True).wait()


@case(("all_reduce", 16), ("all_reduce", 32))
def async_waited_for_in_another_order(world: World) -> None:
    first = dist.all_reduce(world.x, async_op=True)
    second = dist.all_reduce(world.pair, async_op=True)
    second.wait()
    first.wait()


@case(("all_reduce", 16))
def async_future(world: World) -> None:
    dist.all_reduce(world.x, async_op=True).get_future().wait()


@case(("all_reduce", 16))
def async_polled(world: World) -> None:
    work = dist.all_reduce(world.x, async_op=True)
    while not work.is_completed():
        pass
    work.wait()


@case(("all_reduce", 8))
def all_reduce_complex(world: World) -> None:
    dist.all_reduce(torch.ones(1, dtype=torch.complex64))


@case(("broadcast", 16))
def broadcast(world: World) -> None:
    dist.broadcast(world.x, 0)


@case(("reduce", 16))
def reduce(world: World) -> None:
    dist.reduce(world.x, 0)


@case(("all_gather", 32))
def all_gather(world: World) -> None:
    dist.all_gather(world.parts, world.x)


@case(("all_gather_into_tensor", 32))
def all_gather_into_tensor(world: World) -> None:
    dist.all_gather_into_tensor(world.pair, world.x)


@case(("reduce_scatter", 32))
def reduce_scatter(world: World) -> None:
    dist.reduce_scatter(world.x, [world.x, world.x])


@case(("reduce_scatter_tensor", 32))
def reduce_scatter_tensor(world: World) -> None:
    dist.reduce_scatter_tensor(world.x, world.pair)


@case(("all_to_all", 32))
def all_to_all(world: World) -> None:
    dist.all_to_all(world.parts, [world.x, world.x])


@case(("all_to_all_single", 32))
def all_to_all_single(world: World) -> None:
    dist.all_to_all_single(torch.empty(8), world.pair)


@case(("all_to_all_single", 16), rank_1=[("all_to_all_single", 32)])
def all_to_all_single_uneven(world: World) -> None:
    sent = [[1, 3], [5, 3]][world.rank]
    got = [[1, 5], [3, 3]][world.rank]
    dist.all_to_all_single(torch.empty(sum(got)), torch.ones(sum(sent)), got, sent)


@case(("gather", 32))
def gather(world: World) -> None:
    dist.gather(world.x, world.parts if world.rank == 0 else None, 0)


@case(("scatter", 32))
def scatter(world: World) -> None:
    dist.scatter(torch.empty(4), [world.x, world.x] if world.rank == 0 else None, 0)


@case(("barrier", 0))
def barrier(world: World) -> None:
    dist.barrier()


@case(("monitored_barrier", 0))
def monitored_barrier(world: World) -> None:
    dist.monitored_barrier()


@case(("send", 16), ("recv", 32), rank_1=[("recv", 16), ("send", 32)])
def send_recv(world: World) -> None:
    if world.rank == 0:
        dist.send(world.x, 1)
        dist.recv(torch.empty(8), 1)
    else:
        dist.recv(torch.empty(4), 0)
        dist.send(world.pair, 0)


@case(("send", 16), rank_1=[("recv", 16)])
def recv_from_anybody(world: World) -> None:
    if world.rank == 0:
        dist.send(world.x, 1)
    else:
        dist.recv(torch.empty(4))


@case(("send", 16), rank_1=[("recv", 16)])
def isend_irecv(world: World) -> None:
    work = dist.isend(world.x, 1) if world.rank == 0 else dist.irecv(torch.empty(4), 0)
    assert work is not None
    work.wait()


@case(("send", 16), ("recv", 16))
def batch_isend_irecv(world: World) -> None:
    other = 1 - world.rank
    operations = [
        dist.P2POp(dist.isend, world.x, other), dist.P2POp(dist.irecv, torch.empty(4), other)
    ]  # fmt: skip
    for work in dist.batch_isend_irecv(operations):
        work.wait()


@case(("all_gather", 16), ("all_gather", None))
def all_gather_object(world: World) -> None:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, {"rank": world.rank})
    assert found == [{"rank": 0}, {"rank": 1}]


@case(("broadcast", 8), ("broadcast", None))
def broadcast_object_list(world: World) -> None:
    dist.broadcast_object_list(["text"], 0)


@case(("all_gather", 16), ("gather", None))
def gather_object(world: World) -> None:
    dist.gather_object("text", [None, None] if world.rank == 0 else None, 0)


@case(("broadcast", 8), ("scatter", None), ("scatter", 16))
def scatter_object_list(world: World) -> None:
    found: list[Any] = [None]
    dist.scatter_object_list(found, ["a", "b"] if world.rank == 0 else [None, None], 0)
    assert found == ["ab"[world.rank]]


@case(("all_reduce_coalesced", 48))
def coalesced_all_reduces(world: World) -> None:
    with distributed_c10d._coalescing_manager():
        dist.all_reduce(world.x)
        dist.all_reduce(world.pair)


@case(("all_gather_into_tensor_coalesced", 64))
def coalesced_all_gathers(world: World) -> None:
    with distributed_c10d._coalescing_manager(async_ops=True) as manager:
        dist.all_gather_into_tensor(world.pair, world.x)
        dist.all_gather_into_tensor(world.pair, world.x)
    manager.wait()


@case(("reduce_scatter_tensor_coalesced", 64))
def coalesced_reduce_scatters(world: World) -> None:
    with distributed_c10d._coalescing_manager():
        dist.reduce_scatter_tensor(world.x, world.pair)
        dist.reduce_scatter_tensor(world.x, world.pair)


@case(("all_reduce", 16), ("barrier", 0))
def sub_group(world: World) -> None:
    dist.all_reduce(world.x, group=world.named)
    dist.barrier(group=world.named)


@case(("all_reduce", 16))
def imported_before(world: World) -> None:
    all_reduce_by_name(world.x)


@case(("all_reduce", 16))
def another_thread(world: World) -> None:
    thread = threading.Thread(target=dist.all_reduce, args=(world.x,))
    thread.start()
    thread.join()


@case(("all_reduce", 16))
def inference_mode(world: World) -> None:
    with torch.inference_mode():
        dist.all_reduce(torch.ones(4))


@case(("all_reduce", 16), ("all_reduce", 16), ("all_reduce", 16), ("broadcast", 16))
def group_called_directly(world: World) -> None:
    world.named.allreduce([world.x]).wait()
    world.named.allreduce(world.x, dist.ReduceOp.SUM).wait()
    world.named.allreduce(tensors=[world.x], opts=dist.AllreduceOptions()).wait()
    world.named.broadcast(tensor=world.x, root=0).wait()


@case(("all_reduce", 16), ("all_gather_into_tensor", 32))
def backend_called_directly(world: World) -> None:
    backend = world.named._get_backend(torch.device("cpu"))
    backend.allreduce([world.x]).wait()
    backend._allgather_base(world.pair, world.x).wait()


@case(("all_reduce", 16))
def functional_all_reduce(world: World) -> None:
    functional.all_reduce(world.x, "sum", world.named).numpy()


@case(("all_reduce", 16))
def functional_all_reduce_waited_for(world: World) -> None:
    functional.wait_tensor(functional.all_reduce(world.x, "sum", world.named))


@case(("all_reduce", 16))
def functional_in_place(world: World) -> None:
    operators = torch.ops._c10d_functional
    operators.wait_tensor(operators.all_reduce_(world.x, "sum", world.named.group_name))


@case(("all_gather_into_tensor", 32))
def functional_all_gather(world: World) -> None:
    functional.all_gather_tensor(world.x, 0, world.named).numpy()


@case(("reduce_scatter_tensor", 32))
def functional_reduce_scatter(world: World) -> None:
    functional.reduce_scatter_tensor(world.pair, "sum", 0, world.named).numpy()


@case(("all_to_all_single", 32))
def functional_all_to_all(world: World) -> None:
    functional.all_to_all_single(world.pair, [4, 4], [4, 4], world.named).numpy()


@case(("broadcast", 16))
def functional_broadcast(world: World) -> None:
    functional.broadcast(world.x, 0, world.named).numpy()


@case(("all_reduce_coalesced", 48))
def functional_coalesced(world: World) -> None:
    for one in functional.all_reduce_coalesced([world.x, world.pair], "sum", world.named):
        one.numpy()


@case(("all_gather_into_tensor", 32))
def functional_with_gradient(world: World) -> None:
    x = torch.ones(4, requires_grad=True)
    functional.all_gather_tensor_autograd(x, 0, world.named).detach().numpy()


@case(("scatter", 32), ("all_gather_into_tensor", 32))
def dtensor(world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    distributed = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
    distributed.redistribute(mesh, [Replicate()]).to_local().numpy()


@case(("all_reduce", 16))
def compiled(world: World) -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def double(x: torch.Tensor) -> torch.Tensor:
        return functional.all_reduce(x * 2, "sum", world.named.group_name) + 1

    assert double(torch.ones(4)).tolist() == [5.0] * 4


@case(("broadcast_coalesced", 48))
def module_states_broadcast_from_c_plus_plus(world: World) -> None:
    dist._broadcast_coalesced(world.named, [world.x, world.pair], 1 << 20, 0)


@case(("all_reduce", 0, "NotImplementedError"), ("all_reduce", 0, "TypeError"))
def refused(world: World) -> None:
    for wrong in ([], "no tensor"):
        try:
            world.named.allreduce(wrong)
        except (NotImplementedError, TypeError):
            pass
        else:
            raise AssertionError(f"{wrong!r} was taken")


@case(("all_reduce", 16))
def timed_out_and_waited_for_again(world: World) -> None:
    other = threading.Event()
    if world.rank == 1:
        other.wait(0.5)
    work = dist.all_reduce(world.x, async_op=True)
    while True:
        try:
            work.wait(datetime.timedelta(milliseconds=50))
        except RuntimeError:
            assert not work.is_completed()
        else:
            break


@case(("recv", 16, "RuntimeError"), rank_1=[])
def failed(world: World) -> None:
    """Last: it breaks the pair of the two ranks."""
    if world.rank == 0:
        group = distributed_c10d._get_default_group()
        try:
            group.recv([world.x], 1, 5).wait(datetime.timedelta(milliseconds=300))
        except RuntimeError:
            return
        raise AssertionError("nobody has sent anything")
