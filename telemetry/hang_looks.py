"""One look at one rank: is its process there, what is it in, how far did it come in each group.

Owns the questions that a diagnosis asks of a rank's records. Draws no conclusions, compares no
ranks. Times are in the clock of the rows, whichever that is, as long as all looks share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from .desync import joinable
from .errors import TelemetryError
from .flight_ring import RingImage, read_ring
from .flight_words import call_text, label_of, name_at, seconds_text, unique_of
from .ring import (
    BEGIN,
    COLLECTIVE,
    END,
    META,
    PHASE,
    RECORD_WORDS,
    SEQUENCE,
    STEP,
    STEP_KIND,
    meta_group,
    meta_kind,
    meta_name,
)
from .ring_reader import RingReader, Rows

RUNNING, STOPPED, TRACED, DEAD, ENDED = "running", "stopped", "traced", "dead", "ended"
_RECENT = 16384  # records looked back at

Row = list[int]


def no_rows() -> Rows:
    return np.empty((0, RECORD_WORDS), np.int64)


@dataclass(frozen=True, slots=True)
class RankLook:
    """What is known of one rank at the moment of a look."""

    rank: int
    state: str  # one of the five above; "ended": it has closed its ring
    pending: Rows  # records in flight, of any kinds
    finished: Rows  # the latest finished ones, as far back as they are there
    names: Sequence[str]
    pid: int = 0
    world_size: int = 0
    local_world_size: int = 0
    whole: bool = True  # `finished` reaches back to the first record


def process_state(pid: int, start_time: int) -> str:
    """Of the process with this id that started then (field 22 of /proc/<pid>/stat)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return DEAD
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX" or int(fields[19]) != start_time:
        return DEAD
    return {"T": STOPPED, "t": TRACED}.get(fields[0], RUNNING)


def look_at_image(image: RingImage, state: str | None = None) -> RankLook:
    """A look at a ring as it was read; `state`: of its process, if that is not to be asked now."""
    if state is None:
        state = ENDED if image.closed else process_state(image.pid, image.start_time)
    return RankLook(
        image.rank,
        state,
        image.in_flight,
        image.finished,
        image.names,
        image.pid,
        image.world_size,
        image.local_world_size,
        whole=len(image.rows) >= image.head,
    )


def look_at(reader: RingReader, pending: Rows) -> RankLook:
    """A look at a live rank; consumes nothing. `pending` serves if its file is gone by now."""
    try:
        return look_at_image(read_ring(reader.path, last=_RECENT))
    except (OSError, TelemetryError):
        alive = RUNNING if reader.alive else DEAD
        return RankLook(
            reader.rank,
            ENDED if reader.closed else alive,
            pending[pending[:, END] == 0],
            no_rows(),
            reader.names,
            reader.pid,
            reader.world_size,
            reader.local_world_size,
            whole=False,
        )


@dataclass(frozen=True)
class RankView:
    """A look, with what a diagnosis asks of it."""

    look: RankLook
    groups: dict[str, int] = field(default_factory=dict)  # unique name: index of its entry

    def __post_init__(self) -> None:
        for index, entry in enumerate(self.look.names):
            if "\t" in entry:
                self.groups[unique_of(entry)] = index

    @property
    def rank(self) -> int:
        return self.look.rank

    @property
    def alive(self) -> bool:
        return self.look.state in (RUNNING, STOPPED, TRACED)

    @cached_property
    def in_flight(self) -> list[Row]:
        """What has begun and not ended, in the order it began."""
        rows: list[Row] = self.look.pending.tolist()
        return sorted((row for row in rows if not row[END]), key=lambda row: row[BEGIN])

    @cached_property
    def collectives(self) -> list[Row]:
        """Those of `in_flight` that are collectives."""
        return [row for row in self.in_flight if meta_kind(row[META]) == COLLECTIVE]

    def name(self, row: Row) -> str:
        return name_at(self.look.names, meta_name(row[META]))

    def group(self, row: Row) -> str:
        """The entry of a collective's group, "label\\tunique name"."""
        return name_at(self.look.names, meta_group(row[META]))

    def key(self, row: Row) -> tuple[str, int] | None:
        """What names a collective on all ranks; None if nothing does."""
        entry = self.group(row)
        return (unique_of(entry), row[SEQUENCE]) if joinable(entry, self.name(row)) else None

    def _finished_of(self, unique: str, *, shared: bool = True) -> Rows:
        """The finished collectives of a group that its other ranks have too; or those they lack."""
        rows = self.look.finished
        index = self.groups.get(unique)
        if index is None or not len(rows):
            return no_rows()
        metas = rows[:, META]
        names = self.look.names
        own = [n for n, name in enumerate(names) if not joinable(names[index], name)]
        chosen = ((metas & 0xF) == COLLECTIVE) & ((metas >> 16 & 0xFFF) == index)
        found: Rows = rows[chosen & (np.isin(metas >> 4 & 0xFFF, own) != shared)]
        return found

    def call(self, unique: str, sequence: int) -> Row | None:
        """The collective of this number in the group, in flight or finished."""
        for row in self.collectives:
            if self.key(row) == (unique, sequence):
                return row
        return self.finished_call(unique, sequence)

    def finished_call(self, unique: str, sequence: int, *, shared: bool = True) -> Row | None:
        """Only if it has finished; without `shared`, a point-to-point call of this rank."""
        rows = self._finished_of(unique, shared=shared)
        rows = rows[rows[:, SEQUENCE] == sequence]
        return rows[-1].tolist() if len(rows) else None

    def entered(self, unique: str) -> int:
        """The highest number of a collective of the group that this rank has called; 0: none."""
        open_numbers = [
            row[SEQUENCE]
            for row in self.collectives
            if (key := self.key(row)) is not None and key[0] == unique
        ]
        return max([self.last_finished(unique), *open_numbers])

    def last_finished(self, unique: str) -> int:
        """The highest number of a finished collective of the group; 0: none that is known."""
        rows = self._finished_of(unique)
        return int(rows[:, SEQUENCE].max()) if len(rows) else 0

    @cached_property
    def innermost(self) -> Row | None:
        """The phase or collective in flight that began last: what the rank is in."""
        inner = [row for row in self.in_flight if meta_kind(row[META]) in (COLLECTIVE, PHASE)]
        return inner[-1] if inner else None

    @cached_property
    def last_sign(self) -> tuple[int, Row] | None:
        """When the rank last recorded anything, and the record."""
        rows = np.concatenate([self.look.finished, self.look.pending])
        rows = rows[np.isin(rows[:, META] & 0xF, (COLLECTIVE, PHASE, STEP_KIND))]
        if not len(rows):
            return None
        times = np.maximum(rows[:, BEGIN], rows[:, END])
        latest = int(times.argmax())
        return int(times[latest]), rows[latest].tolist()

    def went_on_after(self, row: Row) -> int | None:
        """When it last recorded anything that began or ended after `row` began; None if nothing."""
        if self.last_sign is None or self.last_sign[1][BEGIN:] == row[BEGIN:]:
            return None
        when = self.last_sign[0]
        return when if when > row[BEGIN] else None

    def phase_around(self, row: Row) -> str:
        """The innermost phase that was open when `row` began; empty if none."""
        around = [
            other
            for other in self.in_flight
            if meta_kind(other[META]) == PHASE and other[BEGIN] <= row[BEGIN]
        ]
        return self.name(around[-1]) if around else ""

    @property
    def idle(self) -> bool:
        """Between steps, with nothing open."""
        return self.look.state == RUNNING and not self.in_flight

    def place(self, now_ns: int) -> str:
        """ "in kv.swap_in for 12.1 s": its phase or collective; without one, its last record."""
        inner = self.innermost
        if inner is not None:
            dead = self.look.state in (DEAD, ENDED)
            age = "" if dead else f" for {seconds_text(now_ns - inner[BEGIN])}"
            if meta_kind(inner[META]) == PHASE:
                return f"in {self.name(inner)}{age}"
            waiting = "waiting " if self.look.state == RUNNING else ""
            return f"{waiting}in {call_text(inner, self.look.names)}{age}"
        steps = [row[STEP] for row in self.in_flight if meta_kind(row[META]) == STEP_KIND]
        where = f"in step {steps[-1]}, in no phase" if steps else "in no phase"
        if self.last_sign is None:
            return f"{where}, with nothing recorded yet"
        when, row = self.last_sign
        return f"{where}, {seconds_text(now_ns - when)} after {self._event(row)}"

    def _event(self, row: Row) -> str:
        kind = meta_kind(row[META])
        if kind == COLLECTIVE:
            what = call_text(row, self.look.names)
        else:
            what = f"step {row[STEP]}" if kind == STEP_KIND else self.name(row)
        return f"{'the end' if row[END] else 'the beginning'} of {what}"

    def label(self, unique: str) -> str:
        index = self.groups.get(unique)
        return unique if index is None else label_of(self.look.names[index])
