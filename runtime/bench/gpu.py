"""What a step costs to bring from rank 0 to another rank's GPU.

Owns the methods of that comparison and the bandwidth of copies out of a ring. Run by `onecast
gpu-check`, each part as a process of its own; `--device cpu` takes the same path without a GPU.

    host    over Gloo: shared memory, two levels (each rank pretends to be a host), the process
            group, a prior protocol, one raw broadcast of the frame's bytes
    nccl    the process group, a prior protocol and a raw broadcast over NCCL; shared memory once
            more, to tell the two runs apart
    copies  a slot of a page-locked ring to the GPU, beside torch's own pinned memory

One way is from before `publish` until the mapping is in hand on the receiver's device and its
stream has come to an end. Ranks share GPUs where there are fewer of them.
"""

import argparse
import ctypes
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from onecast.comm import Channel, open_channel, peers
from onecast.comm.frame_ring import Ring
from onecast.comm.mirror import make_mirror
from onecast.comm.prior_art import open_prior_channel
from onecast.comm.segment import PAGE, Segment
from onecast.comm.testing import run_ranks

from .exchanges import Exchanges, Stamps, tight_turns
from .method import ChannelMethod, Method
from .methods import steady_frame
from .shared_page import Gate
from .workloads import make_workload

PARTS = ("host", "nccl", "copies")
SHM, TWO_LEVEL = "shared-memory", "two-level"
HOST_METHODS = (SHM, TWO_LEVEL, "process-group gloo", "two-broadcasts gloo", "raw broadcast gloo")
NCCL_METHODS = (SHM, "process-group nccl", "two-broadcasts nccl", "raw broadcast nccl")
COPY_BYTES = (18 << 10, 16 << 20)
COPIES = ("page-locked ring", "torch pinned", "ring, not page-locked")

_RANKS = 2
_WORKLOAD = "W2"
_STEPS = 500
_UNTIMED = 20
_TIMEOUT_S = 30.0

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one part and write its rows; returns the exit status."""
    parser = argparse.ArgumentParser(prog="onecast.runtime.bench.gpu", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=_STEPS, help="timed ones, %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="for all ranks")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}, at least 1 is needed")
    if options.part == "copies":
        rows = measure_copies(options.device, options.steps)
    else:
        refusal = nccl_refusal(_RANKS) if options.part == "nccl" else None
        if refusal is not None:
            print(refusal, file=sys.stderr)
            return 1
        rows = measure(options.part, options.device, options.steps, options.timeout)
    text = json.dumps(rows, indent=2) + "\n"
    if options.json is not None:
        options.json.write_text(text)
    else:
        sys.stdout.write(text)
    return 0


def nccl_refusal(ranks: int) -> str | None:
    """Why so many ranks cannot meet over NCCL on this machine; None if they can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    count = torch.cuda.device_count()
    if count >= ranks:
        return None
    shares = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    found = nccl_version()
    if shares and found >= (2, 30):
        return None
    version = ".".join(map(str, found))
    return (
        f"{ranks} ranks of NCCL on {count} GPU need NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL 2.30 or "
        f"later: the variable is {'set' if shares else 'not set'}, NCCL is {version}"
    )


def nccl_version() -> tuple[int, ...]:
    """Of the library that is loaded: torch only knows which one it was built with."""
    try:
        ask = ctypes.CDLL(None).ncclGetVersion
    except AttributeError:
        built: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        return built[:3]
    code = ctypes.c_int()
    if ask(ctypes.byref(code)) != 0:
        return ()
    return code.value // 10_000, code.value // 100 % 100, code.value % 100


# ---- one step, from rank 0 to another


def measure(part: str, device: str, steps: int, timeout_s: float) -> list[Row]:
    """Rows of one-way and sender's times; the methods take turns."""
    source, receiver = run_ranks(_exchange, _RANKS, part, device, steps, timeout_s=timeout_s)
    rows = []
    for name, sent in source.items():
        arrived = zip(sent.begins, receiver[name].ends, strict=True)
        left = zip(sent.begins, sent.ends, strict=True)
        rows.append(_row(name, "one-way us", [(end - begin) / 1e3 for begin, end in arrived]))
        rows.append(_row(name, "sender us", [(end - begin) / 1e3 for begin, end in left]))
    return rows


def _row(method: str, metric: str, values: list[float]) -> Row:
    ordered = sorted(values)
    return {
        "workload": _WORKLOAD,
        "method": method,
        "ranks": _RANKS,
        "mode": "tight",
        "metric": metric,
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)],
        "n": len(ordered),
    }


def _exchange(rank: int, part: str, device: str, steps: int) -> dict[str, Stamps]:
    """On one rank, of a world over Gloo."""
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    names = NCCL_METHODS if part == "nccl" else HOST_METHODS
    group = dist.new_group(backend="nccl") if part == "nccl" else dist.group.WORLD
    mapping = make_workload(_WORKLOAD)
    methods = {name: _open(name, group, place, mapping) for name in names}
    exchanges = Exchanges(rank, Gate(), methods, mapping, _UNTIMED)
    stamps = exchanges.run(tight_turns(names, steps))
    for method in methods.values():
        method.close()
    return stamps


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


# ---- copies, in one process


def measure_copies(device: str, steps: int) -> list[Row]:
    """Rows of GB/s out of a slot of a ring, and out of torch's pinned memory, copies taking turns.

    Each copy is awaited: what is compared is the way of a frame, not a stream of many.
    """
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for nbytes in COPY_BYTES:
        slot_bytes = -(-nbytes // PAGE) * PAGE
        mirrors, rings = [], []
        for _ in range(2):
            segment = Segment.create(PAGE + slot_bytes)
            rings.append(Ring(segment, 0, PAGE, slot_bytes, 1))
            mirrors.append(make_mirror(place, poison=True))
        locked, unlocked = mirrors
        assert locked is not None and unlocked is not None
        locked.lock(rings[0])
        pinned = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=place.type == "cuda")
        target = torch.zeros(nbytes, dtype=torch.uint8, device=place)
        copies: tuple[Callable[[], object], ...] = (
            functools.partial(locked.copy, rings[0].regions[0], 0, nbytes),
            functools.partial(target.copy_, pinned, non_blocking=True),
            functools.partial(unlocked.copy, rings[1].regions[0], 0, nbytes),
        )
        rates: dict[str, list[float]] = {name: [] for name in COPIES}
        for step in range(-_UNTIMED, steps):
            for name, copy in zip(COPIES, copies, strict=True):
                begin = time.perf_counter_ns()
                copy()
                _synchronize(place)
                if step >= 0:
                    rates[name].append(nbytes / (time.perf_counter_ns() - begin))
        for mirror in (locked, unlocked):
            mirror.close(_TIMEOUT_S)
        rows += [_copy_row(name, nbytes, values) for name, values in rates.items()]
    return rows


def _copy_row(name: str, nbytes: int, values: list[float]) -> Row:
    """Of a rate: the hundredth that is slowest is what its p99 tells."""
    ordered = sorted(values, reverse=True)
    return {
        "workload": f"{nbytes} bytes",
        "method": name,
        "ranks": 1,
        "mode": "copies",
        "metric": "GB/s",
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)],
        "n": len(ordered),
    }


if __name__ == "__main__":
    sys.exit(main())
