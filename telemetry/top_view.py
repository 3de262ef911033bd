"""What `onecast top` reads of `/live.json`, checked while it is read.

Owns which fields it needs and their bounds; `live` and `live_steps` say what they mean. Whoever
answers at an address may answer anything: what passes here can be drawn without another look, save
that names are any text at all.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from .live import FORMAT

Integer = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Milliseconds = Annotated[int, Meta(ge=0, le=1 << 46)]  # a time that calendars know

Kind = tuple[
    str, str, Integer, Integer, str, Integer
]  # op, group, its number, its size, dtype, bytes
Phase = tuple[Count, Integer, Integer, Integer]  # number of its name, begin, duration, flags


class Rank(Struct, frozen=True):
    rank: Count
    up: bool
    step: Integer
    phase: str | None


class Steps(Struct, frozen=True):
    count: Count
    p50_s: Seconds | None
    p99_s: Seconds | None
    seconds: Seconds
    exposed_s: Seconds
    hist: list[Integer]


class Bars(Struct, frozen=True):
    begin: list[Integer]
    took: list[Integer]
    wait: list[Integer]
    kind: list[Count]
    sequence: list[Integer]
    flags: list[Count]

    def __post_init__(self) -> None:
        columns = (self.begin, self.took, self.wait, self.kind, self.sequence, self.flags)
        if len({len(column) for column in columns}) > 1:
            raise ValueError("the columns of a lane's bars differ in length")


class Lane(Struct, frozen=True):
    rank: Count
    begin_ns: Integer
    end_ns: Integer
    error: str | None
    phases: list[Phase]
    bars: Bars
    caused: tuple[Count, Integer]


class Detail(Struct, frozen=True):
    kinds: list[Kind]
    phase_names: list[str]
    lanes: list[Lane]
    left_out: Count

    def __post_init__(self) -> None:
        for lane in self.lanes:
            if max(lane.bars.kind, default=-1) >= len(self.kinds):
                raise ValueError("a bar is of a kind that is not listed")
            if max((phase[0] for phase in lane.phases), default=-1) >= len(self.phase_names):
                raise ValueError("a phase has no name")


class Step(Struct, frozen=True):
    step: Integer
    reason: str
    duration_ns: Count
    batch: Integer
    bars: Count
    error: str | None
    detail: Detail | None = None


class Latency(Struct, frozen=True):
    op: str
    group: str
    size: str
    clock: str
    count: Count
    p50_s: Seconds | None
    p99_s: Seconds | None
    bus_bytes: Count
    transfer_s: Seconds
    hist: list[Integer] | None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.group, self.size, self.clock


class Straggler(Struct, frozen=True):
    rank: Count
    joined: Count
    last: Count
    waited_s: Seconds


class InFlight(Struct, frozen=True):
    rank: Count
    op: str
    group: str
    sequence: Integer
    bytes: Integer
    age_s: Seconds


class Hang(Struct, frozen=True):
    kind: str
    text: str


class Dropped(Struct, frozen=True):
    signal: str
    reason: str
    count: Count


class Unrecorded(Struct, frozen=True):
    rank: Count
    group: str
    count: Count


class Unjoined(Struct, frozen=True):
    reason: str
    count: Count


class Failed(Struct, frozen=True):
    op: str
    group: str
    rank: Count
    type: str
    count: Count


class Health(Struct, frozen=True):
    dropped: list[Dropped]
    restarts: Count
    unrecorded: list[Unrecorded]
    unjoined: list[Unjoined]
    errors: list[Failed]


class LiveView(Struct, frozen=True):
    now_ms: Milliseconds
    engine_id: str
    world_size: Integer
    local_world_size: Integer
    ranks: list[Rank]
    steps: Steps
    kept: list[Step]
    latency: list[Latency]
    latency_left_out: Count
    stragglers: list[Straggler]
    in_flight: list[InFlight]
    hangs: list[Hang]
    health: Health


class _Format(Struct):
    format: int


def read_view(body: bytes) -> LiveView:
    """The view. Raises ValueError: it is none, or of another format than ours."""
    found = msgspec.json.decode(body, type=_Format).format  # its errors are ValueErrors
    if found != FORMAT:
        raise ValueError(f"its format is {found}; this onecast reads {FORMAT}")
    return msgspec.json.decode(body, type=LiveView)
