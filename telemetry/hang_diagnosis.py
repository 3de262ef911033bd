"""Says in words who is in what: one line for every collective that does not end.

Owns the wording and the shape that metrics, pages and logs get (`Hang`). The reasoning is in
`hang_cases`; what was said before is `hang`'s to remember.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .desync import disagreement_text
from .flight_words import (
    call_text,
    dtype_text,
    label_of,
    name_at,
    ranks_text,
    seconds_text,
)
from .hang_cases import Case, Key, find_cases, is_due, nobody_waits, went_on
from .hang_looks import DEAD, ENDED, RUNNING, STOPPED, TRACED, RankLook, RankView, Row
from .ring import AUX, BEGIN, END, ERROR, META, NBYTES, SEQUENCE, meta_name

HANG, DESYNC, UNWAITED = "hang", "desync", "unwaited"
_STATE_WORDS = {
    STOPPED: "is stopped (SIGSTOP, pid {pid})",
    TRACED: "is stopped by a debugger (pid {pid})",
    DEAD: "is dead (pid {pid})",
    ENDED: "has ended its recording (pid {pid})",
}
_TOGETHER_NS = 1_000_000_000  # ranks that came within it are told as one
_PLURAL = {"waits": "wait", "is": "are", "has": "have"}


@dataclass(frozen=True, slots=True)
class RankStatus:
    """What one rank has to do with a hang."""

    rank: int
    # "waits", "absent", "differs", "finished", "dead", "stopped", "ended" or "unknown"
    status: str
    text: str  # "never entered it: last finished #359, now in kv.swap_in for 12.1 s"
    place: str  # "kv.swap_in": what it is in, without how long


@dataclass(frozen=True, slots=True)
class Hang:
    """One collective that does not end, and who is in what."""

    kind: str  # "hang"; "desync": ranks call different things; "unwaited": nobody waits for it
    text: str
    op: str
    group: str  # label
    sequence: int
    nbytes: int
    since_ns: int  # the first waiting rank's begin, in the rows' clock
    age_s: float
    ranks: tuple[RankStatus, ...]
    key: Key
    consequence: bool = False  # another one, told beside it, holds it up: this is not counted
    over: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "text": self.text,
            "op": self.op,
            "group": self.group,
            "sequence": self.sequence,
            "bytes": self.nbytes,
            "age_s": round(self.age_s, 3),
            "consequence": self.consequence,
            "over": self.over,
            "ranks": [
                {"rank": one.rank, "status": one.status, "text": one.text} for one in self.ranks
            ],
        }


def diagnose(
    looks: Sequence[RankLook], now_ns: int, limit_ns: int, *, local_ranks: int = 0
) -> list[Hang]:
    """Collectives in flight for `limit_ns` or longer; those that hold others up come first.

    Empty if there are none. `local_ranks`: how many ranks this node has, if not all have shown up.
    """
    views, cases = find_cases(looks, local_ranks)
    hangs = [
        _hang(case, views, now_ns, limit_ns)
        for case in cases
        if is_due(case, views, now_ns, limit_ns)
    ]
    return sorted(hangs, key=lambda hang: (hang.consequence, hang.since_ns))


def _hang(case: Case, views: Mapping[int, RankView], now_ns: int, limit_ns: int) -> Hang:
    unwaited = nobody_waits(case, views, now_ns, limit_ns)
    statuses = [_status(case, views[rank], now_ns, limit_ns) for rank in sorted(case.crowd.here)]
    shown = min(case.calls) if case.differs else case.first  # the same at every look
    row, view = case.calls[shown], views[shown]
    kind = DESYNC if case.differs or case.circle else UNWAITED if unwaited else HANG
    return Hang(
        kind,
        _sentence(case, views, statuses, unwaited),
        view.name(row),
        label_of(view.group(row)),
        case.key[1],
        row[NBYTES],
        case.since_ns,
        (now_ns - case.since_ns) / 1e9,
        tuple(statuses),
        case.key,
        # Of a circle one stands for all.
        consequence=bool(case.held_up_by) and case.key != min(case.circle, default=None),
    )


def _sentence(
    case: Case, views: Mapping[int, RankView], statuses: Sequence[RankStatus], unwaited: bool
) -> str:
    told = []
    if case.differs:
        label = label_of(views[case.first].group(case.waiting[case.first]))
        told.append(disagreement_text(label, case.key[1], _calls(case, views)))
    shown = statuses
    if case.point_to_point:
        told += _clauses([one for one in statuses if one.rank in case.waiting])
        told.append("whom it waits for is not recorded")
        shown = [one for one in statuses if one.rank not in case.waiting]
    told += _clauses(shown)
    if unwaited:
        told.append("all of its ranks have entered it, and nobody waits for it")
    elif not case.differs and not case.point_to_point and len(case.waiting) == case.crowd.size:
        told.append("that is all of its ranks")
    if case.circle:
        told.append("they wait for each other: they call their collectives in different orders")
    return "; ".join([*told, *_unknown(case)])


def _calls(case: Case, views: Mapping[int, RankView]) -> dict[int, str]:
    """By rank, what it called: as much as shows the difference."""
    calls = {}
    for rank, row in case.calls.items():
        names = views[rank].look.names
        dtype = f" of {dtype_text(row, names)}" if case.differs == "dtype" else ""
        calls[rank] = call_text(row, names, group=False) + dtype
    return calls


def _clauses(statuses: Sequence[RankStatus]) -> list[str]:
    """ "rank 0 waits ...", those of the same text together, those who wait first."""
    together: dict[str, list[int]] = {}
    for one in sorted(statuses, key=lambda one: one.status != "waits"):
        together.setdefault(one.text, []).append(one.rank)
    clauses = []
    for text, ranks in together.items():
        verb, _, rest = text.partition(" ")
        if len(ranks) > 1:
            verb = _PLURAL.get(verb, verb)
        clauses.append(f"{ranks_text(ranks)} {verb} {rest}")
    return clauses


def _unknown(case: Case) -> list[str]:
    """What is to say of ranks that this node does not see."""
    crowd = case.crowd
    several = crowd.elsewhere > 1
    told = []
    if crowd.no_shows:
        told.append(f"{crowd.no_shows} of its {crowd.size} ranks should be here and have no ring")
    if crowd.elsewhere and crowd.perhaps:
        told.append(
            f"{crowd.elsewhere} of its {crowd.size} ranks {'have' if several else 'has'} not been "
            f"seen in this group: among {ranks_text(crowd.perhaps)}"
            + (", or on other nodes" if crowd.nodes else "")
        )
    elif crowd.elsewhere:
        told.append(
            f"{crowd.elsewhere} of its {crowd.size} ranks {'are' if several else 'is'} on "
            f"{'other nodes' if several else 'another node'}, unknown here"
        )
    return told


def _status(case: Case, view: RankView, now_ns: int, limit_ns: int) -> RankStatus:
    rank, state = view.rank, view.look.state
    row = case.calls.get(rank)
    place = view.place(now_ns)
    if state != RUNNING:
        status = {DEAD: "dead", ENDED: "ended"}.get(state, "stopped")
        words = _STATE_WORDS[state].format(pid=view.look.pid)
        # Point-to-point calls have numbers of their own: how far a rank came says nothing there.
        progress = "" if case.point_to_point else f"{_progress(case, view, row)}, "
        return _told(view, status, f"{words}: {progress}{place}")
    if rank in case.waiting:
        since_ns = case.waiting[rank][BEGIN]
        if since_ns - case.since_ns < _TOGETHER_NS:
            since_ns = case.since_ns
        age = f"for {seconds_text(now_ns - since_ns)}"
        call = call_text(case.waiting[rank], view.look.names)
        if went_on(view, case.waiting[rank], now_ns, limit_ns):
            return _told(view, "waits", f"has {call} in flight {age} and went on, now {place}")
        return _told(view, "waits", f"waits in {call} {age}")
    if case.point_to_point:
        return _told(view, "unknown", f"is now {place}")
    if rank in case.absent:
        return _told(view, "absent", f"never entered it: {_progress(case, view, row)}, now {place}")
    if row is not None and case.differs:
        return _told(view, "differs", f"{_progress(case, view, row)}, now {place}")
    return _told(view, "finished", f"{_progress(case, view, row)}, now {place}")


def _told(view: RankView, status: str, text: str) -> RankStatus:
    inner = view.innermost
    return RankStatus(view.rank, status, text, "" if inner is None else view.name(inner))


def _progress(case: Case, view: RankView, row: Row | None) -> str:
    """How far a rank came, seen from this collective."""
    unique, sequence, _ = case.key
    if row is not None and not row[END]:
        return "in it"
    if row is not None:
        if row[AUX] & 0xFF == ERROR:
            return f"has left it with {name_at(view.look.names, row[AUX] >> 8)}"
        return "has finished it"
    last = view.last_finished(unique)
    if last:
        return f"last finished #{last}" if last < sequence else f"has gone on to #{last}"
    if view.look.whole and not view.entered(unique):
        return "it has called nothing of this group yet"
    if view.look.whole:
        return "it has finished nothing of this group yet"
    return "what it last finished of this group is too long ago to be seen"


def describe_rank(look: RankLook, now_ns: int) -> str:
    """ "in model.forward > all_reduce #360 (tp, 16 KiB) for 12.0 s": all that a rank has open."""
    view = RankView(look)
    if not view.in_flight:
        return view.place(now_ns)
    parts = []
    for row in view.in_flight:
        if row in view.collectives:
            parts.append(call_text(row, look.names))
        else:
            name = name_at(look.names, meta_name(row[META]))
            parts.append(name or f"step {row[SEQUENCE]}")
    return f"in {' > '.join(parts)} for {seconds_text(now_ns - view.in_flight[-1][BEGIN])}"
