"""The header of a frame: its bytes, and the checks that stand before any use of them.

Owns the format below down to the end of the metadata. Knows nothing of what metadata means.

    offset  size
            +-------------------------------------------------------+
      0     |   4   crc32 of what follows, to the metadata's end    |
      4     |   1   version                                         |
      5     |   1   flags                                           |
      6     |   2   layout number                                   |
      8     |   8   sequence number                                 |
     16     |   4   metadata length                                 |
     20     |   4   start of the tensors, a multiple of 64          |
     24     |   4   total length                                    |
     28     |   4   origin: channel number, sender's rank           |
            +-------------------------------------------------------+
     32     |       metadata                                        |
            +-------------------------------------------------------+
            |       padding                                         |
            +-------------------------------------------------------+
     start  |       tensors, to the total length                    |
            +-------------------------------------------------------+

All numbers are little-endian. The origin tells frames of one channel from those of another: its low
half is the sender's global rank, its high half a number drawn when the channel opened.
"""

import struct
import zlib
from typing import NamedTuple

from .errors import FrameError, OutOfStep

VERSION = 0xC1  # an octet that msgpack never uses: other traffic is unlikely to have it here
DEFINES = 1  # the metadata begins with the definition of the layout
CLOSES = 2  # the last frame of a channel; it has no metadata

ALIGNMENT = 64  # of each tensor: a cache line, and enough for any vector load
MAX_FRAME_BYTES = (1 << 32) - 1
MAX_LAYOUTS = 128

_HEADER = struct.Struct("<IBBHQIIII")
_CHECKED = struct.Struct("<BBHQIIII")  # all but the checksum
CHECKSUM_BYTES = 4
HEADER_BYTES = _HEADER.size

unpack_header = _HEADER.unpack_from


class Header(NamedTuple):
    """The fields, in their order."""

    checksum: int
    version: int
    flags: int
    layout: int
    sequence: int
    metadata_length: int
    start: int
    total: int
    origin: int


def make_origin(sender: int, channel: int) -> int:
    """The origin of what global rank `sender` publishes on the channel of this number."""
    return (channel & 0xFFFF) << 16 | sender & 0xFFFF


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to where a tensor may begin."""
    return (nbytes + ALIGNMENT - 1) & -ALIGNMENT


def write_header(
    memory: memoryview,
    flags: int,
    layout: int,
    sequence: int,
    metadata: bytes,
    start: int,
    total: int,
    origin: int,
) -> None:
    """Write header and metadata to the front of `memory`."""
    fields = _CHECKED.pack(VERSION, flags, layout, sequence, len(metadata), start, total, origin)
    checked = fields + metadata
    checksum = zlib.crc32(checked).to_bytes(CHECKSUM_BYTES, "little")
    memory[: CHECKSUM_BYTES + len(checked)] = checksum + checked


def read_header(memory: memoryview, expected: int, origin: int) -> Header:
    """The header at the front of `memory`, its lengths consistent with one another.

    The checksum is checked if `memory` holds all metadata; if not, call `check_metadata` once it
    does. Raises FrameError, and OutOfStep if sequence number or origin are not the expected ones.
    """
    if len(memory) < HEADER_BYTES:
        raise FrameError(f"{len(memory)} bytes are no frame: its header alone is {HEADER_BYTES}")
    # Around the generated __new__: it runs Python code for what is one C call.
    header = tuple.__new__(Header, unpack_header(memory))
    checksum, version, flags, layout, sequence, metadata_length, start, total, came_from = header
    if version != VERSION:
        raise FrameError(f"no frame of this version: {version:#x} stands where {VERSION:#x} should")
    end = HEADER_BYTES + metadata_length
    if end <= len(memory) and zlib.crc32(memory[CHECKSUM_BYTES:end]) != checksum:
        raise FrameError(f"the checksum of a frame of {total} bytes does not fit")
    if not end <= start <= total or start % ALIGNMENT:
        raise FrameError(
            f"lengths disagree: metadata ends at {end}, tensors start at {start}, "
            f"the frame ends at {total}"
        )
    if flags > CLOSES or layout >= MAX_LAYOUTS:
        raise FrameError(f"flags are {flags:#x}, layout is {layout}")
    if sequence != expected or came_from != origin:
        raise OutOfStep(expected, sequence, layout, origin, came_from)
    return header


def check_metadata(header: Header, memory: memoryview) -> None:
    """Raise FrameError unless the checksum fits header and metadata."""
    end = HEADER_BYTES + header.metadata_length
    if len(memory) < end:
        raise FrameError(f"truncated: {len(memory)} bytes of {end} with the metadata")
    if zlib.crc32(memory[CHECKSUM_BYTES:end]) != header.checksum:
        raise FrameError(f"the checksum of a frame of {header.total} bytes does not fit")
