"""A mapping of tensors and plain values as one contiguous run of bytes, and back.

Owns what metadata means, and the numbers of layouts on both sides. Knows nothing of how the bytes
travel: it writes into and reads from any `Region`. The bytes, see also `header`:

    +--------+--------------------------------+---------+----------+----------+
    | header | metadata: one msgpack array    | padding | tensor 0 | tensor 1 | ...
    |        | [definition] dims ... values...|         |          |          |
    +--------+--------------------------------+---------+----------+----------+
                                                        ^ start    ^ multiples of 64

The definition of the layout is there in a frame that DEFINES it; then comes every dimension of
every tensor, then every plain value, both in the layout's order. Tensors are contiguous, row by
row, in native byte order; the end of the last is the end of the frame. A frame that defines a
layout replaces what its number stood for: the sender alone decides which layout makes room, and all
ranks agree.
"""

import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from . import values
from .errors import FrameError, UnsupportedTypeError
from .header import (
    ALIGNMENT,
    CHECKSUM_BYTES,
    CLOSES,
    DEFINES,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_LAYOUTS,
    VERSION,
    Header,
    aligned,
    unpack_header,
    write_header,
)
from .layout import Layout
from .parts import Expected, Parts, Source
from .region import Placement, Region, Repeated

_MAX_PLACEMENTS = 32  # per layout
_MAX_SLACK = 256  # bytes of padding accepted to keep the tensors where they were

assert sys.byteorder == "little", "tensors travel in native byte order"


class Message:
    """A mapping ready to be written: nothing about it can be refused any more."""

    __slots__ = ("defines", "kind", "layout", "metadata", "placement", "sources")

    def __init__(
        self,
        layout: Layout,
        defines: bool,
        metadata: bytes,
        placement: Placement,
        sources: Sequence[Source],
        kind: int,
    ) -> None:
        """`kind`: of the sources, as `parts` tells them apart."""
        self.layout = layout
        self.defines = defines
        self.metadata = metadata
        self.placement = placement
        self.sources = sources
        self.kind = kind

    @property
    def total(self) -> int:
        return self.placement.end

    @property
    def metadata_bytes(self) -> int:
        return HEADER_BYTES + len(self.metadata)


class _Placements:
    """The placements of the layouts in use; frames of equal dimensions share one, and its views."""

    def __init__(self) -> None:
        self._of: dict[Layout, dict[tuple[Any, ...], Placement]] = {}

    def get(self, layout: Layout, dims: list[int], start: int, limit: int) -> Placement:
        """Raises FrameError for dimensions that are none, or end beyond `limit`."""
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
        # The mapping before, while its layout is known to all. Decode steps differ in little but
        # content: to compare with it takes half of what taking a mapping apart does.
        self._last: tuple[Layout, Expected, Placement] | None = None

    def plan(self, mapping: Mapping[Any, Any]) -> Message:
        """Take `mapping` apart and lay its frame out.

        Raises UnsupportedTypeError for what a frame cannot carry, ValueError for a frame above
        MAX_FRAME_BYTES; either way the next plan is none the wiser.
        """
        try:
            if self._last is None:
                return self._plan_anew(mapping)
            layout, expected, placement = self._last
            found = expected.match(mapping)
            if found is None:
                return self._plan_anew(mapping)
            sources, plain, kind = found
            metadata = values.pack([*expected.dims, *plain])
            if not 0 <= placement.start - HEADER_BYTES - len(metadata) <= _MAX_SLACK:
                start = _start(layout, metadata)
                placement = self._placements.get(layout, expected.dims, start, MAX_FRAME_BYTES)
                self._last = (layout, expected, placement)
            return Message(layout, False, metadata, placement, sources, kind)
        except UnicodeEncodeError:
            values.check_text(mapping, "")
            raise
        except (AttributeError, TypeError) as error:
            if isinstance(error, UnsupportedTypeError) or isinstance(mapping, Mapping):
                raise
            kind = type(mapping).__name__
            raise ValueError(f"a frame carries a mapping, not an object of type {kind}") from None
        except RuntimeError as error:  # nested tensors have no sizes
            raise UnsupportedTypeError(f"a tensor without a readable shape: {error}") from error

    def _plan_anew(self, mapping: Mapping[Any, Any]) -> Message:
        parts = Parts(mapping)
        known = self._layouts.get(parts.root)
        layout = known or Layout(self._free_number(), parts.root)
        self._clock += 1
        layout.last_used = self._clock
        if known is None:
            metadata = values.pack([layout.definition(), *parts.dims, *parts.values])
            start = aligned(HEADER_BYTES + len(metadata))
        else:
            metadata = values.pack(parts.dims + parts.values)
            start = _start(layout, metadata)
        try:
            if start > MAX_FRAME_BYTES:
                raise FrameError(f"the metadata alone is {len(metadata)} bytes")
            if known is None:  # not kept: the next frame starts elsewhere
                placement = Placement(layout, parts.dims, start, MAX_FRAME_BYTES)
            else:
                placement = self._placements.get(layout, parts.dims, start, MAX_FRAME_BYTES)
        except FrameError as error:
            raise ValueError(f"a frame holds {MAX_FRAME_BYTES} bytes at most: {error}") from None
        if known is not None:
            expected = Expected.of(parts)
            self._last = (layout, expected, placement) if expected is not None else None
        return Message(layout, known is None, metadata, placement, parts.sources, parts.kind)

    def commit(self, message: Message) -> None:
        """The frame goes out: from here on its layout is known to everyone."""
        if message.defines:
            for root, layout in self._layouts.items():
                if layout.number == message.layout.number:
                    del self._layouts[root]
                    self._placements.forget(layout)
                    self._last = None
                    break
            self._layouts[message.layout.root] = message.layout

    def _free_number(self) -> int:
        if len(self._layouts) < MAX_LAYOUTS:
            return len(self._layouts)
        if self._last is not None:
            self._last[0].last_used = self._clock  # repeated mappings do not move the clock
        return min(self._layouts.values(), key=lambda layout: layout.last_used).number


class Decoder:
    """A receiver's side: frames to mappings."""

    def __init__(self) -> None:
        self._layouts: dict[int, Layout] = {}
        self._placements = _Placements()

    def repeat(
        self, region: Region, memory: memoryview, sequence: int, origin: int
    ) -> tuple[int, int, dict[Any, Any]] | None:
        """The frame that was due, if its dimensions are those of the last one in `region`.

        Returns its bytes, those of header and metadata, and its mapping. None: whatever it is,
        `read_header` and `decode` tell. This is what they do to a repeated frame, in one go.
        """
        repeated = region.repeated
        if repeated is None or len(memory) < HEADER_BYTES:
            return None
        checksum, version, flags, number, received, length, start, total, came_from = unpack_header(
            memory
        )
        end = HEADER_BYTES + length
        if (
            received != sequence
            or start != repeated.start
            or total != repeated.total
            or came_from != origin
            or version != VERSION
            or flags
            or end > start
            or self._layouts.get(number) is not repeated.layout
            or zlib.crc32(memory[CHECKSUM_BYTES:end]) != checksum
        ):
            return None
        mapping = repeated.refill(values.unpack(memory[HEADER_BYTES:end]))
        if mapping is None:
            return None
        region.handed = repeated.views
        return total, end, mapping

    def decode(self, region: Region, header: Header, memory: memoryview) -> dict[Any, Any]:
        """The mapping of a frame whose tensors lie in `region`; they are views of it.

        `memory` holds the frame's header and metadata at least, their checksum checked. Raises
        FrameError.
        """
        _, _, flags, number, sequence, metadata_length, start, _, _ = header
        metadata = memory[HEADER_BYTES : HEADER_BYTES + metadata_length]
        if len(metadata) != metadata_length:
            raise FrameError(f"truncated: {len(metadata)} bytes of metadata are left")
        items = values.unpack(metadata)
        if type(items) is not list:
            raise FrameError("the metadata is no array")
        if flags & DEFINES:
            return self._define(region, header, items)
        layout = self._layouts.get(number)
        if layout is None:
            raise FrameError(f"frame {sequence} has layout {number}, which no frame defined")
        repeated = region.repeated
        if (
            repeated is not None
            and repeated.layout is layout
            and repeated.total == header.total
            and repeated.start == start
            and (mapping := repeated.refill(items)) is not None
        ):
            region.handed = repeated.views
            return mapping
        return self._build(layout, items, region, header)

    def _define(self, region: Region, header: Header, items: list[Any]) -> dict[Any, Any]:
        layout = Layout.from_definition(header.layout, items[0] if items else None)
        mapping = self._build(layout, items[1:], region, header)
        replaced = self._layouts.get(layout.number)
        if replaced is not None:
            self._placements.forget(replaced)
        self._layouts[layout.number] = layout
        return mapping

    def _build(
        self, layout: Layout, items: list[Any], region: Region, header: Header
    ) -> dict[Any, Any]:
        if len(items) != layout.num_dims + layout.num_values:
            raise FrameError(
                f"layout {layout.number} has {layout.num_dims} dimensions and "
                f"{layout.num_values} values, frame {header.sequence} brings {len(items)}"
            )
        if header.total > region.nbytes:
            raise FrameError(f"the frame ends at {header.total}, beyond {region.nbytes}")
        dims = items[: layout.num_dims]
        try:
            placement = self._placements.get(layout, dims, header.start, header.total)
            if placement.end != header.total:
                raise FrameError(f"tensors end at {placement.end}, the frame at {header.total}")
            views = region.hand_out(placement)
        except (RuntimeError, TypeError) as error:  # what torch refuses; an unhashable dimension
            raise FrameError(f"frame {header.sequence} has malformed tensors: {error}") from error
        mapping = layout.build(views, items[layout.num_dims :])
        if layout.is_flat:
            region.repeated = Repeated(
                layout, header.start, header.total, dims, mapping.copy(), region.handed
            )
        return mapping


def write(message: Message, sequence: int, origin: int, region: Region) -> None:
    """Write a whole frame into host memory.

    Raises UnsupportedTypeError for a tensor whose content cannot be read, one on the meta device.
    """
    try:
        region.copy_in(message.placement, message.sources, message.kind)
    except (RuntimeError, NotImplementedError) as error:
        _blame(message, region, error)
    write_head(message, sequence, origin, region)


def write_head(message: Message, sequence: int, origin: int, region: Region) -> None:
    """Write header and metadata into host memory."""
    placement = message.placement
    assert region.memory is not None and placement.end <= region.nbytes
    write_header(
        region.memory,
        message.defines,
        message.layout.number,
        sequence,
        message.metadata,
        placement.start,
        placement.end,
        origin,
    )


def write_goodbye(sequence: int, origin: int, region: Region) -> None:
    """Write the frame that closes a channel; it is as long as a header with its padding."""
    assert region.memory is not None
    write_header(region.memory, CLOSES, 0, sequence, b"", ALIGNMENT, ALIGNMENT, origin)


def rebuild(message: Message, region: Region) -> dict[Any, Any]:
    """What the receivers of `message` see, for the sender itself: views of what it sent.

    To be taken back by the region when the frame is released.
    """
    items = values.unpack(message.metadata)
    plain = items[int(message.defines) + message.layout.num_dims :]
    return message.layout.build(region.hand_out(message.placement), plain)


def _blame(message: Message, region: Region, error: Exception) -> NoReturn:
    """Raise for the source that cannot be copied, naming it."""
    views = region.views(message.placement)
    paths = message.layout.tensor_paths()
    for path, view, source in zip(paths, views, message.sources, strict=True):
        try:
            view.copy_(torch.as_tensor(source))
        except (RuntimeError, NotImplementedError) as its_error:
            raise UnsupportedTypeError(f"{path}: {its_error}") from its_error
    raise UnsupportedTypeError(f"a tensor cannot be copied: {error}") from error


def _start(layout: Layout, metadata: bytes) -> int:
    """Where the tensors begin: a count that needs one byte more must not move them all."""
    start = aligned(HEADER_BYTES + len(metadata))
    if not 0 <= layout.start - start <= _MAX_SLACK:
        layout.start = start
    return layout.start
