"""What the spans of one shape have in common: name, attributes in their order, which of them vary.

Owns the attributes of a step's spans. Knows neither where values come from nor where spans go: a
`Column` stands for what differs from span to span.

A shape is a number: the meta word of the record (see `ring`), and above its 56 bits

    56 waited     arrival_wait_ns and is_last are known
    57 unwaited   nobody called Work.wait
    58 cut        the operation went on after its parent's end
    59 sent       a phase that sent a frame
    60 received   a phase that received one
    61 sized      a step whose batch size is known
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

from .labels import group_label
from .ring import COLLECTIVE, STEP_KIND, meta_dtype, meta_group, meta_kind, meta_name
from .spans import Attribute

META_MASK = (1 << 56) - 1
WAITED, UNWAITED, CUT, SENT, RECEIVED, SIZED = (1 << bit for bit in range(56, 62))


class Column(enum.Enum):
    """A value that differs from span to span; the value is its name in `span_table.RankSpans`."""

    STEP = "step"
    NBYTES = "nbytes"  # payload; of a step its batch size
    NUMBER = "number"
    WAIT = "wait_ns"
    IS_LAST = "is_last"  # the one that is true or false
    CUT = "cut_ns"
    FRAME_SEQUENCE = "frame_sequence"
    FRAME_BYTES = "frame_bytes"
    FRAME_METADATA = "frame_metadata"
    FRAME_BROADCASTS = "frame_broadcasts"
    FRAME_FIRST = "frame_first_ns"
    FRAME_LAST = "frame_last_ns"


class Shape(NamedTuple):
    name: str
    attributes: tuple[tuple[str, Attribute | Column], ...]
    error: str | None


def name_at(names: Sequence[str], number: int) -> str:
    """An entry of a name table; one that is not there has come from a torn record."""
    return names[number] if number < len(names) else "(unknown)"


def shape_of(key: int, names: Sequence[str], error: str | None) -> Shape:
    meta = key & META_MASK
    found: list[tuple[str, Attribute | Column]] = []
    kind = meta_kind(meta)
    name = "worker.step" if kind == STEP_KIND else name_at(names, meta_name(meta))
    if kind == STEP_KIND:
        found.append(("onecast.step.id", Column.STEP))
        if key & SIZED:
            found.append(("onecast.batch.size", Column.NBYTES))
    elif kind == COLLECTIVE:
        found += [
            ("onecast.collective.op", name),
            ("onecast.collective.group", group_label(name_at(names, meta_group(meta)))),
            ("onecast.collective.seq", Column.NUMBER),
            ("onecast.collective.bytes", Column.NBYTES),
            ("onecast.collective.dtype", name_at(names, meta_dtype(meta))),
        ]
        if key & WAITED:
            found += [
                ("onecast.collective.arrival_wait_ns", Column.WAIT),
                ("onecast.collective.is_last", Column.IS_LAST),
            ]
        if key & UNWAITED:
            found.append(("onecast.collective.unwaited", True))
    if key & CUT:
        found.append(("onecast.cut_off_ns", Column.CUT))
    if key & (SENT | RECEIVED):
        parts = ("encode", "publish") if key & SENT else ("wait", "decode")
        found += [
            ("onecast.frame.sequence", Column.FRAME_SEQUENCE),
            ("onecast.frame.bytes", Column.FRAME_BYTES),
            ("onecast.frame.metadata_bytes", Column.FRAME_METADATA),
            ("onecast.frame.broadcasts", Column.FRAME_BROADCASTS),
            (f"onecast.frame.{parts[0]}_ns", Column.FRAME_FIRST),
            (f"onecast.frame.{parts[1]}_ns", Column.FRAME_LAST),
        ]
    if error is not None:
        found.append(("error.type", error))
    return Shape(name, tuple(found), error)
