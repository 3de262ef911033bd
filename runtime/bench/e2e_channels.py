"""The control protocols that take turns end to end, each open for as long as a launch lasts.

Owns their names, what each is, and the end of a turn, which travels as a message of its own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from onecast.comm import Channel, Closed, Frame, Probe, open_channel
from onecast.comm.channel import TRANSPORTS
from onecast.comm.prior_art import open_prior_channel

TWO, FIXED, CACHED = "two-broadcasts", "fixed-metadata", "cached-size"
FUSED, SHM = "process-group", "shared-memory"

# In the order in which one followed from the other.
CHANNELS = {
    TWO: "two broadcasts of pickled metadata, then one per tensor",
    FIXED: "one broadcast of metadata of a fixed size, then one per tensor",
    CACHED: "one broadcast of metadata, its size cached per call site, then one per tensor",
    FUSED: "one broadcast of a fused frame",
    SHM: "a fused frame in memory that all ranks map; no broadcast",
}
TIMEOUT_S = 120.0

_OVER = {"over": True}


class Published(NamedTuple):
    """One step's message: its bytes, those that are neither tensor nor padding, and what for."""

    nbytes: int
    metadata_bytes: int
    tokens: int
    sequences: int


class TurnChannel:
    """A `Channel` that serves one turn after the other; what `receive` returns is in hand.

    Receivers find `Closed` at the end of each turn, and can go on receiving in the next.
    """

    def __init__(self, channel: Channel) -> None:
        self.name = channel.name
        self.published: list[Published] = []  # on the source, since it was last emptied
        self.sequence, self.broadcasts = channel.sequence, channel.broadcasts
        self._channel = channel

    def publish(self, mapping: Mapping[Any, Any]) -> Frame:
        frame = self._channel.publish(mapping)
        tokens, sequences = (mapping[name].shape[0] for name in ("input_ids", "seq_lens"))
        self.published.append(Published(frame.nbytes, frame.metadata_bytes, tokens, sequences))
        self._count()
        return frame

    def end_turn(self) -> None:
        """On the source."""
        self._channel.publish(_OVER).release()
        self._count()

    def receive(self, timeout_s: float | None = None) -> Frame:
        frame = self._channel.receive(timeout_s)
        self._count()
        if "over" in frame.mapping:
            frame.release()
            raise Closed("the turn is over")
        return frame

    def close(self) -> None:
        self._channel.close()

    def _count(self) -> None:
        self.sequence, self.broadcasts = self._channel.sequence, self._channel.broadcasts


def open_turn_channel(
    name: str, device: torch.device, probe: Probe | None = None, group_desc: str = "control"
) -> TurnChannel:
    """One of `CHANNELS`, on a group of its own of all ranks; a collective call."""
    group = dist.new_group(group_desc=group_desc)
    assert group is not None
    if name in TRANSPORTS:
        channel = open_channel(
            group, transport=name, device=device, probe=probe, timeout_s=TIMEOUT_S
        )
    else:
        channel = open_prior_channel(name, group, device=device, probe=probe, timeout_s=TIMEOUT_S)
    return TurnChannel(channel)
