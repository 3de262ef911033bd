"""SIGTERM as a wish: the first asks a rank to come to an orderly end, the second ends it.

Owns the handler while ranks serve, and the descriptor that a sleeping loop can wait for. Before and
after, SIGTERM ends a process at once, as everywhere.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """`asked` turns True with the first SIGTERM; then the descriptor is readable.

    The kernel sends SIGTERM too, when the launcher has died: that one ends the process at once.
    """

    def __init__(self, launcher_pid: int | None = None) -> None:
        """`launcher_pid`: the parent that the process must not outlive, if there is one."""
        self.asked = False
        self._launcher_pid = launcher_pid
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._read

    def taken(self) -> None:
        """The descriptor is not readable any more."""
        os.read(self._read, 16)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self._launcher_pid not in (None, os.getppid()):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = True
        os.write(self._write, b"!")

    def _close(self) -> None:
        os.close(self._read)
        os.close(self._write)


@contextmanager
def stop_signal(launcher_pid: int | None = None) -> Iterator[StopSignal]:
    """SIGTERM is caught inside of it. For the main thread of a process."""
    stop = StopSignal(launcher_pid)
    before = signal.signal(signal.SIGTERM, stop._arrived)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
        stop._close()


def catches_stop_signal(pid: int) -> bool:
    """Whether a process would come to an orderly end; False also if it is not there."""
    try:
        with open(f"/proc/{pid}/status") as file:
            masks = [line.split()[1] for line in file if line.startswith("SigCgt:")]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return bool(int(masks[0], 16) >> signal.SIGTERM - 1 & 1)
