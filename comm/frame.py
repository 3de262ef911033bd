"""A mapping of tensors and plain values as one contiguous run of bytes, and back.

Owns the format below, its checks, and the numbers of layouts on both sides. Knows nothing of how
the bytes travel: it writes into and reads from any `Region`.

     0        1        2                 4                        8
     +--------+--------+-----------------+------------------------+
     |version | flags  | layout number   | metadata length        |
     +--------+--------+-----------------+------------------------+
     | start of tensors                  | total length           |
     +-----------------------------------+------------------------+
     | sequence number                                            |
     +-----------------------------------+------------------------+
     | crc32 of all above and metadata   | metadata ...           |
     +-----------------------------------+         ...            |
     | padding up to the start, a multiple of 64                  |
     +------------------------------------------------------------+
     | tensors in the order of the layout, each at a multiple of  |
     | 64, contiguous, row by row; total length is the last's end |
     +------------------------------------------------------------+

All numbers are little-endian. Metadata is one msgpack array: with DEFINES the definition of the
layout, then every dimension, then every plain value. A frame that defines a layout replaces what
its number stood for: the sender alone decides which layout makes room, and all ranks agree.
CLOSES marks the last frame of a channel; it has no metadata.
"""

import struct
import sys
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from . import values
from .errors import FrameError, OutOfStep
from .layout import Layout, Parts, Source
from .region import ALIGNMENT, Placement, Region

VERSION = 0xC1  # an octet that msgpack never uses: other traffic is unlikely to begin with it
DEFINES = 1
CLOSES = 2

_FIELDS = struct.Struct("<BBHIIIQ")
_HEADER = struct.Struct("<BBHIIIQI")
HEADER_BYTES = _HEADER.size
MAX_FRAME_BYTES = (1 << 32) - 1
MAX_LAYOUTS = 128

_MAX_PLACEMENTS = 32  # per layout
_MAX_SLACK = 256  # bytes of padding accepted to keep the tensors where they were

assert sys.byteorder == "little", "tensors travel in native byte order"


class Header(NamedTuple):
    """The checked header of a frame."""

    flags: int
    layout: int
    metadata_length: int
    start: int
    total: int
    sequence: int
    checksum: int

    @property
    def metadata_bytes(self) -> int:
        return HEADER_BYTES + self.metadata_length


class Message(NamedTuple):
    """A mapping ready to be written: nothing about it can be refused any more."""

    layout: Layout
    defines: bool
    metadata: bytes
    placement: Placement
    start: int
    total: int
    sources: list[Source]
    has_arrays: bool

    @property
    def metadata_bytes(self) -> int:
        return HEADER_BYTES + len(self.metadata)


class _Placements:
    """The placements of the layouts in use; frames of equal dimensions share one, and its views."""

    def __init__(self) -> None:
        self._of: dict[Layout, dict[tuple[Any, ...], Placement]] = {}

    def get(self, layout: Layout, dims: list[int], start: int, limit: int) -> Placement:
        key = (start, *dims)
        known = self._of.get(layout)
        if known is None:
            known = self._of[layout] = {}
        placement = known.get(key)
        if placement is None:
            placement = Placement(layout, dims, start, limit)
            if len(known) >= _MAX_PLACEMENTS:
                del known[next(iter(known))]
            known[key] = placement
        return placement

    def forget(self, layout: Layout) -> None:
        self._of.pop(layout, None)


class Encoder:
    """The sender's side: mappings to frames. `plan` changes nothing that the peers depend on."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self._placements = _Placements()
        self._clock = 0

    def plan(self, mapping: Mapping[Any, Any]) -> Message:
        """Take `mapping` apart and lay its frame out.

        Raises UnsupportedTypeError for what a frame cannot carry, ValueError for a frame above
        MAX_FRAME_BYTES; either way the next plan is none the wiser.
        """
        parts = Parts(mapping)
        layout = self._layouts.get(parts.root)
        defines = layout is None
        if layout is None:
            layout = Layout(self._free_number(), parts.root)
            items = [layout.definition(), *parts.dims, *parts.values]
        else:
            items = parts.dims + parts.values
        try:
            metadata = values.pack(items)
        except UnicodeEncodeError:
            values.check_text(mapping, "")
            raise
        start = -(-(HEADER_BYTES + len(metadata)) // ALIGNMENT) * ALIGNMENT
        if not defines:
            # A count that needs one byte more must not move every tensor to a new address.
            if 0 < layout.start - start <= _MAX_SLACK:
                start = layout.start
            layout.start = start
        try:
            placement = self._placements.get(layout, parts.dims, start, MAX_FRAME_BYTES)
            if start > MAX_FRAME_BYTES:
                raise FrameError(f"the metadata is {len(metadata)} bytes")
        except FrameError as error:
            raise ValueError(f"a frame holds {MAX_FRAME_BYTES} bytes at most: {error}") from None
        finally:
            if defines:
                self._placements.forget(layout)
        return Message(
            layout,
            defines,
            metadata,
            placement,
            start,
            placement.end,
            parts.sources,
            parts.has_arrays,
        )

    def commit(self, message: Message) -> None:
        """The frame goes out: from here on its layout is known to everyone."""
        self._clock += 1
        message.layout.last_used = self._clock
        if message.defines:
            for root, layout in self._layouts.items():
                if layout.number == message.layout.number:
                    del self._layouts[root]
                    self._placements.forget(layout)
                    break
            self._layouts[message.layout.root] = message.layout

    def _free_number(self) -> int:
        if len(self._layouts) < MAX_LAYOUTS:
            return len(self._layouts)
        return min(self._layouts.values(), key=lambda layout: layout.last_used).number


class Decoder:
    """A receiver's side: frames to mappings."""

    def __init__(self) -> None:
        self._layouts: dict[int, Layout] = {}
        self._placements = _Placements()

    def decode(self, region: Region, header: Header, memory: memoryview) -> dict[Any, Any]:
        """The mapping of a frame whose tensors lie in `region`; they are views of it.

        `memory` holds the frame's header and metadata at least, their checksum checked. Raises
        FrameError.
        """
        metadata = memory[HEADER_BYTES : header.metadata_bytes]
        if len(metadata) != header.metadata_length:
            raise FrameError(f"truncated: {len(metadata)} bytes of metadata are left")
        items = values.unpack(metadata)
        if type(items) is not list:
            raise FrameError("the metadata is no array")
        if header.flags & DEFINES:
            layout = Layout.from_definition(header.layout, items[0] if items else None)
            del items[0]
        else:
            known = self._layouts.get(header.layout)
            if known is None:
                raise FrameError(
                    f"frame {header.sequence} has layout {header.layout}, which no frame defined"
                )
            layout = known
        if len(items) != layout.num_dims + layout.num_values:
            raise FrameError(
                f"layout {layout.number} has {layout.num_dims} dimensions and "
                f"{layout.num_values} values, frame {header.sequence} brings {len(items)}"
            )
        mapping = _build(layout, items, region, header, self._placements)
        if header.flags & DEFINES:
            replaced = self._layouts.get(layout.number)
            if replaced is not None:
                self._placements.forget(replaced)
            self._layouts[layout.number] = layout
        return mapping


def _build(
    layout: Layout, items: list[Any], region: Region, header: Header, placements: _Placements
) -> dict[Any, Any]:
    dims = items[: layout.num_dims]
    try:
        placement = placements.get(layout, dims, header.start, min(header.total, region.nbytes))
        if placement.end != header.total:
            raise FrameError(f"the tensors end at {placement.end}, the frame at {header.total}")
        views = region.views(placement)
    except (RuntimeError, TypeError) as error:  # what torch refuses; an unhashable dimension
        raise FrameError(
            f"the tensors of frame {header.sequence} are malformed: {error}"
        ) from error
    return layout.build(views, items[layout.num_dims :])


def write(message: Message, sequence: int, region: Region) -> None:
    """Write a whole frame into host memory."""
    region.copy_in(message.placement, message.sources, message.has_arrays)
    write_head(message, sequence, region)


def write_head(message: Message, sequence: int, region: Region) -> None:
    """Write header and metadata into host memory."""
    memory = region.memory
    assert memory is not None and message.total <= region.nbytes
    metadata = message.metadata
    fields = _FIELDS.pack(
        VERSION,
        message.defines,
        message.layout.number,
        len(metadata),
        message.start,
        message.total,
        sequence,
    )
    checksum = zlib.crc32(metadata, zlib.crc32(fields))
    memory[: HEADER_BYTES + len(metadata)] = fields + checksum.to_bytes(4, "little") + metadata


def write_goodbye(sequence: int, region: Region) -> None:
    """Write the frame that closes a channel; it is as long as the header with its padding."""
    assert region.memory is not None
    fields = _FIELDS.pack(VERSION, CLOSES, 0, 0, ALIGNMENT, ALIGNMENT, sequence)
    region.memory[:HEADER_BYTES] = fields + zlib.crc32(fields).to_bytes(4, "little")


def read_header(memory: memoryview, expected: int) -> Header:
    """The header at the front of `memory`, its lengths consistent with one another.

    The checksum is checked if `memory` holds all metadata (`header.metadata_bytes`); if not, call
    `check_metadata` once it does. Raises FrameError, and OutOfStep if the sequence number is not
    `expected`.
    """
    if len(memory) < HEADER_BYTES:
        raise FrameError(f"{len(memory)} bytes are no frame: its header alone is {HEADER_BYTES}")
    version, *fields = _HEADER.unpack_from(memory)
    if version != VERSION:
        raise FrameError(f"no frame of this version: it begins with {version:#x}, not {VERSION:#x}")
    header = Header(*fields)
    metadata_end = HEADER_BYTES + header.metadata_length
    if metadata_end <= len(memory):
        check_metadata(header, memory)
    if not metadata_end <= header.start <= header.total or header.start % ALIGNMENT:
        raise FrameError(
            f"lengths disagree: metadata ends at {metadata_end}, tensors start at {header.start}, "
            f"the frame ends at {header.total}"
        )
    if header.flags & ~(DEFINES | CLOSES) or header.layout >= MAX_LAYOUTS:
        raise FrameError(f"flags are {header.flags:#x}, layout is {header.layout}")
    if header.sequence != expected:
        raise OutOfStep(expected, header.sequence, header.layout)
    return header


def check_metadata(header: Header, memory: memoryview) -> None:
    """Raise FrameError unless the checksum fits header and metadata."""
    end = HEADER_BYTES + header.metadata_length
    if len(memory) < end:
        raise FrameError(f"truncated: {len(memory)} bytes of {end} with the metadata")
    checksum = zlib.crc32(memory[HEADER_BYTES:end], zlib.crc32(memory[: _FIELDS.size]))
    if checksum != header.checksum:
        raise FrameError(f"checksum is {checksum:#x}, {header.checksum:#x} was sent")


def rebuild(message: Message, region: Region) -> dict[Any, Any]:
    """What the receivers of `message` see, for the sender itself: views of what it sent."""
    items = values.unpack(message.metadata)
    plain = items[int(message.defines) + message.layout.num_dims :]
    views: list[torch.Tensor] = region.views(message.placement)
    return message.layout.build(views, plain)
