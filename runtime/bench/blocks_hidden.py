"""How much of a step's swaps happens unseen while a forward runs.

Owns the load that stands for a forward, and the arithmetic. Each round takes three times, from the
first call until everything is over:

    swaps alone      out, in, and a wait for both
    load alone       matrix products, about twice as long as the swaps
    both             as in a step: swaps first, then the load beside them, then the wait

    hidden share = 1 - (both - load) / swaps        1: the step is not longer for them
"""

import time
from collections.abc import Callable, Mapping

import torch

from onecast.runtime.block_mover import BlockMover, Pairs

_WIDTH = {"cuda": 4096, "cpu": 64}
_ROUNDS = 12  # of each mover, at most
_UNTIMED = 2

Draw = Callable[[], tuple[Pairs, Pairs]]


def hidden_shares(
    movers: Mapping[str, BlockMover], draw: Draw, device: torch.device, steps: int
) -> dict[str, list[float]]:
    """Percent of the swaps' time, by mover, one a round; `draw` says what goes out and comes in."""
    beside = _Beside(device)
    return {name: beside.rounds(mover, draw, min(steps, _ROUNDS)) for name, mover in movers.items()}


class _Beside:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        width = _WIDTH[device.type]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._factor = torch.randn(width, width, device=device, dtype=dtype) / width**0.5
        self._state = torch.randn(width, width, device=device, dtype=dtype)
        self._next = torch.empty_like(self._state)

    def rounds(self, mover: BlockMover, draw: Draw, count: int) -> list[float]:
        products = self._products_for(2 * self._least(lambda: self._swap(mover, draw())))
        shares = []
        for number in range(-_UNTIMED, count):
            swaps = self._elapsed(lambda: self._swap(mover, draw()))
            load = self._elapsed(lambda: self._load(products))
            both = self._elapsed(lambda: self._both(mover, draw(), products))
            if number >= 0:
                shares.append(100 * (1 - (both - load) / swaps))
        return shares

    def _both(self, mover: BlockMover, pairs: tuple[Pairs, Pairs], products: int) -> None:
        step = self._begin(mover, pairs)
        self._load(products)
        mover.wait(step)

    def _swap(self, mover: BlockMover, pairs: tuple[Pairs, Pairs]) -> None:
        mover.wait(self._begin(mover, pairs))

    def _begin(self, mover: BlockMover, pairs: tuple[Pairs, Pairs]) -> int:
        step = time.monotonic_ns()  # it only has to rise
        out, into = pairs
        mover.swap_out(step, out)
        mover.swap_in(step, into)
        return step

    def _load(self, products: int) -> None:
        """Each product's input is the output of the one before, as of layers."""
        for _ in range(products):
            torch.matmul(self._state, self._factor, out=self._next)
            self._state, self._next = self._next, self._state

    def _products_for(self, seconds: float) -> int:
        few = 8
        return max(1, round(few * seconds / self._least(lambda: self._load(few))))

    def _least(self, call: Callable[[], object]) -> float:
        return min(self._elapsed(call) for _ in range(4))

    def _elapsed(self, call: Callable[[], object]) -> float:
        self._synchronize()
        begin = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
