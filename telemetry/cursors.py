"""How far the sidecar has read each ring, where the next sidecar finds it: `sidecar.state`.

Owns the file: shared memory that outlives its process, so that a sidecar which takes over from one
that was killed counts nothing twice and leaves nothing out. It is also the proof of who the
sidecar is: one process holds the file (flock) as long as it lives. Knows nothing of rings.

    64 bytes a local rank, native-endian signed 64-bit words, two halves written in turn:

    | generation | cursor | cut_ns | 0 || generation | cursor | cut_ns | 0 |

    generation   stored last, by one aligned 8-byte store: the half with the higher one holds, so a
                 kill between two stores leaves the half before. 0: never written
    cursor       tickets below it have been looked at
    cut_ns       those of them that had ended by then (perf_counter_ns) have been counted
"""

import fcntl
import mmap
import os
import time
from pathlib import Path

from .errors import TelemetryError

_NAME = "sidecar.state"
_DYING_S = 0.5
_HALF_WORDS, _SLOT_WORDS, _WORD = 4, 8, 8


class SidecarBusy(TelemetryError):
    """Another process is this node's sidecar."""


class Cursors:
    """Held by the one sidecar of a run directory. Raises SidecarBusy, or OSError without room."""

    def __init__(self, run_dir: str, local_world_size: int) -> None:
        nbytes = local_world_size * _SLOT_WORDS * _WORD
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(Path(run_dir, _NAME), flags, 0o600)
        try:
            self._acquire()
            os.posix_fallocate(self._descriptor, 0, nbytes)  # else a full tmpfs is a SIGBUS later
            self._words = memoryview(mmap.mmap(self._descriptor, nbytes)).cast("q")
        except BlockingIOError:
            os.close(self._descriptor)
            raise SidecarBusy(f"another process is the telemetry sidecar of {run_dir}") from None
        except BaseException:
            os.close(self._descriptor)
            raise

    def _acquire(self) -> None:
        """A killed process holds its files a moment longer than it is alive."""
        deadline = time.monotonic() + _DYING_S
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def load(self, local_rank: int) -> tuple[int, int | None]:
        """Cursor and cut of the sidecar before, as `RingReader` takes them; 0 and None if none."""
        half = max(self._halves(local_rank), key=self._words.__getitem__)
        if not self._words[half]:
            return 0, None
        return self._words[half + 1], self._words[half + 2]

    def store(self, local_rank: int, cursor: int, cut_ns: int) -> None:
        """Call it when what was read is counted, and before anybody is told the counts."""
        words = self._words
        newest, oldest = sorted(self._halves(local_rank), key=words.__getitem__, reverse=True)
        words[oldest + 1] = cursor
        words[oldest + 2] = cut_ns
        words[oldest] = words[newest] + 1

    def _halves(self, local_rank: int) -> tuple[int, int]:
        first = local_rank * _SLOT_WORDS
        return first, first + _HALF_WORDS

    def close(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # the mapping holds the file too
        os.close(self._descriptor)
