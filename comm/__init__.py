"""How bytes reach the other ranks: one mapping, one frame, by shared memory or one broadcast."""

from .all_reduce import AllReduce, open_all_reduce
from .channel import Channel, Frame, open_channel
from .errors import (
    AllReduceTimeout,
    BrokenChannel,
    CannotShare,
    Closed,
    CommError,
    FrameError,
    Mismatch,
    OutOfStep,
    PeerLost,
    PublishTimeout,
    ReceiveTimeout,
    UnsupportedTypeError,
)
from .probe import CollectiveProbe, Probe
from .process_group import ProcessGroupChannel
from .shared_memory import SharedMemoryChannel
from .tensor_dict import broadcast_tensor_dict
from .two_level import TwoLevelChannel

__all__ = [
    "AllReduce",
    "AllReduceTimeout",
    "BrokenChannel",
    "CannotShare",
    "Channel",
    "Closed",
    "CollectiveProbe",
    "CommError",
    "Frame",
    "FrameError",
    "Mismatch",
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
    "open_all_reduce",
    "open_channel",
]
