"""Rings that a test writes itself, at any times it likes: what no real ranks can be made to do."""

from pathlib import Path
from typing import Any

from onecast.telemetry import RingWriter
from onecast.telemetry.flight_ring import read_ring
from onecast.telemetry.hang import RankLook
from onecast.telemetry.hang_looks import look_at_image
from onecast.telemetry.ring import COLLECTIVE, H_START_TIME, OK, PHASE, STEP_KIND, pack_meta
from onecast.telemetry.run_directory import ring_path

SECOND = 1_000_000_000
START = 1000 * SECOND
OPEN = 0  # the end of what has not ended


class WrittenRing:
    """One rank's ring. Times are seconds since the beginning of the run."""

    def __init__(self, run_dir: Path | str, rank: int, **changes: Any) -> None:
        settings = {"local_rank": rank, "world_size": 2, "local_world_size": 2, **changes}
        self.rank = rank
        self.path = ring_path(str(run_dir), rank)
        self.ring = RingWriter(
            self.path, rank=rank, **{"capacity": 1024, "engine_id": "written", **settings}
        )

    def _record(self, begin_s: float, end_s: float | None, *words: int) -> None:
        begin = START + int(begin_s * SECOND)
        end = OPEN if end_s is None else START + int(end_s * SECOND)
        self.ring.record(begin, end, *words)

    def call(
        self, begin_s: float, end_s: float | None, sequence: int, op: str = "all_reduce",
        nbytes: int = 16384, group: str = "tp", size: int = 2, dtype: str = "float32",
        aux: int = OK,
    ) -> None:  # fmt: skip
        """A collective; `end_s` None: in flight."""
        intern = self.ring.intern
        meta = pack_meta(COLLECTIVE, intern(op), intern(f"{group}\t{group} 7"), intern(dtype), size)
        self._record(begin_s, end_s, meta, sequence, nbytes, aux)

    def phase(self, begin_s: float, end_s: float | None, name: str) -> None:
        self._record(begin_s, end_s, pack_meta(PHASE, self.ring.intern(name)), 0, 0, OK)

    def step(self, begin_s: float, end_s: float | None, number: int) -> None:
        self.ring.set_step(number)
        self._record(begin_s, end_s, pack_meta(STEP_KIND), number, 8, OK)

    def die(self) -> None:
        """As if its process had been killed."""
        self.ring._words[H_START_TIME] = 1

    def look(self, state: str = "running") -> RankLook:
        return look_at_image(read_ring(self.path), state)
