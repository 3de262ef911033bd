"""The seam: publish on the source, receive elsewhere, close.

Owns the `Channel` protocol, the `Frame` that both sides get, and the choice of an implementation.
Knows nothing of how any of them moves bytes.

    channel = open_channel(group)                    # on every rank of the group
    channel.publish({"step": 7, "input_ids": ids})   # on the source
    with channel.receive() as frame:                 # on all others
        run(frame.mapping["input_ids"])
"""

import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .errors import CannotShare
from .probe import Probe
from .waiting import DEFAULT_SPIN

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 300.0
TRANSPORTS = ("auto", "shared-memory", "two-level", "process-group")


class Frame:
    """One mapping on its way through a channel, a view of the channel's own memory.

    Valid until released: by leaving its `with` block, by `release()`, or by the channel's next
    `publish`, `receive` or `close`. Copy what has to live longer.
    """

    __slots__ = ("_mapping", "_rebuild", "_retire", "metadata_bytes", "nbytes", "sequence")

    def __init__(
        self,
        sequence: int,
        nbytes: int,
        metadata_bytes: int,
        mapping: dict[Any, Any] | None,
        rebuild: Callable[[], dict[Any, Any]] | None,
        retire: Callable[["Frame"], None] | None,
    ) -> None:
        """Without `mapping`, `rebuild` makes it when asked; `retire` is told of the release."""
        self.sequence = sequence
        self.nbytes = nbytes
        self.metadata_bytes = metadata_bytes
        self._mapping = mapping
        self._rebuild = rebuild
        self._retire = retire

    @property
    def mapping(self) -> dict[Any, Any]:
        """What was published: tensors as views, plain values, in the order they were given."""
        if self._mapping is None:
            if self._rebuild is None:
                raise ValueError(f"frame {self.sequence} was released")
            self._mapping = self._rebuild()
        return self._mapping

    def release(self) -> None:
        """Give the memory back; a second call does nothing."""
        self._mapping = None
        self._rebuild = None
        if self._retire is not None:
            retire, self._retire = self._retire, None
            retire(self)

    def __enter__(self) -> "Frame":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Channel(Protocol):
    """One source, any number of receivers, frames in order. Not for use by several threads."""

    name: str
    sequence: int  # frames that went through so far
    broadcasts: int  # dist.broadcast calls so far

    def publish(self, mapping: Mapping[Any, Any]) -> Frame:
        """Send `mapping` to all other ranks; on the source only.

        The frame returned holds what the receivers get, so that the source can use the very
        tensors it sent. Raises UnsupportedTypeError or ValueError, after which nothing has been
        sent and the channel is as it was, PublishTimeout if the others do not take earlier frames
        in time, and PeerLost, Closed, BrokenChannel.
        """
        ...

    def receive(self, timeout_s: float | None = None) -> Frame:
        """The next frame; on every rank but the source. None: the channel's own time-out.

        Raises ReceiveTimeout, after which receiving again goes on waiting for the same frame, and
        FrameError, PeerLost, Closed, BrokenChannel.
        """
        ...

    def close(self) -> None:
        """Leave in order, on all ranks: receivers find Closed. A second call does nothing."""
        ...


def open_channel(
    group: dist.ProcessGroup | None = None,
    *,
    src: int = 0,
    transport: str = "auto",
    device: torch.device | str | None = None,
    probe: Probe | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    poison: bool = False,
    spin: float = DEFAULT_SPIN,
) -> Channel:
    """Open a channel from global rank `src` to the other ranks of `group` (None: the world).

    A collective call: every rank of the group makes it, with equal arguments. `device` is where
    received tensors lie; None means the current GPU for an NCCL group and host memory otherwise.
    `timeout_s` bounds every wait that is not given its own. `poison` overwrites released frames, so
    that a view kept too long shows. `spin` is the share of a core (0 to 1) that waiting for frames
    may take: 0 always sleeps, 1 always spins, see `waiting.Cadence`.

    "auto" takes shared memory where all ranks are on one host, two levels where some are, and the
    process group where each is on its own, or where memory cannot be shared.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport is {transport!r}; there are: {', '.join(TRANSPORTS)}")
    # Here: the implementations import this module.
    from .endpoint import check_group
    from .process_group import ProcessGroupChannel
    from .shared_memory import SharedMemoryChannel
    from .two_level import TwoLevelChannel

    kinds: dict[str, Callable[..., Channel]] = {
        "shared-memory": SharedMemoryChannel,
        "two-level": TwoLevelChannel,
        "process-group": ProcessGroupChannel,
    }
    suitable = _agree(check_group(group, src), src, transport)
    kind = transport if transport != "auto" else suitable
    while True:
        try:
            return kinds[kind](
                group,
                src=src,
                device=device,
                probe=probe,
                timeout_s=timeout_s,
                poison=poison,
                spin=spin,
            )
        except CannotShare as error:
            if transport != "auto":
                raise
            log.info("%s cannot be, the process group carries the frames: %s", kind, error)
            kind = "process-group"


def _agree(group: dist.ProcessGroup, src: int, transport: str) -> str:
    """The transport that suits where the ranks are; ValueError if they want different things."""
    from .endpoint import meeting_place
    from .peers import Peers

    agreement = {"src": src, "transport (its place in TRANSPORTS)": TRANSPORTS.index(transport)}
    peers = Peers.exchange(group, meeting_place(group), agreement)
    peers.close()
    if peers.on_one_host:
        return "shared-memory"
    hosts = {peer.host for peer in peers.by_rank.values()}
    return "two-level" if len(hosts) < len(peers.ranks) else "process-group"
