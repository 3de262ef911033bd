"""Three ways in which pickled metadata reached the receivers before frames.

Owns what each broadcast of them holds, as bytes, on both sides. Knows nothing of torch, nor of what
the metadata means. `n` is its length, a little-endian u64.

    two-broadcasts   | n |    then    | metadata |

    fixed-metadata   | n | metadata | padding |          always 8 + limit bytes
                         |<----- limit ------>|

    cached-size      | n | metadata | padding |          8 + size bytes: all ranks know the size
                         |<----- size ------->|
                     | n | nothing  |    then    | n | metadata |    when n is above the size, and
                                                                     the size is n from then on

The first is what `torch.distributed.broadcast_object_list` does, and vLLM's `broadcast_tensor_dict`
with it. The others are two answers to it that were discussed in vLLM's pull requests 4757 and 4844.
The cached size never shrinks, which spares it repetitions: metadata of alternating lengths would
be sent twice at every other step.
"""

from collections.abc import Generator
from typing import Protocol

PREFIX_BYTES = 8
LEAST_LIMIT = 64  # a goodbye, and the smallest of mappings

# Yields the length of a broadcast, is sent its bytes; returns the metadata.
Incoming = Generator[int, memoryview, memoryview]


class MetadataProtocol(Protocol):
    def outgoing(self, metadata: bytes) -> list[bytearray]:
        """The broadcasts that bring `metadata`; ValueError, and nothing has changed, if none do."""

    def incoming(self) -> Incoming:
        """The same broadcasts as the receivers make them."""


class TwoBroadcasts:
    """The size alone, then the metadata."""

    def outgoing(self, metadata: bytes) -> list[bytearray]:
        return [_message(metadata, 0, 0), bytearray(metadata)]

    def incoming(self) -> Incoming:
        prefix = yield PREFIX_BYTES
        metadata = yield _length(prefix)
        return metadata


class FixedMetadata:
    """One broadcast of a size that was chosen beforehand: metadata beyond it cannot travel."""

    def __init__(self, limit: int) -> None:
        if limit < LEAST_LIMIT:
            raise ValueError(f"metadata_limit is {limit}, at least {LEAST_LIMIT} is needed")
        self.limit = limit

    def outgoing(self, metadata: bytes) -> list[bytearray]:
        if len(metadata) > self.limit:
            raise ValueError(
                f"the pickled metadata is {len(metadata)} bytes; the size fixed for it when the "
                f"channel was opened is {self.limit}"
            )
        return [_message(metadata, len(metadata), self.limit)]

    def incoming(self) -> Incoming:
        message = yield PREFIX_BYTES + self.limit
        return message[PREFIX_BYTES : PREFIX_BYTES + _length(message)]


class CachedSize:
    """One broadcast of the size that sufficed so far; what needs more is sent again."""

    def __init__(self) -> None:
        self.size = 0

    def outgoing(self, metadata: bytes) -> list[bytearray]:
        length = len(metadata)
        if length <= self.size:
            return [_message(metadata, length, self.size)]
        too_short = _message(metadata, 0, self.size)
        self.size = length
        return [too_short, _message(metadata, length, length)]

    def incoming(self) -> Incoming:
        message = yield PREFIX_BYTES + self.size
        length = _length(message)
        if length > self.size:
            self.size = length
            message = yield PREFIX_BYTES + length
        return message[PREFIX_BYTES : PREFIX_BYTES + length]


def _message(metadata: bytes, carried: int, size: int) -> bytearray:
    """The length of `metadata`, then `size` bytes of which the first `carried` are its own."""
    message = bytearray(PREFIX_BYTES + size)
    message[:PREFIX_BYTES] = len(metadata).to_bytes(PREFIX_BYTES, "little")
    message[PREFIX_BYTES : PREFIX_BYTES + carried] = metadata[:carried]
    return message


def _length(message: memoryview) -> int:
    return int.from_bytes(message[:PREFIX_BYTES], "little")
