"""Moves of blocks on a GPU: swaps on a stream of their own beside the forward, copies in its own.

Owns the side stream, the events that order it against the stream that is current, and the two ways
of a swap. Which way pays is in `swap_choice.py`, the kernel in `kernels.py`.

    current stream   forward k-1 --o              o-- copy k, forward k --------------->
                                    \\            /    wait(step): newest swap <= step
    side stream                      swap out k, swap in k --o    an event of step k

The side stream is a queue: swaps come one after the other, and a later event covers earlier ones.
"""

import logging
import time
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .block_mover import Pairs
from .block_runs import Run, merge_runs
from .swap_choice import COPIES, KERNEL, UNMEASURED, WAYS, describe, fit

if TYPE_CHECKING:
    from .kernels import RowKernel

log = logging.getLogger(__name__)

AUTO = "auto"
OUT, IN = "swap out", "swap in"

_MEASURE_S = 0.03  # for each direction, what is compiled not counted
_MEASURED_BYTES = 16 << 20  # moved by one call, at most
_MOST_PENDING = 64  # swaps under way, before the host waits for the first of them


class CudaMover:
    """A `BlockMover` between a pool on a GPU and one on its host.

    A program may call it with one stream current and then with another: each call is ordered
    against the one that is current then.
    """

    def __init__(self, device_rows: Tensor, host_rows: Tensor, way: str = AUTO) -> None:
        """Both uint8 `[blocks, bytes of a block]`, contiguous; nothing is in them yet.

        `way` of swaps is "auto", "copies" or "kernel". A short measurement settles what "auto"
        chooses from; it swaps some blocks, each with that of the same number. Without Triton or
        page-locked memory there are copies alone; ValueError where "kernel" is asked for then.
        """
        if way not in (AUTO, *WAYS):
            raise ValueError(f"way {way!r} is none of {', '.join((AUTO, *WAYS))}")
        self._device = device_rows.device
        self._device_rows, self._host_rows = device_rows, host_rows
        self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # Should the pool be freed while a swap is under way, others get its memory only afterwards.
        device_rows.record_stream(self._side)
        self._finish = weakref.finalize(self, self._side.synchronize)
        self._finish.atexit = False  # all goes then
        self._begun = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pending: deque[tuple[int, torch.cuda.Event]] = deque()  # by rising step
        self._spare: list[torch.cuda.Event] = []
        self._newest = -1
        self._kernel = _load_kernel(device_rows, host_rows)
        both_ways = self._kernel is not None and len(host_rows) > 0 and host_rows.is_pinned()
        if way == KERNEL and not both_ways:
            raise ValueError("way 'kernel' needs Triton and a page-locked host pool")
        self._way = way if both_ways else COPIES
        self._choices = {OUT: UNMEASURED, IN: UNMEASURED}
        if self._way == AUTO:
            self._measure()

    def swap_out(self, step: int, pairs: Pairs) -> None:
        """Copy blocks from the device to the host: pairs (device block, host block)."""
        self._swap(OUT, step, pairs)

    def swap_in(self, step: int, pairs: Pairs) -> None:
        """Copy blocks from the host to the device: pairs (host block, device block)."""
        self._swap(IN, step, pairs)

    def copy(self, pairs: Pairs) -> None:
        """Copy blocks within the device, on the current stream."""
        with torch.cuda.device(self._device):
            if self._kernel is not None:
                self._kernel.copy(pairs)
            else:
                _copy_runs(self._device_rows, self._device_rows, merge_runs(pairs))

    def wait(self, step: int) -> None:
        """Make the current stream wait for the swaps of all steps up to `step`."""
        self._drop_what_is_over()
        for of, event in reversed(self._pending):
            if of <= step:
                torch.cuda.current_stream(self._device).wait_event(event)
                return

    def close(self) -> None:
        """Wait until no swap is under way; a mover that goes without does so then."""
        self._finish()
        self._drop_what_is_over()

    def _swap(self, direction: str, step: int, pairs: Pairs) -> None:
        assert step >= self._newest, f"step {step} after step {self._newest}"
        self._newest = step
        # What is on the current stream by now has written what is read here, or read what is
        # written here. A wait is for what an event stood for then: one event does for all calls.
        self._begun.record(torch.cuda.current_stream(self._device))
        self._side.wait_event(self._begun)
        runs = [] if self._way == KERNEL else merge_runs(pairs)
        way = self._way
        if way == AUTO:
            way = self._choices[direction].choose(len(runs), len(pairs))
        with torch.cuda.stream(self._side):
            self._carry_out(direction, way, pairs, runs)
        self._next_event(step).record(self._side)

    def _carry_out(self, direction: str, way: str, pairs: Pairs, runs: list[Run]) -> None:
        """On the current stream; `runs` are those of `pairs`, or none where `way` is KERNEL."""
        if way == KERNEL:
            assert self._kernel is not None
            (self._kernel.swap_out if direction == OUT else self._kernel.swap_in)(pairs)
        elif direction == OUT:
            _copy_runs(self._device_rows, self._host_rows, runs)
        else:
            _copy_runs(self._host_rows, self._device_rows, runs)

    def _next_event(self, step: int) -> torch.cuda.Event:
        """To be recorded behind a swap of `step`."""
        self._drop_what_is_over()
        if len(self._pending) == _MOST_PENDING:
            self._pending[0][1].synchronize()
            self._drop_what_is_over()
        event = self._spare.pop() if self._spare else torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pending.append((step, event))
        return event

    def _drop_what_is_over(self) -> None:
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            self._spare.append(self._pending.popleft()[1])

    # ---- which way

    def _measure(self) -> None:
        row_bytes = self._device_rows.shape[1]
        blocks = min(len(self._device_rows), len(self._host_rows), _MEASURED_BYTES // row_bytes)
        if blocks < 2:
            return
        torch.cuda.synchronize(self._device)
        for direction in (OUT, IN):
            choice = fit(partial(self._time, direction), blocks, _MEASURE_S)
            self._choices[direction] = choice
            log.info("%s", describe(choice, direction))

    def _time(self, direction: str, way: str, runs: int, blocks: int) -> tuple[float, float]:
        """Seconds until the call has returned, and until the blocks are there."""
        pairs = np.arange(blocks, dtype=np.int64)[:, None].repeat(2, axis=1)
        length = blocks // runs
        given = [(start, start, length) for start in range(0, blocks, length)]
        begin = time.perf_counter()
        with torch.cuda.stream(self._side):
            self._carry_out(direction, way, pairs, given)
        returned = time.perf_counter()
        self._side.synchronize()
        return returned - begin, time.perf_counter() - begin


def _copy_runs(source: Tensor, destination: Tensor, runs: list[Run]) -> None:
    """One copy a run, on the current stream."""
    for start, target, length in runs:
        destination[target : target + length].copy_(
            source[start : start + length], non_blocking=True
        )


def _load_kernel(device_rows: Tensor, host_rows: Tensor) -> "RowKernel | None":
    """The kernel, or None, and the log says why, where Triton is missing or cannot compile it."""
    try:
        from .kernels import RowKernel

        kernel = RowKernel(device_rows, host_rows)
        with torch.cuda.device(device_rows.device):
            kernel.copy(np.zeros((1, 2), dtype=np.int64))  # block 0 to where it is
    except Exception as error:  # no compiler, a GPU it does not know, ...: each with its own type
        log.warning("blocks are moved by copies alone, Triton's kernel does not work: %r", error)
        return None
    return kernel
