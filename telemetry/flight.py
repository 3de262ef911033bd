"""What a run did last: its rings, wherever they lie by now, and what they say.

    from onecast.telemetry.flight import keep, read_run, sweep

Owns the reading of a whole directory: of a live run, of one whose processes are dead, or a kept
copy; and what follows from it (where the ranks disagree, who waits for whom). All times become
nanoseconds since 1970, by one clock a node. Whatever can be read is; what cannot is said in
`problems`, and nothing but a directory without any ring is an error.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .desync import Disagreement, first_disagreement
from .errors import TelemetryError
from .flight_keep import KEPT, keep, kept_runs
from .flight_ring import GROUP_NUMBERS_SINCE, RingImage, read_ring
from .flight_sweep import sweep
from .flight_words import printable
from .hang_diagnosis import UNWAITED, Hang, describe_rank, diagnose
from .hang_looks import DEAD, ENDED, RUNNING, RankLook, look_at_image, process_state
from .ring import BEGIN, CONTEXT, END, META, SCHEDULED
from .ring_reader import Rows

__all__ = ["FlightRank", "FlightRun", "keep", "kept_runs", "read_run", "read_runs", "sweep"]

_LIVE_LIMIT_NS = 1_000_000_000  # what is in flight for less is just going on
_MAX_SIDE_FILE = 16 << 20
# What JSON that is not as we wrote it can come to.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_STATES = ("running", "stopped", "traced", "dead", "ended")


@dataclass(frozen=True, slots=True)
class FlightRank:
    """One rank: its ring, with times since 1970, and what became of its process."""

    image: RingImage
    state: str  # "running", "stopped", "traced", "dead", "ended" (it closed its ring)
    graphs: list[str] = field(default_factory=list)  # names of its captured CUDA graphs
    now_ns: int = 0  # until when its node was looked at

    @property
    def look(self) -> RankLook:
        return look_at_image(self.image, self.state)

    @property
    def was_in(self) -> str:
        """ "in model.forward > all_reduce #360 (tp, 16 KiB) for 12.0 s"."""
        return describe_rank(self.look, self.now_ns)


@dataclass(frozen=True, slots=True)
class FlightRun:
    """Everything that is known of a run."""

    path: str
    kind: str  # "live", "dead" or "kept"
    ranks: dict[int, FlightRank]
    now_ns: int  # since 1970: when it was looked at or kept; of a dead run, its last record
    reason: str = ""  # why it was kept
    problems: list[str] = field(default_factory=list)

    @property
    def engine_id(self) -> str:
        return next(iter(self.ranks.values())).image.engine_id

    @property
    def world_size(self) -> int:
        return max(rank.image.world_size for rank in self.ranks.values())

    def disagreement(self) -> Disagreement | None:
        """The first call that ranks made differently, of what the rings still hold."""
        images = {
            rank: one.image
            for rank, one in self.ranks.items()
            if one.image.version >= GROUP_NUMBERS_SINCE
        }
        return first_disagreement(
            {rank: image.rows for rank, image in images.items()},
            {rank: image.names for rank, image in images.items()},
        )

    def hangs(self) -> list[Hang]:
        """Of a live run: what is in flight for a second or more. Else: what was at the end."""
        looks = [one.look for one in self.ranks.values()]
        if self.kind == "live":
            return diagnose(looks, self.now_ns, _LIVE_LIMIT_NS)
        # How it stood: the dead are seen as they were.
        looks = [
            replace(look, state=RUNNING if look.state == DEAD else look.state) for look in looks
        ]
        return [hang for hang in diagnose(looks, self.now_ns, 0) if hang.kind != UNWAITED]


def read_runs(paths: Sequence[str | Path]) -> FlightRun:
    """Several directories of one run, one for each node, as one. TelemetryError as `read_run`."""
    runs = [read_run(path) for path in paths]
    ranks: dict[int, FlightRank] = {}
    where: dict[int, str] = {}
    for run in runs:
        for rank, one in run.ranks.items():
            if rank in ranks:
                raise TelemetryError(f"rank {rank} is in both {where[rank]} and {run.path}")
            ranks[rank], where[rank] = one, run.path
    problems = [problem for run in runs for problem in run.problems]
    engines = sorted({run.engine_id for run in runs})
    if len(engines) > 1:
        problems.append(f"these are different runs: {', '.join(engines)}")
    return FlightRun(
        ", ".join(run.path for run in runs),
        "live" if any(run.kind == "live" for run in runs) else runs[0].kind,
        dict(sorted(ranks.items())),
        max(run.now_ns for run in runs),
        "; ".join(run.reason for run in runs if run.reason),
        problems,
    )


def read_run(path: str | Path) -> FlightRun:
    """A run directory, live or dead, or a kept copy.

    TelemetryError: there is no such directory, or no ring in it that can be read.
    """
    folder = Path(path)
    problems: list[str] = []
    images = _images(folder, problems)
    kept = _kept(folder, problems)
    states = {
        rank: _state(image, None if kept is None else kept["ranks"].get(str(rank)))
        for rank, image in images.items()
    }
    live = kept is None and not all(state in (DEAD, ENDED) for state in states.values())
    offset_ns = images[min(images)].clock_offset_ns
    images = {rank: _since_1970(image, offset_ns) for rank, image in images.items()}
    if kept is not None:
        now_ns = kept["now_ns"] + offset_ns
    elif live:
        now_ns = time.perf_counter_ns() + offset_ns
    else:
        now_ns = _latest(images.values())
    return FlightRun(
        str(path),
        "kept" if kept is not None else "live" if live else "dead",
        {
            rank: FlightRank(image, states[rank], _graphs(folder, rank, problems), now_ns)
            for rank, image in sorted(images.items())
        },
        now_ns,
        "" if kept is None else kept["reason"],
        problems,
    )


def _images(folder: Path, problems: list[str]) -> dict[int, RingImage]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise TelemetryError(f"cannot read {folder}: {error.strerror}") from error
    images: dict[int, RingImage] = {}
    rings = [name for name in names if name.startswith("rank-") and name.endswith(".ring")]
    for name in rings:
        try:
            image = read_ring(folder / name)
        except (TelemetryError, OSError) as error:
            problems.append(str(error))
            continue
        told = name.removeprefix("rank-").removesuffix(".ring")
        if told.isdecimal() and int(told) != image.rank and len(told) < 10:
            problems.append(f"{name}: it says that it is of rank {image.rank}")
            image = replace(image, rank=int(told))
        if image.rank in images:
            problems.append(f"{name}: there is another ring of rank {image.rank}")
            continue
        problems += [f"{name}: {problem}" for problem in image.problems]
        images[image.rank] = image
    if not images:
        what = "; ".join(problems) if rings else "no rank-*.ring in it"
        raise TelemetryError(f"{folder} is no run directory: {what}")
    return images


def _kept(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """What the keeper wrote down; None if nothing kept this."""
    try:
        with open(folder / KEPT, "rb") as file:
            found = json.loads(file.read(_MAX_SIDE_FILE))
        ranks = {
            str(rank): entry["state"]
            for rank, entry in found["ranks"].items()
            if entry["state"] in _STATES
        }
        now_ns = int(found["now_ns"])
        if not 0 <= now_ns < 1 << 62:
            raise ValueError(f"now_ns is {now_ns}")
        kept = {"ranks": ranks, "now_ns": now_ns, "reason": printable(str(found["reason"]))}
        for name, why in found["left_out"].items():
            problems.append(printable(f"{name} was not kept: {why}"))
    except FileNotFoundError:
        return None
    except (OSError, *_DAMAGE) as error:
        problems.append(f"{KEPT} is damaged: {type(error).__name__}: {printable(str(error))}")
        return None
    return kept


def _state(image: RingImage, kept: str | None) -> str:
    if kept is not None:
        return kept
    return ENDED if image.closed else process_state(image.pid, image.start_time)


def _since_1970(image: RingImage, offset_ns: int) -> RingImage:
    rows: Rows = image.rows.copy()
    kinds = rows[:, META] & 0xF
    timed = (kinds != CONTEXT) & (kinds != SCHEDULED)
    rows[timed, BEGIN] += offset_ns
    rows[timed & (rows[:, END] != 0), END] += offset_ns
    return replace(image, rows=rows)


def _latest(images: Any) -> int:
    times = [0]
    for image in images:
        kinds = image.rows[:, META] & 0xF
        rows = image.rows[(kinds != CONTEXT) & (kinds != SCHEDULED)]
        if len(rows):
            times.append(int(np.maximum(rows[:, BEGIN], rows[:, END]).max()))
    return max(times)


def _graphs(folder: Path, rank: int, problems: list[str]) -> list[str]:
    """Names of a rank's captured CUDA graphs, by their number."""
    names = []
    try:
        with open(folder / f"rank-{rank}.graphs", "rb") as file:
            for line in file.read(_MAX_SIDE_FILE).splitlines():
                names.append(printable(str(json.loads(line)["name"])))
    except FileNotFoundError:
        return names
    except (OSError, *_DAMAGE) as error:
        problems.append(f"rank-{rank}.graphs is damaged after {len(names)}: {type(error).__name__}")
    return names
