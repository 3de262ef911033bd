"""Several broadcasts in a row that a time-out may interrupt and a later call go on with.

Owns the works under way and the waits for them. An exchange is a generator: it begins broadcasts,
yields their works, and goes on once they are over. Knows nothing of what is broadcast.
"""

import time
from collections.abc import Generator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import CommError, PeerLost, PublishTimeout, ReceiveTimeout
from .peers import Peers

_SLICE_S = 1.0  # between two looks at the peers while a broadcast does not end

_T = TypeVar("_T")
Exchange = Generator[list[dist.Work], None, _T]


class Broadcasts:
    """The broadcasts of one rank, and the exchange that is under way."""

    def __init__(self, group: dist.ProcessGroup, src: int, peers: Peers) -> None:
        self._group = group
        self._src = src
        self._peers = peers
        self._pending: list[dist.Work] = []  # what the exchange is waiting for

    def begin(self, tensor: torch.Tensor) -> dist.Work:
        work: dist.Work | None = dist.broadcast(
            tensor, src=self._src, group=self._group, async_op=True
        )
        assert work is not None
        return work

    def carry_on(self, exchange: Exchange[_T], timeout_s: float, awaited: str) -> _T:
        """Take `exchange` to its end; what it returns.

        After ReceiveTimeout, which only receivers get, a further call with the same exchange goes
        on. Also raises PublishTimeout, PeerLost and CommError.
        """
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                while self._pending:
                    self._wait(self._pending[0], deadline, awaited)
                    del self._pending[0]
                self._pending = next(exchange)
        except StopIteration as over:
            result: _T = over.value
            return result
        except RuntimeError as error:  # the process group's, which says in words only what it is
            raise self._failure(error) from error

    def _wait(self, work: dist.Work, deadline: float, awaited: str) -> None:
        while True:
            left = deadline - time.monotonic()
            try:
                # Less than a millisecond would mean: for ever.
                work.wait(timedelta(seconds=max(min(left, _SLICE_S), 0.001)))
                return
            except RuntimeError:
                if work.is_completed():  # it failed, or ended in this very moment
                    work.wait()
                    return
            gone = self._peers.gone()
            if gone is not None:
                raise PeerLost(gone, f"its process ended while this rank waited for {awaited}")
            if time.monotonic() >= deadline:
                kind = PublishTimeout if dist.get_rank() == self._src else ReceiveTimeout
                raise kind(f"waited in vain for {awaited}")

    def _failure(self, error: RuntimeError) -> CommError:
        rank = self._peers.find_gone()
        if rank is None and "timed out" in str(error).lower():
            return CommError(f"the process group's own time-out ended the broadcast: {error}")
        if rank is None and dist.get_rank() != self._src:
            rank = self._src  # its connection, or that of a rank which passes its bytes on
        return PeerLost(rank, str(error))
