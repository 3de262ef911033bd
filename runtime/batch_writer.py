"""The results of a batch on the disk: nothing lost, nothing doubled, whenever the process dies.

Owns the output file while a run writes to it: the lock on it, the cutting of a torn last line, the
results a resumed run finds there, and when the disk is asked to keep what was written. Knows
nothing of what results say beyond their ids.
"""

import fcntl
import os
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

ID_PREFIX = "batch_req_"
SYNC_INTERVAL_S = 0.2
LOCK_TIMEOUT_S = 2.0  # a run that was just killed may need a moment to let go

_RESULT_START = f'{{"id":"{ID_PREFIX}'.encode()


class BatchWriter:
    """Appends result lines to one file, which it alone may write.

    Each line is handed to the kernel whole before `write` returns, so no SIGKILL can lose or split
    it; a thread asks the disk for it within `SYNC_INTERVAL_S`, so a power cut loses no more.

    `done` holds the results that were there already: key -> custom_id.

    ValueError names the file: it holds something already and neither `resume` nor `overwrite` is
    given, another run writes to it, it is no result file or cannot be one.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> None:
        self._path = path = Path(path)
        self._fd = _open_output(path)
        try:
            _lock(self._fd, path, lock_timeout_s)
            self.done = _existing_results(self._fd, path, resume, overwrite)
        except BaseException:
            os.close(self._fd)
            raise
        self._size = os.fstat(self._fd).st_size
        self._syncer = _Syncer(self._fd, path)

    def write(self, result: Mapping[str, Any]) -> None:
        """Append one result line."""
        self._syncer.check()
        line = memoryview(msgspec.json.encode(result) + b"\n")
        try:
            written = os.write(self._fd, line)
            while written < len(line):  # the disk is about to be full: the next write says so
                written += os.write(self._fd, line[written:])
        except BaseException:
            os.ftruncate(self._fd, self._size)  # no line may follow half a line
            raise
        self._size += len(line)
        self._syncer.notify()

    def close(self) -> None:
        """Everything is on the disk when this returns, and another run may write."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            self._syncer.close()
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def count_complete(path: str | Path) -> int:
    """Whole result lines in an output file; 0 if there is none."""
    try:
        with open(path, "rb") as file:
            return sum(line.endswith(b"\n") for line in file)
    except FileNotFoundError:
        return 0


class _Syncer:
    """Calls fsync behind the writer's back: on a busy disk it takes longer than a step."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="onecast-fsync", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        self._dirty.set()

    def check(self) -> None:
        """OSError: the disk refused earlier lines."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._closing.set()
        self._dirty.set()
        self._thread.join()  # at most one fsync, which no timeout could interrupt
        self.check()
        os.fsync(self._fd)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._dirty.wait()
            self._dirty.clear()
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._error = OSError(error.errno, error.strerror, str(self._path))
                return
            self._closing.wait(SYNC_INTERVAL_S)


def _open_output(path: Path) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
    try:
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            fd = os.open(path, flags)
        else:
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(directory)  # or the file itself may be gone after a power cut
            os.close(directory)
    except OSError as error:
        raise ValueError(f"{path}: cannot write results there: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{path}: cannot write results there: not a regular file")
    return fd


def _lock(fd: int, path: Path, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise ValueError(
                    f"{path}: another run is writing to it (waited {timeout_s:g} s for its lock)"
                ) from None
        time.sleep(0.05)


class _Result(msgspec.Struct):
    id: str
    custom_id: str | None


def _existing_results(fd: int, path: Path, resume: bool, overwrite: bool) -> dict[str, str | None]:
    """What the file holds, after half a line at its end (or, to overwrite, everything) is cut."""
    done: dict[str, str | None] = {}
    complete_bytes = 0
    with open(fd, "rb", closefd=False) as file:
        for number, line in enumerate(file, start=1):
            if not (resume or overwrite):
                raise ValueError(
                    f"{path}: holds results already: --resume finishes that run, --overwrite "
                    "starts anew"
                )
            if not line.endswith(b"\n"):
                torn = line.rstrip(b"\0")  # which a power cut may leave
                if not torn.startswith(_RESULT_START[: len(torn)]):
                    raise _not_a_result(path, number)
                break
            try:
                result = msgspec.json.decode(line, type=_Result)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise _not_a_result(path, number) from error
            if not line.startswith(_RESULT_START):
                raise _not_a_result(path, number)
            if overwrite:
                break
            key = result.id.removeprefix(ID_PREFIX)
            if key in done:
                raise ValueError(f"{path}: line {number} has the same id as an earlier one")
            done[key] = result.custom_id
            complete_bytes += len(line)
    if os.fstat(fd).st_size > complete_bytes:
        os.ftruncate(fd, complete_bytes)
        os.fsync(fd)
    return done


def _not_a_result(path: Path, number: int) -> ValueError:
    return ValueError(f"{path}: line {number} is not a result line: is this the right file?")
