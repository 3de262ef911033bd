"""What can go wrong between ranks, named by whose fault it is.

    CommError
    ├── UnsupportedTypeError   the mapping holds what a frame cannot carry (a TypeError too)
    ├── FrameError             the bytes that arrived are no frame: malformed, truncated, foreign
    │   └── OutOfStep          they are one, but not the one that was due
    ├── ReceiveTimeout         nothing came in time; receive again to go on (a TimeoutError too)
    ├── PeerLost               a rank is gone without having closed
    ├── Closed                 the channel was closed, by the source or here
    └── BrokenChannel          used after an error that left the ranks out of step

A bad argument is a plain ValueError. It, UnsupportedTypeError and a ReceiveTimeout of `receive`
leave a channel as it was; after any other error it refuses further use.
"""


class CommError(Exception):
    """Base of all errors of this package."""


class UnsupportedTypeError(CommError, TypeError):
    """A value that a frame cannot carry; the text has its path in the mapping and its type."""


class FrameError(CommError):
    """Bytes that are no frame of this version: malformed, truncated or foreign."""


class OutOfStep(FrameError):
    """A sound frame with another sequence number than the one that was due."""

    def __init__(self, expected: int, received: int, layout: int) -> None:
        super().__init__(
            f"out of step: frame {expected} was due, frame {received} (layout {layout}) arrived"
        )
        self.expected = expected
        self.received = received
        self.layout = layout


class ReceiveTimeout(CommError, TimeoutError):
    """A wait ended; the text says what was awaited, from whom and for how long."""


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
