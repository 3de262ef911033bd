"""The step queues of vLLM and SGLang beside onecast's channel: one mapping, two ranks, in turns.

Owns how their queue is found, opened and spoken to. Both publish the same face, of which this asks
for no more than

    MessageQueue.create_from_process_group(group, max_chunk_bytes, max_chunks)    a collective call
    .enqueue(object)     on rank 0          .dequeue() -> object     on the others

vLLM: vllm/distributed/device_communicators/shm_broadcast.py; SGLang: the file of that name under
sglang/srt, which is taken from it. They pickle what they are given, so that tensors and the same
values as numpy arrays cost differently: both are measured. Their readers spin, which the exchanges
of `exchanges.py` give every method its chance to do.

Not yet run with either package, but with stand-ins that have this face.
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from onecast.comm.testing import run_ranks

from .exchanges import Exchanges, tight_turns
from .method import Method
from .methods import SHM, SPINNING, open_methods
from .shared_page import Gate
from .workloads import make_workload

MODULES = {
    "vllm": "vllm.distributed.device_communicators.shm_broadcast",
    "sglang": "sglang.srt.distributed.device_communicators.shm_broadcast",
}
WORKLOAD = "W2"
TENSORS, ARRAYS = "tensors", "numpy arrays"

_CHUNK_BYTES, _CHUNKS = 10 << 20, 10  # the defaults of both
_UNTIMED = 20


class Way(NamedTuple):
    """`peer` None: onecast's own channel."""

    peer: str | None
    how: str

    @property
    def name(self) -> str:
        return self.how if self.peer is None else f"{self.peer} {self.how}"


OWN = (Way(None, SHM), Way(None, SPINNING))


class QueueMethod(Method):
    """One of their queues, carrying the mapping as tensors or as arrays. A collective call."""

    def __init__(self, way: Way, group: dist.ProcessGroup) -> None:
        assert way.peer is not None
        self.name = way.name
        self._as_arrays = way.how == ARRAYS
        module = importlib.import_module(MODULES[way.peer])
        self._queue = module.MessageQueue.create_from_process_group(group, _CHUNK_BYTES, _CHUNKS)

    def prepare(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        if not self._as_arrays:
            return dict(mapping)
        return {
            key: value.numpy() if isinstance(value, torch.Tensor) else value
            for key, value in mapping.items()
        }

    def send(self, mapping: dict[str, Any]) -> None:
        self.messages += 1
        self._queue.enqueue(mapping)

    def receive(self, timeout_s: float | None = None) -> Any:
        return self._queue.dequeue()

    def mapping(self, received: Any) -> Mapping[str, Any]:
        mapping: Mapping[str, Any] = received
        return mapping


def missing(peer: str) -> str | None:
    """Why a peer's queue cannot be measured here, in one line; None: it can be tried."""
    package = MODULES[peer].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install {package})"
    return None


def launch(peer: str, steps: int, timeout_s: float = 600.0) -> dict[Way, list[float]]:
    """Microseconds one way of so many exchanges, of the peer's queue and of onecast's channel.

    Raises onecast.comm.testing.RankFailed where the package is another than this knows.
    """
    sent, received = run_ranks(_measure, 2, peer, steps, timeout_s=timeout_s)
    return {
        way: [(end - begin) / 1e3 for begin, end in zip(begins, received[way][1], strict=True)]
        for way, (begins, _) in sent.items()
    }


def _measure(rank: int, peer: str, steps: int) -> dict[Way, tuple[list[int], list[int]]]:
    """Begins and ends of the timed exchanges on this rank."""
    gate = Gate()
    mapping = make_workload(WORKLOAD)
    group = dist.new_group(group_desc="queue")
    assert group is not None
    ways: Sequence[Way] = (*OWN, *(Way(peer, how) for how in (TENSORS, ARRAYS)))
    methods = open_methods(tuple(way.name for way in OWN), mapping)
    methods |= {way.name: QueueMethod(way, group) for way in ways if way.peer is not None}
    exchanges = Exchanges(rank, gate, methods, mapping, _UNTIMED)
    stamps = exchanges.run(tight_turns([way.name for way in ways], steps))
    for method in methods.values():
        method.close()
    return {way: (stamps[way.name].begins, stamps[way.name].ends) for way in ways}
