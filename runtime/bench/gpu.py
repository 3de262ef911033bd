"""What a step costs to bring from rank 0 to another rank's GPU.

Owns the methods of that comparison. Run by `onecast gpu-check`, each part as a process of its own;
`--device cpu` takes the same path without a GPU, over Gloo.

    host    over Gloo: shared memory, two levels (each rank pretends to be a host), the process
            group, a prior protocol, one raw broadcast of the frame's bytes
    nccl    the process group, a prior protocol and a raw broadcast over NCCL; shared memory once
            more, to tell the two runs apart. By one rank, to which only the sender's side is left,
            and by 2 and 4 where NCCL lets them meet
    copies  a slot of a page-locked ring to the GPU, see `gpu_copies`

One way is from before `publish` until the mapping is in hand on the device of the last receiver
and its stream has come to an end. Ranks share GPUs where there are fewer of them: a GPU then works
for one process after the other, and a collective takes as long as their turns.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from onecast.comm import Channel, open_channel, peers
from onecast.comm.prior_art import open_prior_channel
from onecast.comm.testing import run_ranks

from .exchanges import Exchanges, Stamps, tight_turns
from .figures import summarize
from .gpu_copies import measure_copies
from .gpu_part import Asked, Results, Row, run_part
from .method import ChannelMethod, Method
from .methods import steady_frame
from .nccl import nccl_refusal
from .shared_page import Gate
from .workloads import make_workload, same_mapping

PARTS = ("host", "nccl", "copies")
SHM, TWO_LEVEL = "shared-memory", "two-level"
GROUP, TWO, RAW = "process-group", "two-broadcasts", "raw broadcast"
NCCL_RANKS = {1: 1.0, 2: 0.4, 4: 0.1}  # and their share of the steps, which are longer

_RANKS = 2  # of the part `host`
_WORKLOAD = "W2"
_UNTIMED = 20
_TIMEOUT_S = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one part and write its rows; returns the exit status."""
    parser = argparse.ArgumentParser(prog="onecast.runtime.bench.gpu", add_help=False)
    parser.add_argument("part", choices=PARTS)
    options, others = parser.parse_known_args(argv)
    measures = {"host": _measure_host, "nccl": _measure_nccl, "copies": _measure_copies}
    return run_part(f"{parser.prog} {options.part}", __doc__, measures[options.part], others)


def _measure_copies(asked: Asked, results: Results) -> None:
    results.add(rows=measure_copies(asked.device, asked.steps))


def _measure_host(asked: Asked, results: Results) -> None:
    results.add(rows=measure("gloo", asked.device, asked.steps, asked.timeout_s, _RANKS))


def _measure_nccl(asked: Asked, results: Results) -> None:
    """By each number of ranks that can meet; the reason for each that cannot."""
    backend = "nccl" if asked.device == "cuda" else "gloo"
    for ranks, share in NCCL_RANKS.items():
        refusal = nccl_refusal(ranks) if backend == "nccl" else None
        if refusal is not None:
            results.add(skipped=[refusal])
            continue
        steps = max(1, round(asked.steps * share))
        rows = measure(backend, asked.device, steps, asked.timeout_s, ranks, only_group=True)
        results.add(rows=rows)


# ---- one step, from rank 0 to the others


def methods_of(backend: str, only_group: bool) -> tuple[str, ...]:
    """Names; those that need no group of that backend are few if `only_group`."""
    two_level = () if only_group else (TWO_LEVEL,)
    return (SHM, *two_level, *(f"{name} {backend}" for name in (GROUP, TWO, RAW)))


def measure(
    backend: str, device: str, steps: int, timeout_s: float, ranks: int, only_group: bool = False
) -> list[Row]:
    """Rows of one-way and sender's times; the methods take turns.

    AssertionError on a rank on which something else arrives than was sent.
    """
    names = methods_of(backend, only_group)
    source, *receivers = run_ranks(
        _exchange, ranks, names, backend, device, steps, timeout_s=timeout_s
    )
    rows = []
    for name, sent in source.items():
        ends = list(zip(*(receiver[name].ends for receiver in receivers), strict=True))
        arrived = [(max(of) - begin) / 1e3 for begin, of in zip(sent.begins, ends, strict=False)]
        left = [(end - begin) / 1e3 for begin, end in zip(sent.begins, sent.ends, strict=True)]
        assert len(arrived) == (len(left) if receivers else 0)
        if receivers:
            rows.append(_row(name, ranks, "one-way us", arrived))
        rows.append(_row(name, ranks, "sender us", left))
    return rows


def _row(method: str, ranks: int, metric: str, values: list[float]) -> Row:
    return {
        "workload": f"{_WORKLOAD}, {ranks} {'rank' if ranks == 1 else 'ranks'}",
        "method": method,
        "ranks": ranks,
        "mode": "tight",
        "metric": metric,
        **summarize(values),
    }


def _exchange(
    rank: int, names: tuple[str, ...], backend: str, device: str, steps: int
) -> dict[str, Stamps]:
    """On one rank, of a world over Gloo."""
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    group = dist.new_group(backend="nccl") if backend == "nccl" else dist.group.WORLD
    mapping = make_workload(_WORKLOAD)
    methods = {name: _open(name, group, place, mapping) for name in names}
    exchanges = Exchanges(rank, Gate(), methods, mapping, _UNTIMED)
    stamps = exchanges.run(tight_turns(names, steps))
    if dist.get_world_size() == 1:
        _check_own(methods, mapping)
    for method in methods.values():
        method.close()
    return stamps


def _check_own(methods: Mapping[str, Method], mapping: dict[str, Any]) -> None:
    """Nobody receives: what the source itself has in hand is compared."""
    for name, method in methods.items():
        if isinstance(method, _ToDevice):
            got = method.mapping(method.send(mapping))
            assert same_mapping(got, mapping), f"{name}: what is in hand is not what was sent"


def _open(
    name: str, group: dist.ProcessGroup | None, device: torch.device, mapping: dict[str, Any]
) -> Method:
    """A collective call."""
    channel: Channel
    if name == SHM:
        channel = open_channel(transport=SHM, device=device, timeout_s=_TIMEOUT_S)
    elif name == TWO_LEVEL:
        channel = _open_two_level(device)
    elif name.startswith("raw broadcast"):
        return _RawBroadcast(name, steady_frame(mapping)[0], group, device)
    else:
        kind = name.split()[0]
        make: Callable[..., Channel] = (
            functools.partial(open_channel, transport=kind)
            if kind == "process-group"
            else functools.partial(open_prior_channel, kind)
        )
        channel = make(group=group, device=device, timeout_s=_TIMEOUT_S)
    return _ToDevice(name, channel, device)


def _open_two_level(device: torch.device) -> Channel:
    """With each rank a host of its own: on one host it would be shared memory alone."""
    own = peers._host_key
    peers._host_key = lambda: 1 + dist.get_rank()
    try:
        return open_channel(transport=TWO_LEVEL, device=device, timeout_s=_TIMEOUT_S)
    finally:
        peers._host_key = own


class _ToDevice(ChannelMethod):
    """A channel whose frames are in hand once the receiver's stream has come to its end."""

    def __init__(self, name: str, channel: Channel, device: torch.device) -> None:
        super().__init__(name, channel)
        self._device = device

    def receive(self, timeout_s: float | None = None) -> Any:
        frame = super().receive(timeout_s)
        _synchronize(self._device)
        return frame

    def mapping(self, received: Any) -> Mapping[str, Any]:
        """As it would be on the host, to be compared; what lies elsewhere is refused."""
        mapping = dict(super().mapping(received))
        for key, value in mapping.items():
            if isinstance(value, torch.Tensor):
                assert value.device == self._device, f"{self.name}: {key} is on {value.device}"
                mapping[key] = value.cpu()
        return mapping


class _RawBroadcast(Method):
    """As many bytes as a frame has, on the device: no encoding, no copy, no decoding."""

    def __init__(
        self, name: str, nbytes: int, group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self.name = name
        self.nbytes = nbytes
        self._group = group
        self._device = device
        self._bytes = torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def send(self, mapping: dict[str, Any]) -> None:
        dist.broadcast(self._bytes, src=0, group=self._group)

    def receive(self, timeout_s: float | None = None) -> None:
        dist.broadcast(self._bytes, src=0, group=self._group)
        _synchronize(self._device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


if __name__ == "__main__":
    sys.exit(main())
