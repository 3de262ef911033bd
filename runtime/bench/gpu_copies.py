"""How fast a frame comes out of a page-locked ring to the GPU, beside torch's own pinned memory.

Owns that comparison: a slot of a ring as the shared-memory channel has it, with and without its
memory locked, and a pinned tensor. Each copy is awaited: what is compared is the way of one frame,
not a stream of many.
"""

import functools
import time
from collections.abc import Callable

import torch

from onecast.comm.frame_ring import Ring
from onecast.comm.mirror import make_mirror
from onecast.comm.segment import PAGE, Segment

from .figures import p99, summarize
from .gpu_part import Row

COPY_BYTES = (18 << 10, 16 << 20)
COPIES = ("page-locked ring", "torch pinned", "ring, not page-locked")

_UNTIMED = 20
_TIMEOUT_S = 30.0


def measure_copies(device: str, steps: int) -> list[Row]:
    """Rows of GB/s, the copies taking turns."""
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
                if place.type == "cuda":
                    torch.cuda.current_stream(place).synchronize()
                if step >= 0:
                    rates[name].append(nbytes / (time.perf_counter_ns() - begin))
        for mirror in (locked, unlocked):
            mirror.close(_TIMEOUT_S)
        rows += [_copy_row(name, nbytes, values) for name, values in rates.items()]
    return rows


def _copy_row(name: str, nbytes: int, values: list[float]) -> Row:
    """Of a rate: the hundredth that is slowest is what its p99 tells."""
    return {
        "workload": f"{nbytes} bytes",
        "method": name,
        "ranks": 1,
        "mode": "copies",
        "metric": "GB/s",
        **summarize(values),
        "p99": -p99([-value for value in values]),
    }
