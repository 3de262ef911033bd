"""What torch cannot see of a frame: encoding, publishing, waiting and decoding.

Implements `onecast.comm.Probe` on a ring. Which way a frame went is in the record's name
("published" or "received"), the channel's label in its group entry.
"""

from collections.abc import Callable

from .ring import FRAME, RingWriter, pack_meta

_METADATA_BITS, _BYTES_BITS = 24, 40
_MOST_BYTES, _MOST_BROADCASTS = (1 << _BYTES_BITS) - 1, 0x7FFF
_MOST_METADATA, _MOST_NS = (1 << _METADATA_BITS) - 1, (1 << 38) - 1


def pack_frame(
    frame_bytes: int, metadata_bytes: int, broadcasts: int, last_part_ns: int
) -> tuple[int, int]:
    """The words `nbytes` and `aux` of a FRAME record; what does not fit is capped."""
    # Without min(): four calls are half a microsecond.
    if frame_bytes > _MOST_BYTES:
        frame_bytes = _MOST_BYTES
    if broadcasts > _MOST_BROADCASTS:
        broadcasts = _MOST_BROADCASTS
    if metadata_bytes > _MOST_METADATA:
        metadata_bytes = _MOST_METADATA
    if last_part_ns > _MOST_NS:
        last_part_ns = _MOST_NS
    return (
        frame_bytes | broadcasts << _BYTES_BITS,
        metadata_bytes | last_part_ns << _METADATA_BITS,
    )


def unpack_frame(nbytes: int, aux: int) -> tuple[int, int, int, int]:
    """frame bytes, metadata bytes, broadcasts, nanoseconds of the last part"""
    return (
        nbytes & ((1 << _BYTES_BITS) - 1),
        aux & ((1 << _METADATA_BITS) - 1),
        nbytes >> _BYTES_BITS,
        aux >> _METADATA_BITS,
    )


class RingProbe:
    """Writes one FRAME record per frame: about a microsecond."""

    def __init__(self, ring: RingWriter, channel: str = "step") -> None:
        entry = ring.intern(channel)
        self._record: Callable[[int, int, int, int, int, int], None] = ring.record
        self._published = pack_meta(FRAME, ring.intern("published"), entry)
        self._received = pack_meta(FRAME, ring.intern("received"), entry)

    def published(
        self, sequence: int, frame_bytes: int, metadata_bytes: int, broadcasts: int,
        encode_start_ns: int, publish_start_ns: int, end_ns: int,
    ) -> None:  # fmt: skip
        nbytes, aux = pack_frame(frame_bytes, metadata_bytes, broadcasts, end_ns - publish_start_ns)
        self._record(encode_start_ns, end_ns, self._published, sequence, nbytes, aux)

    def received(
        self, sequence: int, frame_bytes: int, metadata_bytes: int, broadcasts: int,
        wait_start_ns: int, decode_start_ns: int, end_ns: int,
    ) -> None:  # fmt: skip
        nbytes, aux = pack_frame(frame_bytes, metadata_bytes, broadcasts, end_ns - decode_start_ns)
        self._record(wait_start_ns, end_ns, self._received, sequence, nbytes, aux)
