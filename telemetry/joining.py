"""How a rank comes into its run directory: its place in it, its ring, and the node's sidecar.

Owns the order of these, under the directory's lock, and what to do with what others have left
there. Knows nothing of what happens afterwards.
"""

import time
from collections.abc import Callable
from pathlib import Path

from .errors import TelemetryError
from .ring import RingWriter
from .run_directory import locked, ring_path
from .run_end import former_ring, in_use, leave_nothing, rings
from .settings import TelemetrySettings
from .sidecar_record import SidecarRecord
from .sidecar_watch import SidecarWatch

_RETRY_S = 0.02


def join(
    run_dir: str,
    rank: int,
    settings: TelemetrySettings,
    make_ring: Callable[[Path], RingWriter],
    watch: SidecarWatch,
) -> RingWriter:
    """The ring of `rank`, with a sidecar that reads it.

    Raises ValueError for settings that cannot be, TelemetryError or OSError where there is no room
    or the sidecar does not start; then nothing of this rank stays.
    """
    deadline = time.monotonic() + settings.start_timeout_s
    path = ring_path(run_dir, rank)
    while True:
        with locked(run_dir, settings.start_timeout_s, make=True):
            if _place_is_free(run_dir, rank, settings):
                try:
                    ring = make_ring(path)
                    watch.join()
                except BaseException:
                    path.unlink(missing_ok=True)
                    if not in_use(run_dir):
                        leave_nothing(run_dir, settings.flight_dir)
                    raise
                return ring
        if time.monotonic() > deadline:
            raise TelemetryError(
                f"the telemetry of a former rank {rank} in {run_dir} has not ended "
                f"within {settings.start_timeout_s:.1f} s"
            )
        time.sleep(_RETRY_S)


def _place_is_free(run_dir: str, rank: int, settings: TelemetrySettings) -> bool:
    """False: a former rank of this number has left, and the sidecar is still at it."""
    record = SidecarRecord.read(run_dir)
    if not in_use(run_dir):
        if record is not None or rings(run_dir):
            leave_nothing(run_dir, settings.flight_dir, whole=False)  # of a run that was killed
    former = former_ring(run_dir, rank)
    if former is not None and former.alive and not former.closed:
        raise ValueError(f"rank {rank} is recorded in {run_dir} already, by process {former.pid}")
    if former is not None and record is not None and record.alive:
        return False
    for leftover in (ring_path(run_dir, rank), ring_path(run_dir, rank).with_suffix(".new")):
        leftover.unlink(missing_ok=True)
    return True
