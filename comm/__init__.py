"""How bytes reach the other ranks: one mapping, one frame, one broadcast."""

from .channel import Channel, Frame, open_channel
from .errors import (
    BrokenChannel,
    Closed,
    CommError,
    FrameError,
    OutOfStep,
    PeerLost,
    PublishTimeout,
    ReceiveTimeout,
    UnsupportedTypeError,
)
from .probe import Probe
from .process_group import ProcessGroupChannel
from .tensor_dict import broadcast_tensor_dict

__all__ = [
    "BrokenChannel",
    "Channel",
    "Closed",
    "CommError",
    "Frame",
    "FrameError",
    "OutOfStep",
    "PeerLost",
    "Probe",
    "ProcessGroupChannel",
    "PublishTimeout",
    "ReceiveTimeout",
    "UnsupportedTypeError",
    "broadcast_tensor_dict",
    "open_channel",
]
