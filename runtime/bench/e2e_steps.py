"""The steps of a turn as all ranks saw them, put side by side on one clock.

Owns what the parts of a step are called and how a wait for the driver is told from the broadcast.
Knows nothing of medians.

    rank 0      schedule  publish  ahead  forward  sample  commit
    the others  wait      broadcast       forward

A receiver waits until the driver begins to publish; from then on, or from its call if that comes
later, until the mapping is in hand, it is the broadcast's. The broadcast of a step lasts from the
driver beginning to publish until the last rank has the mapping in hand; the driver, which made it,
has it when `publish` returns. On a GPU phases are the host's: "forward" launches, "sample" waits
for the device.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .e2e_phases import RecordedStep, Span
from .e2e_run import Turn

SCHEDULE, PUBLISH, AHEAD, FORWARD = "schedule", "publish", "ahead", "forward"
SAMPLE, COMMIT, MOVE = "sample", "commit", "move blocks"
WAIT, BROADCAST, OTHER = "wait", "broadcast", "other"
DRIVER_PHASES = (SCHEDULE, PUBLISH, AHEAD, MOVE, FORWARD, SAMPLE, COMMIT, OTHER)
WORKER_PHASES = (WAIT, BROADCAST, MOVE, FORWARD, OTHER)

_NAMES = {
    "schedule": SCHEDULE,
    "step.publish": PUBLISH,
    "schedule.ahead": AHEAD,
    "step.receive": WAIT,
    "kv.swap_out": MOVE,
    "kv.swap_in": MOVE,
    "kv.copy": MOVE,
    "model.forward": FORWARD,
    "sample": SAMPLE,
    "commit": COMMIT,
}


class Step(NamedTuple):
    """One step; `ranks[r]` are the phases of rank r, in order. Times are of one clock, in ns."""

    number: int
    decodes: bool  # every sequence of the batch draws one token
    begin_ns: int  # of the call of `Engine.step`
    end_ns: int
    publish_ns: int  # the driver begins to publish
    in_hand_ns: int  # the last rank has the mapping
    ranks: list[list[Span]]
    others_ns: list[int]  # of each rank's step, what is in no phase
    all_reduces_ns: list[int]  # of each rank's forward

    @property
    def step_us(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e3

    @property
    def broadcast_us(self) -> float:
        return (self.in_hand_ns - self.publish_ns) / 1e3

    def phase_us(self, rank: int) -> dict[str, float]:
        """Microseconds of each phase that the rank may have, those without time too."""
        phases = DRIVER_PHASES if rank == 0 else WORKER_PHASES
        found = dict.fromkeys(phases, 0.0)
        for span in self.ranks[rank]:
            found[span.name] += (span.end_ns - span.begin_ns) / 1e3
        found[OTHER] = self.others_ns[rank] / 1e3
        return found


def steps_of(turn: Turn) -> Iterator[Step]:
    """All steps of a turn. AssertionError where ranks do not agree on how many there were."""
    driver = turn.driver
    records = list(zip(*turn.ranks, strict=True))
    batch = turn.case.batch
    for number, (ranks, stamps, published) in enumerate(
        zip(records, driver.steps, driver.published, strict=True)
    ):
        spans = [_named(record) for record in ranks]
        begin_ns = next(span.begin_ns for span in spans[0] if span.name == PUBLISH)
        ends = [_in_hand(rank, named) for rank, named in enumerate(spans)]
        whole = [stamps, *((record.begin_ns, record.end_ns) for record in ranks[1:])]
        others = [
            end - begin - sum(span.end_ns - span.begin_ns for span in named)
            for (begin, end), named in zip(whole, spans, strict=True)
        ]
        yield Step(
            number=number,
            decodes=published.tokens == published.sequences == batch,
            begin_ns=stamps[0],
            end_ns=stamps[1],
            publish_ns=begin_ns,
            in_hand_ns=max(ends),
            ranks=[spans[0], *(_split(named, begin_ns) for named in spans[1:])],
            others_ns=others,
            all_reduces_ns=[record.all_reduce_ns for record in ranks],
        )


def _named(record: RecordedStep) -> list[Span]:
    return [span._replace(name=_NAMES[span.name]) for span in record.spans]


def _in_hand(rank: int, spans: list[Span]) -> int:
    return next(span.end_ns for span in spans if span.name == (PUBLISH if rank == 0 else WAIT))


def _split(spans: list[Span], publish_ns: int) -> list[Span]:
    """A receiver's phases, its wait divided at the moment in which the driver began to publish."""
    first, *rest = spans
    assert first.name == WAIT, f"a step of a receiver begins with {first.name}"
    border = min(max(publish_ns, first.begin_ns), first.end_ns)
    parts = Span(WAIT, first.begin_ns, border), Span(BROADCAST, border, first.end_ns)
    return [*(part for part in parts if part.end_ns > part.begin_ns), *rest]
