"""The end of a run directory: what is kept of it, and that it goes.

Owns the question whether a run ended badly (a rank died without closing its ring), and the order in
which its rings are kept for `onecast flight` and the directory is emptied. Callers hold the
directory's lock. Knows nothing of how flight records are read.
"""

import contextlib
import logging
import os
from pathlib import Path

from .errors import TelemetryError
from .ring_reader import RingReader
from .run_directory import empty_run_dir, locked, remove_run_dir, ring_path
from .sidecar_record import SidecarRecord

_logger = logging.getLogger(__name__)
_LOCK_TIMEOUT_S = 2.0  # whoever holds it longer stays, and looks after the directory


def rings(run_dir: str) -> list[RingReader]:
    """Those that can be read; what a crash or another version left is no ring."""
    found = []
    for path in sorted(Path(run_dir).glob("rank-*.ring")):
        try:
            found.append(RingReader(path))
        except (TelemetryError, FileNotFoundError, ValueError):
            continue
    return found


def in_use(run_dir: str) -> bool:
    """Whether a rank still records there, or a sidecar is at work."""
    record = SidecarRecord.read(run_dir)
    if record is not None and record.alive:
        return True
    return any(reader.alive and not reader.closed for reader in rings(run_dir))


def keep(run_dir: str, flight_dir: str, why: str) -> None:
    """Put the rings where they outlive the run, and say where, or why not."""
    from .flight import keep as keep_flight  # no business of a rank that does well

    try:
        path = keep_flight(run_dir, flight_dir, reason=why)
    except (OSError, TelemetryError) as error:
        _logger.warning("%s; its record could not be kept in %s: %s", why, flight_dir, error)
        return
    _logger.warning("%s; its last events: onecast flight %s", why, path)


def leave_nothing(run_dir: str, flight_dir: str, *, whole: bool = True) -> None:
    """Nobody uses the directory any more: keep what is of interest, remove the rest.

    With `whole` the directory goes too, else it is left empty for the caller, who has the lock.
    """
    died = [reader.rank for reader in rings(run_dir) if not reader.closed]
    if died:
        ranks = ("rank " if len(died) == 1 else "ranks ") + ", ".join(map(str, died))
        keep(run_dir, flight_dir, f"{ranks} ended without closing telemetry")
    if whole:
        remove_run_dir(run_dir)
    else:
        empty_run_dir(run_dir)


def leave_if_last(run_dir: str, flight_dir: str) -> None:
    """For a rank that leaves without a sidecar: take the directory down unless somebody uses it."""
    try:
        with locked(run_dir, _LOCK_TIMEOUT_S):
            if not in_use(run_dir):
                leave_nothing(run_dir, flight_dir)
    except FileNotFoundError:  # it is gone, or nobody has ever come so far as to lock it
        with contextlib.suppress(OSError):
            os.rmdir(run_dir)
    except (OSError, TelemetryError) as error:
        _logger.warning("%s may stay behind: %s", run_dir, error)


def former_ring(run_dir: str, rank: int) -> RingReader | None:
    """What is there in the place where `rank` is about to put its ring."""
    try:
        return RingReader(ring_path(run_dir, rank))
    except (TelemetryError, FileNotFoundError, ValueError):
        return None
