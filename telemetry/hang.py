"""Watches the collectives of a node for those that do not end, and tells each of them once.

Owns what has been told: a hang is told when it is found, again when something has changed (ever
more rarely: what flickers is told less and less often), and when it is over. `hang_diagnosis`
finds the words. Runs in the sidecar; a rank that is stuck or dead has no part in it.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .desync import Disagreement, first_disagreement
from .flight_words import name_at, ranks_text, seconds_text
from .hang_cases import Key
from .hang_diagnosis import DESYNC, UNWAITED, Hang, RankStatus, diagnose
from .hang_looks import DEAD, RankLook, RankView, look_at
from .ring import AUX, BEGIN, COLLECTIVE, END, ERROR, META
from .ring_reader import Drained, RingReader, Rows

__all__ = ["Hang", "HangWatch", "RankLook", "RankStatus", "look_at"]

_logger = logging.getLogger(__name__)
_LOOK_EVERY_NS = 500_000_000
_AGAIN_NS = 1_000_000_000  # between two tellings of a hang; doubles with each
_AGAIN_DOUBLINGS = 9
_STEADY_NS = 5_000_000_000  # a phase that has lasted so long is a change worth telling


@dataclass(slots=True)
class _Told:
    """A hang that was told, and as what."""

    hang: Hang  # as it is
    told: Hang  # as it was told
    places: dict[int, str]  # by rank, the last place it was seen in for a while
    ranks: list[int]  # those that waited
    last_ns: int
    times: int = 1


class HangWatch:
    """Tells the hangs of one node.

    `limit_s`: how long a collective may be in flight; 0: nothing is ever told. `local_ranks`: how
    many ranks the node has.
    """

    def __init__(self, limit_s: float, local_ranks: int) -> None:
        self.totals: Counter[tuple[str, str, str]] = Counter()  # ("hang" | "desync", op, group)
        self.told = False
        self._limit_ns = int(limit_s * 1e9)
        self._local_ranks = local_ranks
        self._open: dict[Key, _Told] = {}
        self._counted: set[tuple[str, Key]] = set()
        self._looked_ns = 0
        self._disagreement: Disagreement | None = None
        self._failed = False  # a collective has raised: ranks may disagree without a hang

    @property
    def hangs(self) -> list[Hang]:
        """Those that go on, as they were at the last look."""
        return [told.hang for told in self._open.values()]

    def poll(
        self,
        readers: Mapping[int, RingReader],
        drained: Mapping[int, Drained],
        now_ns: int,
        *,
        last: bool = False,
    ) -> list[Hang]:
        """What is to be told now; call it after every drain.

        Looks at rings only twice a second, and only if something is old, a collective has failed or
        something was told before. `last`: the ranks have ended, this is the last call.
        """
        if not self._limit_ns:
            return []
        self._failed = self._failed or any(_has_failed(one.rows) for one in drained.values())
        if not last and now_ns - self._looked_ns < _LOOK_EVERY_NS:
            return []
        oldest = now_ns - self._limit_ns
        old = any(_has_older(one.pending, oldest) for one in drained.values())
        if not (old or self._open or self._failed):
            return []
        self._looked_ns = now_ns
        looks = [
            look_at(reader, drained[rank].pending)
            for rank, reader in readers.items()
            if rank in drained
        ]
        return self.look(looks, now_ns)

    def look(self, looks: Sequence[RankLook], now_ns: int) -> list[Hang]:
        """What is new, has changed or is over since the last look."""
        found = diagnose(looks, now_ns, self._limit_ns, local_ranks=self._local_ranks)
        # The costly part: what the ranks called before does not change while they hang.
        if self._failed or any(hang.key not in self._open for hang in found):
            self._disagreement = first_disagreement(
                {look.rank: np.concatenate([look.finished, look.pending]) for look in looks},
                {look.rank: look.names for look in looks},
            )
        hangs = [_with_disagreement(hang, self._disagreement) for hang in found]
        telling = [hang for hang in hangs if self._is_news(hang, looks, now_ns)]
        telling += self._over({hang.key for hang in hangs}, looks, now_ns)
        if self._disagreement is not None and self._failed:
            telling += self._failure(self._disagreement, now_ns)
        self._failed = False
        for hang in telling:
            self._count(hang)
        return telling

    def _is_news(self, hang: Hang, looks: Sequence[RankLook], now_ns: int) -> bool:
        places = _places(hang, looks, now_ns, min(_STEADY_NS, self._limit_ns))
        waiting = {one.rank for one in hang.ranks if one.status in ("waits", "stopped")}
        told = self._open.get(hang.key)
        if told is None:
            self._open[hang.key] = _Told(hang, hang, places, sorted(waiting), now_ns)
            return True
        told.hang = hang
        told.ranks = sorted({*told.ranks, *waiting})
        pause_ns = _AGAIN_NS << min(told.times - 1, _AGAIN_DOUBLINGS)
        if now_ns - told.last_ns < pause_ns or not _has_changed(told, hang, places):
            told.places = {**places, **told.places}
            return False
        told.told, told.places = hang, {**told.places, **places}
        told.last_ns, told.times = now_ns, told.times + 1
        return True

    def _over(self, found: set[Key], looks: Sequence[RankLook], now_ns: int) -> list[Hang]:
        views = {look.rank: RankView(look) for look in looks}
        ended = []
        for key in self._open.keys() - found:
            told = self._open.pop(key)
            if told.told.kind != UNWAITED:
                ended.append(_ended(told, views, now_ns))
        return ended

    def _failure(self, disagreement: Disagreement, now_ns: int) -> list[Hang]:
        """A disagreement that made a collective fail rather than hang."""
        key = (disagreement.unique, disagreement.sequence, -1)
        if (DESYNC, key) in self._counted:
            return []
        first = next(iter(disagreement.calls.values()))
        return [
            Hang(
                DESYNC,
                f"{disagreement.text}; a collective has failed since",
                first.partition(" ")[0],
                disagreement.group,
                disagreement.sequence,
                0,
                disagreement.begin_ns,
                (now_ns - disagreement.begin_ns) / 1e9,
                (),
                key,
                over=True,
            )
        ]

    def _count(self, hang: Hang) -> None:
        self.told = True
        if hang.kind == UNWAITED or hang.consequence or (hang.kind, hang.key) in self._counted:
            return
        if hang.kind != DESYNC and hang.over:
            return
        self._counted.add((hang.kind, hang.key))
        self.totals[hang.kind, hang.op, hang.group] += 1


def _has_older(rows: Rows, oldest_ns: int) -> bool:
    chosen = ((rows[:, META] & 0xF) == COLLECTIVE) & (rows[:, END] == 0)
    return bool((chosen & (rows[:, BEGIN] <= oldest_ns)).any())


def _has_failed(rows: Rows) -> bool:
    return bool((((rows[:, META] & 0xF) == COLLECTIVE) & ((rows[:, AUX] & 0xFF) == ERROR)).any())


def _with_disagreement(hang: Hang, disagreement: Disagreement | None) -> Hang:
    """A hang of ranks that had disagreed before is a desync, of that earlier call."""
    if disagreement is None or disagreement.unique != hang.key[0]:
        return hang
    if disagreement.sequence >= hang.sequence:
        return replace(hang, kind=DESYNC) if disagreement.sequence == hang.sequence else hang
    return replace(hang, kind=DESYNC, text=f"{hang.text}; before that, {disagreement.text}")


def _places(hang: Hang, looks: Sequence[RankLook], now_ns: int, steady_ns: int) -> dict[int, str]:
    """By rank, the phase or collective that it has been in for a while; others flicker."""
    inner = {look.rank: RankView(look).innermost for look in looks}
    return {
        one.rank: one.place
        for one in hang.ranks
        if (row := inner.get(one.rank)) is not None and now_ns - row[BEGIN] >= steady_ns
    }


def _has_changed(told: _Told, hang: Hang, places: Mapping[int, str]) -> bool:
    if any(told.places.get(rank, place) != place for rank, place in places.items()):
        return True
    return _standing(told.told) != _standing(hang)


def _standing(hang: Hang) -> object:
    """What must change for a hang to be told again, beside places; not ages."""
    return hang.kind, hang.consequence, [(one.rank, one.status) for one in hang.ranks]


def _ended(told: _Told, views: Mapping[int, RankView], now_ns: int) -> Hang:
    hang = told.hang
    unique, sequence, pair = hang.key
    end_ns, words = now_ns, ""
    for rank in told.ranks:
        view = views.get(rank)
        if view is None:
            continue
        row = view.finished_call(unique, sequence, shared=pair < 0)
        if row is not None:
            end_ns = min(end_ns, row[END])
            if row[AUX] & 0xFF == ERROR:
                words += f"; it raised {name_at(view.look.names, row[AUX] >> 8)} on rank {rank}"
        elif not view.alive:
            words += f"; rank {rank} {'is dead' if view.look.state == DEAD else 'has ended'}"
    text = (
        f"over after {seconds_text(end_ns - hang.since_ns)}: {hang.op} #{sequence} ({hang.group}), "
        f"which held up {ranks_text(told.ranks)}{words}"
    )
    return replace(hang, text=text, over=True, age_s=(end_ns - hang.since_ns) / 1e9)
