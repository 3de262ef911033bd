"""What ranks on several hosts tell one another through the group's store: who is gone, who lives.

A process that ends is seen at once by those on its host alone. They, and a rank that gives up or
leaves without closing, write it down here, and every other rank reads it. Owns the keys below, on
a connection of its own, and the thread that alone uses it: the store may be slow, or gone, and
nobody who publishes or receives ever waits for it. Knows nothing of frames.

    onecast/<board>/gone           "<rank> <why>", of the last rank that was found gone; "? <why>"
                                   where nobody knows which it was
    onecast/<board>/alive/<rank>   seconds after the epoch, by the clock of that rank's host
"""

import logging
import threading
import time
import weakref
from collections.abc import Iterable
from datetime import timedelta

from torch.distributed import distributed_c10d as c10d

_TICK_S = 0.25  # between two looks at the board
_BEAT_S = 1.0  # between two signs of life
_STORE_TIMEOUT_S = 5.0  # for one answer of the store
_ASK_S = 1.0  # for the ages of others, which only make a message better
_FLUSH_S = 6.0  # what the last words of a rank may take: one answer of the store, and a bit

log = logging.getLogger(__name__)


class Obituaries:
    """One board, seen from one rank. Open it on all ranks with the same number."""

    def __init__(self, store: c10d.Store, board: int, own_rank: int) -> None:
        # Who is gone, and why; reading it costs nothing.
        self.heard: tuple[int | None, str] | None = None
        self.silence: str | None = None  # why nothing can be heard any more
        self.looks = 0  # at the board, that are over
        self._shared = store
        self._prefix = f"onecast/{board}"
        self._store: c10d.Store | None = None  # the thread's own connection
        self._own_rank = own_rank
        self._lock = threading.Condition()
        self._outbox: list[str] = []
        self._asked: list[int] = []
        self._ages: dict[int, float] | None = None
        self._closing = False
        # A plain function: the thread must not keep this object alive, nor what holds it.
        self._thread = threading.Thread(
            target=_serve, args=(weakref.ref(self),), name="onecast-obituaries", daemon=True
        )
        self._thread.start()

    def post(self, rank: int | None, why: str) -> None:
        """Tell everyone that `rank`, or one that nobody can name, is gone. Returns at once."""
        with self._lock:
            self._outbox.append(f"{'?' if rank is None else rank} {why}")
            self._lock.notify_all()

    def ages(self, ranks: Iterable[int]) -> dict[int, float]:
        """Seconds since the last sign of life of `ranks`, as far as their hosts' clocks agree.

        Ranks without one, or all if the store does not answer soon, are left out.
        """
        with self._lock:
            self._asked, self._ages = [*ranks], None
            self._lock.notify_all()
            self._lock.wait_for(lambda: self._ages is not None or self.silence, _ASK_S)
            return self._ages or {}

    def close(self) -> None:
        """Stop looking, once what was posted is out."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._outbox:
            self._thread.join(_FLUSH_S)

    def tick(self, beats: bool) -> bool:
        """One turn of the thread; False: it was the last."""
        with self._lock:
            closing, asked = self._closing, self._asked
            outbox, self._asked = self._outbox.copy(), []
        try:
            store = self._connect()
            for text in outbox:
                store.set("gone", text)
            with self._lock:
                del self._outbox[: len(outbox)]
            if closing:
                return False
            if self.heard is None and store.check(["gone"]):
                rank, _, why = store.get("gone").decode(errors="replace").partition(" ")
                self.heard = (None if rank == "?" else int(rank), why)
            self.looks += 1
            if beats:
                store.set(f"alive/{self._own_rank}", repr(time.time()))
            if asked:
                ages = _read_ages(store, asked)
                with self._lock:
                    self._ages = ages
                    self._lock.notify_all()
        except (RuntimeError, ValueError) as error:  # the store's errors are RuntimeErrors
            log.info("the store of the process group is lost: %s", error)
            with self._lock:
                self.silence = f"the store of the process group is lost ({error})"
                self._lock.notify_all()
            return False
        return True

    def rest(self) -> None:
        """Until the next turn is due, or wanted."""
        with self._lock:
            if not (self._outbox or self._asked or self._closing):
                self._lock.wait(_TICK_S)

    def _connect(self) -> c10d.Store:
        """The thread connects, not the rank that opens: name resolution can take seconds."""
        if self._store is None:
            own = self._shared.clone()  # type: ignore[attr-defined]
            self._store = c10d.PrefixStore(self._prefix, own)
            self._store.set_timeout(timedelta(seconds=_STORE_TIMEOUT_S))
        return self._store


def _read_ages(store: c10d.Store, ranks: list[int]) -> dict[int, float]:
    keys = {rank: f"alive/{rank}" for rank in ranks}
    there = {rank: key for rank, key in keys.items() if store.check([key])}
    now = time.time()
    return {rank: max(now - float(store.get(key)), 0.0) for rank, key in there.items()}


def _serve(reference: "weakref.ref[Obituaries]") -> None:
    next_beat = 0.0
    while True:
        board = reference()
        if board is None:
            return
        beats = time.monotonic() >= next_beat
        if beats:
            next_beat = time.monotonic() + _BEAT_S
        if not board.tick(beats):
            return
        board.rest()
        del board
