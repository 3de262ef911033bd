"""Clears shared memory of runs that were killed as a whole: what they recorded is kept elsewhere.

Owns the decision that nobody uses a run directory any more. It errs on the side of leaving it: a
process may just be starting, and one in another container has a process id that means nothing here.
"""

import fcntl
import logging
import os
import re
import stat
import time
from pathlib import Path

from .errors import TelemetryError
from .flight_keep import keep
from .flight_ring import RingImage, read_ring
from .hang_looks import DEAD, process_state
from .ring import BEGIN, END
from .run_directory import LOCK, locked, remove_run_dir
from .sidecar_record import SidecarRecord

_logger = logging.getLogger(__name__)
_NAME = re.compile(r"onecast-(\d+-)?[0-9a-f]{16}")  # as `run_directory` names them
_LAST = 64  # records looked at for when it was last alive
_STARTING_S = 60.0  # a rank that has not come by then never will
_JUST_DIED_NS = 5_000_000_000  # whoever started it may be about to look at it, or to clear it away
_UNUSED_S = 3600.0  # ranks that agree on a directory before they record may wait for one another


def sweep(flight_dir: str | Path, parent: str | Path = "/dev/shm") -> list[Path]:
    """Keep and remove the run directories of this user whose processes are all dead.

    Returns where they are kept now. What ended in order (all rings closed, nothing in flight) is
    removed and not kept. A directory that cannot be kept stays; the log says why.
    """
    kept = []
    try:
        names = sorted(os.listdir(parent))
    except FileNotFoundError:
        return []
    for name in names:
        path = Path(parent, name)
        try:
            if _NAME.fullmatch(name) and _is_old(path):
                kept += _take(path, Path(flight_dir))
        except FileNotFoundError:
            continue  # another one was faster
        except OSError as error:
            _logger.warning("cannot keep what the run in %s has left: %s", path, error)
    return kept


def _is_old(path: Path) -> bool:
    """Whether it is a directory of this user that nobody uses or can be about to use."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    changes = [file.lstat().st_mtime for file in path.iterdir() if file.name != LOCK]
    age_s = time.time() - max(changes, default=found.st_mtime)
    try:
        images = [read_ring(ring, last=_LAST) for ring in path.glob("rank-*.ring")]
    except TelemetryError:
        return False  # of another version, perhaps: nobody knows whose process it is
    if not images:
        return age_s > _UNUSED_S
    expected = max(image.local_world_size for image in images)
    if (len(images) < expected or any(path.glob("rank-*.new"))) and age_s < _STARTING_S:
        return False
    if any(process_state(image.pid, image.start_time) != DEAD for image in images):
        return False
    return not any(0 <= time.perf_counter_ns() - _latest(image) < _JUST_DIED_NS for image in images)


def _latest(image: RingImage) -> int:
    """perf_counter_ns of the last that a rank recorded; 0 if it never did."""
    return int(image.rows[:, [BEGIN, END]].max()) if len(image.rows) else 0


def _take(path: Path, flight_dir: Path) -> list[Path]:
    """Keep what is worth it and remove the directory, unless somebody is at work there."""
    run_dir = str(path)
    if not any(path.iterdir()):
        os.rmdir(path)
        return []
    try:
        _make_lock(path)
        with locked(run_dir, 0.0):
            if _has_sidecar(path) or not _is_old(path):
                return []
            kept = []
            if not all(_ended_in_order(ring) for ring in path.glob("rank-*.ring")):
                kept = [keep(path, flight_dir, reason="all its processes were killed")]
            remove_run_dir(run_dir)
            return kept
    except TelemetryError:
        return []  # the lock is held


def _make_lock(path: Path) -> None:
    """Not by `locked(make=True)`: that would make the directory again that another has taken."""
    os.close(os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _has_sidecar(path: Path) -> bool:
    record = None
    try:
        record = SidecarRecord.read(str(path))
    except (ValueError, TypeError):
        _logger.warning("%s/sidecar.json is damaged", path)
    if record is not None and record.alive:
        return True
    try:
        descriptor = os.open(path / "sidecar.state", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:  # held by a sidecar as long as it lives, and that shows across containers
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _ended_in_order(ring: Path) -> bool:
    image = read_ring(ring)
    return image.closed and not len(image.in_flight)
