"""Which methods there are, and how each is opened for a workload.

Owns their names. On one host a two-level channel is shared memory throughout: one row more, no
broadcast.
"""

from typing import Any

from onecast.comm import open_channel
from onecast.comm.channel import TRANSPORTS
from onecast.comm.frame import Encoder
from onecast.comm.prior_art import PROTOCOLS, open_prior_channel

from .ablation import ABLATION, open_ablation
from .floors import MemcpyFlag, PickleQueue, RawBroadcast
from .method import ChannelMethod, Method

SHM, SPINNING, GROUP = "shared-memory", "shared-memory-spinning", "process-group"
FLOOR, RAW, RAW_AGAIN = "memcpy-flag", "raw-broadcast", "raw-broadcast-again"
PICKLE, PICKLE_TENSORS = "pickle-numpy-shm", "pickle-tensor-shm"

CHANNELS = (SHM, SPINNING, *(name for name in TRANSPORTS if name == "two-level"), GROUP)
METHODS = (*CHANNELS, *PROTOCOLS, FLOOR, PICKLE, PICKLE_TENSORS, RAW, RAW_AGAIN)
PACED = (SHM, SPINNING, GROUP, *PROTOCOLS, FLOOR, PICKLE, RAW)  # 5 ms a step: not all
PACED_MORE_RANKS = (SHM, SPINNING, GROUP)
IDLE = (SHM, SPINNING, GROUP)

_TIMEOUT_S = 60.0


def open_methods(names: tuple[str, ...], mapping: dict[str, Any]) -> dict[str, Method]:
    """Open those methods for a workload; a collective call."""
    frame_bytes = steady_frame(mapping)[0]
    opened: dict[str, Method] = {}
    for name in names:
        if name not in ABLATION:
            opened[name] = _open(name, mapping, frame_bytes)
    if not set(ABLATION).isdisjoint(names):
        opened.update((method.name, method) for method in open_ablation(mapping))
    return opened


def steady_frame(mapping: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a frame whose layout is known, and of those, header and metadata."""
    encoder = Encoder()
    encoder.commit(encoder.plan(mapping))
    message = encoder.plan(mapping)
    return message.total, message.metadata_bytes


def _open(name: str, mapping: dict[str, Any], frame_bytes: int) -> Method:
    if name == SPINNING:
        return ChannelMethod(name, open_channel(transport=SHM, spin=1.0, timeout_s=_TIMEOUT_S))
    if name in TRANSPORTS:
        return ChannelMethod(name, open_channel(transport=name, timeout_s=_TIMEOUT_S))
    if name in PROTOCOLS:
        return ChannelMethod(name, open_prior_channel(name, timeout_s=_TIMEOUT_S))
    if name == FLOOR:
        return MemcpyFlag(frame_bytes)
    if name in (PICKLE, PICKLE_TENSORS):
        return PickleQueue(mapping, as_arrays=name == PICKLE)
    assert name in (RAW, RAW_AGAIN)
    return RawBroadcast(name, frame_bytes)
