"""How bytes reach the other ranks: one mapping, one frame, by shared memory or one broadcast."""

from .channel import Channel, Frame, open_channel
from .errors import (
    BrokenChannel,
    CannotShare,
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
from .shared_memory import SharedMemoryChannel
from .tensor_dict import broadcast_tensor_dict
from .two_level import TwoLevelChannel

__all__ = [
    "BrokenChannel",
    "CannotShare",
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
    "SharedMemoryChannel",
    "TwoLevelChannel",
    "UnsupportedTypeError",
    "broadcast_tensor_dict",
    "open_channel",
]
