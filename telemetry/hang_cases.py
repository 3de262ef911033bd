"""Which collectives are in flight on a node, who has not come to them, and what holds that up.

Owns the reasoning about hangs, without a word of text for people. A collective waits for every
rank of its group, and a rank that is in one comes no further. So the ranks that have not entered
it are to blame; where one of them is in another collective itself, that one holds this one up, and
a circle of those means that ranks call their collectives in different orders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .desync import comparable, difference
from .flight_words import unique_of
from .hang_looks import RUNNING, RankLook, RankView, Row
from .ring import BEGIN, META, SEQUENCE, meta_group_size

# A rank that waits in this phase waits for work; if the others have nothing open, there is none.
_WAITS_FOR_WORK = "step.receive"
_QUIET_NS = 5_000_000_000  # a rank that has recorded something so lately does not wait
Key = tuple[str, int, int]  # group's unique name, number, rank (-1 unless it is point-to-point)


@dataclass(frozen=True, slots=True)
class Crowd:
    """The ranks of a group, as far as this node knows them."""

    here: frozenset[int]  # members for sure
    size: int
    perhaps: frozenset[int] = frozenset()  # ranks here that may be members
    no_shows: int = 0  # ranks of this node that have no ring yet, members for sure
    elsewhere: int = 0  # on other nodes, or among `perhaps`
    nodes: bool = False  # there are other nodes


@dataclass(slots=True)
class Case:
    """One collective in flight on some rank of this node."""

    key: Key
    waiting: dict[int, Row]  # by rank: its record in flight, if the rank's process is there
    crowd: Crowd = field(default_factory=lambda: Crowd(frozenset(), 0))
    calls: dict[int, Row] = field(default_factory=dict)  # by rank: `waiting`, and what finished
    absent: frozenset[int] = frozenset()  # members here that have not come to it
    differs: str = ""  # "op", "size" or "dtype" if ranks call different things by this number
    held_up_by: frozenset[Key] = frozenset()  # what ranks of `absent` are in
    circle: frozenset[Key] = frozenset()  # it and what it waits for in a circle, if it does

    @property
    def since_ns(self) -> int:
        return min(row[BEGIN] for row in self.waiting.values())

    @property
    def first(self) -> int:
        """The rank that has been in it for longest."""
        return min(self.waiting, key=lambda rank: self.waiting[rank][BEGIN])

    @property
    def point_to_point(self) -> bool:
        return self.key[2] >= 0


def find_cases(
    looks: Sequence[RankLook], local_ranks: int = 0
) -> tuple[dict[int, RankView], list[Case]]:
    """A view of every rank, and every collective in flight.

    `local_ranks`: how many ranks this node has, if more than have shown up.
    """
    views = {look.rank: RankView(look) for look in looks}
    local = max(len(views), local_ranks)
    world = max([local, *(look.world_size for look in looks)])
    cases: dict[Key, Case] = {}
    for rank, view in views.items():
        if view.alive:
            for row in view.collectives:
                key = _key(view, row)
                cases.setdefault(key, Case(key, {})).waiting[rank] = row
    for case in cases.values():
        _fill(case, views, local, world)
    for case in cases.values():
        stuck = (_stuck_in(views[rank]) for rank in case.absent)
        case.held_up_by = frozenset(key for key in stuck if key is not None)
    for case in cases.values():
        case.circle = _circle(case.key, cases)
    return views, list(cases.values())


def is_due(case: Case, views: Mapping[int, RankView], now_ns: int, limit_ns: int) -> bool:
    """Whether it has been in flight for too long, and not because there is nothing to do."""
    if now_ns - case.since_ns < limit_ns:
        return False
    running = any(views[rank].look.state == RUNNING for rank in case.waiting)
    if not running and case.crowd.here - case.waiting.keys() - case.absent:
        return False  # the rank that is in it is stopped, and others are through
    idle = case.absent and all(views[rank].idle for rank in case.absent)
    return not idle or any(
        views[rank].phase_around(row) != _WAITS_FOR_WORK for rank, row in case.waiting.items()
    )


def nobody_waits(case: Case, views: Mapping[int, RankView], now_ns: int, limit_ns: int) -> bool:
    """Whether all have entered it, and those in whom it is in flight do other things meanwhile."""
    if case.absent or case.differs or case.crowd.no_shows or case.crowd.perhaps:
        return False
    return all(went_on(views[rank], row, now_ns, limit_ns) for rank, row in case.waiting.items())


def went_on(view: RankView, row: Row, now_ns: int, limit_ns: int) -> bool:
    """Whether a rank with a collective in flight has lately done anything else."""
    when = view.went_on_after(row)
    return (
        view.look.state == RUNNING and when is not None and now_ns - when < min(limit_ns, _QUIET_NS)
    )


def _key(view: RankView, row: Row) -> Key:
    joined = view.key(row)
    return (
        (unique_of(view.group(row)), row[SEQUENCE], view.rank) if joined is None else (*joined, -1)
    )


def _fill(case: Case, views: Mapping[int, RankView], local: int, world: int) -> None:
    unique, sequence, _ = case.key
    case.crowd = _crowd(case, views, local, world)
    if case.point_to_point:
        case.calls = dict(case.waiting)
        return
    found = {rank: views[rank].call(unique, sequence) for rank in case.crowd.here}
    case.calls = {rank: row for rank, row in sorted(found.items()) if row is not None}
    case.differs = difference(
        [comparable(row, views[rank].look.names) for rank, row in case.calls.items()]
    )
    case.absent = frozenset(
        rank
        for rank in case.crowd.here - case.calls.keys()
        if views[rank].entered(unique) < sequence
    )


def _crowd(case: Case, views: Mapping[int, RankView], local: int, world: int) -> Crowd:
    unique = case.key[0]
    size = max(meta_group_size(row[META]) for row in case.waiting.values())
    used = frozenset(rank for rank, view in views.items() if unique in view.groups)
    silent = frozenset(views) - used
    no_shows = local - len(views)
    if size >= world:
        return Crowd(used | silent, size, no_shows=no_shows, elsewhere=world - local)
    unknown = size - len(used)
    if unknown <= 0:
        return Crowd(used, size)
    if world == local and len(silent) + no_shows == unknown:
        return Crowd(used | silent, size, no_shows=no_shows)
    return Crowd(used, size, perhaps=silent, elsewhere=unknown, nodes=world > local)


def _stuck_in(view: RankView) -> Key | None:
    """The collective that a rank is in, unless it is in a phase inside it or in none."""
    row = view.innermost
    if view.look.state != RUNNING or row is None or row not in view.collectives:
        return None
    return _key(view, row)


def _circle(key: Key, cases: Mapping[Key, Case]) -> frozenset[Key]:
    """All that hold `key` up and are held up by it, itself among them; empty if there are none."""
    ahead = _reachable(key, cases)
    return frozenset(one for one in ahead if key in _reachable(one, cases))


def _reachable(key: Key, cases: Mapping[Key, Case]) -> set[Key]:
    """What holds this one up, and what holds that up, and so on."""
    found: set[Key] = set()
    ahead = {key}
    while ahead:
        one = ahead.pop()
        new = cases[one].held_up_by - found if one in cases else frozenset()
        found |= new
        ahead |= new
    return found
