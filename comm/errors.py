"""What can go wrong between ranks, named by whose fault it is.

    CommError
    ├── UnsupportedTypeError   the mapping holds what a frame cannot carry (a TypeError too)
    ├── FrameError             the bytes that arrived are no frame: malformed, truncated, foreign
    │   └── OutOfStep          they are one, but not the one that was due
    ├── ReceiveTimeout         nothing came in time; receive again to go on (a TimeoutError too)
    ├── PublishTimeout         ranks did not take earlier frames in time (a TimeoutError too)
    ├── AllReduceTimeout       ranks did not come to an all-reduce in time (a TimeoutError too)
    ├── Mismatch               ranks came to an all-reduce with unlike tensors (a ValueError too)
    ├── CannotShare            shared memory cannot be had, or not be shared by these ranks
    ├── PeerLost               a rank is gone without having closed
    ├── Closed                 the channel was closed, by the source or here
    └── BrokenChannel          used after an error that left the ranks out of step

A bad argument is a plain ValueError. It, UnsupportedTypeError, CannotShare, a ReceiveTimeout of
`receive` and a PublishTimeout that says so leave a channel as it was, a Mismatch, which all ranks
raise, an all-reduce; after any other error both refuse further use.
"""


class CommError(Exception):
    """Base of all errors of this package."""


class UnsupportedTypeError(CommError, TypeError):
    """A value that a frame cannot carry; the text has its path in the mapping and its type."""


class FrameError(CommError):
    """Bytes that are no frame of this version: malformed, truncated or foreign."""


class OutOfStep(FrameError):
    """A sound frame, but not the one that was due: missing, repeated, reordered or foreign.

    Origins are what `header` describes: the sender's rank and the number of its channel.
    """

    def __init__(
        self, expected: int, received: int, layout: int, origin: int, received_origin: int
    ) -> None:
        due = f"frame {expected} of channel {origin >> 16} from rank {origin & 0xFFFF}"
        came = (
            f"frame {received} (layout {layout}) of channel {received_origin >> 16} "
            f"from rank {received_origin & 0xFFFF}"
        )
        super().__init__(f"out of step: {due} was due, {came} arrived")
        self.expected = expected
        self.received = received
        self.layout = layout
        self.sender = received_origin & 0xFFFF


class ReceiveTimeout(CommError, TimeoutError):
    """A wait ended; the text says what was awaited, from whom and for how long."""


class PublishTimeout(CommError, TimeoutError):
    """Ranks did not take frames in time; the text names them, what they took and their state."""


class AllReduceTimeout(CommError, TimeoutError):
    """Ranks did not come in time; the text names them, how far they are and their state."""


class Mismatch(CommError, ValueError):
    """Ranks brought unlike tensors to an all-reduce; the text has each rank's bytes and dtype."""


class CannotShare(CommError):
    """Memory that cannot be had, with its size, or not be shared, with each rank's reason."""


class PeerLost(CommError):
    """A rank is gone. `rank` is global; None when a rank on another host cannot be told apart."""

    def __init__(self, rank: int | None, details: str) -> None:
        who = "a peer" if rank is None else f"rank {rank}"
        super().__init__(f"{who} is lost: {details}")
        self.rank = rank
        self.details = details


class Closed(CommError):
    """The channel was closed in order."""


class BrokenChannel(CommError):
    """The channel was used after an error; the text repeats that error."""
