"""Where rings outlive their run: kept copies, private, whole or not there, and never too many.

Owns the flight directory, the form of a kept run, and which directories of former runs are taken
from shared memory. Nothing found there is trusted: other users may write beside it.

    <flight_dir>/                       0700, of this user
        .lock                           held (flock) while a run is kept
        20260131T120000Z-<run>/         0700; it appears by one rename
            kept.json                   {"format": 1, "run_dir", "reason", "now_ns", "kept_at_ns",
                                         "ranks": {"0": {"pid", "state"}}, "left_out": {file: why}}
            rank-<rank>.ring            0600; as it was, cut to the records that were used
            rank-<rank>.graphs, sidecar.json
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .errors import TelemetryError
from .flight_ring import RingImage, read_ring
from .hang_looks import ENDED, process_state
from .ring import (
    H_CAPACITY,
    H_HEAD,
    HEADER_BYTES,
    NAME_BYTES,
    NAMES_OFFSET,
    RECORD_BYTES,
    RECORD_WORDS,
    RECORDS_OFFSET,
    TICKET,
)

KEPT = "kept.json"
MAX_RUNS = 10
MAX_BYTES = 256 << 20
_MAX_SIDE_FILE = 16 << 20
_LOCK_S = 10.0
_NAME = re.compile(r"\d{8}T\d{6}Z-.+")
_MIN_CAPACITY = 64


def keep(run_dir: str | Path, flight_dir: str | Path, *, reason: str = "") -> Path:
    """Copy a run's rings, graph manifests and sidecar.json into `flight_dir`; returns where to.

    Keeps the latest 10 runs, fewer if together they are larger than 256 MiB. Raises OSError, with
    nothing left behind: there is no ring in `run_dir`, no room, or `flight_dir` is another's.
    """
    run_dir, flight_dir = Path(run_dir), Path(flight_dir)
    _make_private(flight_dir)
    with _lock(flight_dir):
        unfinished = flight_dir / f".new-{secrets.token_hex(8)}"
        os.mkdir(unfinished, 0o700)
        try:
            _copy(run_dir, unfinished, reason)
            path = _free_name(flight_dir, run_dir.name)
            os.rename(unfinished, path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        _prune(flight_dir, path)
    return path


def kept_runs(flight_dir: str | Path) -> list[Path]:
    """Kept runs of this user, latest first."""
    try:
        names = os.listdir(flight_dir)
    except FileNotFoundError:
        return []
    paths = (Path(flight_dir, name) for name in sorted(names, reverse=True) if _NAME.match(name))
    return [path for path in paths if _is_own_directory(path)]


def _is_own_directory(path: Path) -> bool:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _make_private(flight_dir: Path) -> None:
    try:
        os.makedirs(flight_dir.parent, exist_ok=True)
        os.mkdir(flight_dir, 0o700)
    except FileExistsError:
        found = os.lstat(flight_dir)
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(f"flight_dir {flight_dir} is no directory") from None
        if found.st_uid != os.getuid():
            raise PermissionError(
                f"flight_dir {flight_dir} belongs to user {found.st_uid}, not to {os.getuid()}"
            ) from None
        if found.st_mode & 0o002:
            raise PermissionError(
                f"flight_dir {flight_dir} may be written by everyone (mode "
                f"{stat.S_IMODE(found.st_mode):o}); it must be private"
            ) from None


@contextmanager
def _lock(flight_dir: Path) -> Iterator[None]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(flight_dir / ".lock", flags, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"another process has been keeping a run in {flight_dir} for {_LOCK_S:g} s"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _free_name(flight_dir: Path, run: str) -> Path:
    began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = flight_dir / f"{began}-{run.removeprefix('onecast-')}"
    while path.exists():
        path = flight_dir / f"{began}-{run.removeprefix('onecast-')}-{secrets.token_hex(2)}"
    return path


def _copy(run_dir: Path, target: Path, reason: str) -> None:
    rings = sorted(run_dir.glob("rank-*.ring"))
    left_out: dict[str, str] = {}
    ranks: dict[str, dict[str, object]] = {}
    now_ns = time.perf_counter_ns()
    for path in rings:
        try:
            image = read_ring(path)
            header = _own_bytes(path, RECORDS_OFFSET)
        except (OSError, TelemetryError) as error:
            left_out[path.name] = str(error)
            continue
        state = ENDED if image.closed else process_state(image.pid, image.start_time)
        ranks[str(image.rank)] = {"pid": image.pid, "state": state}
        _write_ring(target / path.name, image, header, MAX_BYTES // len(rings))
    if not ranks:
        why = "; ".join(left_out.values()) or "no rank has recorded anything"
        raise FileNotFoundError(f"nothing to keep in {run_dir}: {why}")
    for path in [*run_dir.glob("rank-*.graphs"), run_dir / "sidecar.json"]:
        try:
            _write(target / path.name, [(0, _own_bytes(path, _MAX_SIDE_FILE))])
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            left_out[path.name] = str(error)
    manifest = {
        "format": 1,
        "run_dir": str(run_dir),
        "reason": reason,
        "now_ns": now_ns,
        "kept_at_ns": time.time_ns(),
        "ranks": ranks,
        "left_out": left_out,
    }
    _write(target / KEPT, [(0, json.dumps(manifest).encode())])


def _own_bytes(path: Path, limit: int) -> bytes:
    """The beginning of a regular file of this user, through no link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(f"{path} is no file of this user")
        return os.pread(descriptor, limit, 0)
    finally:
        os.close(descriptor)


def _write_ring(path: Path, image: RingImage, header: bytes, share: int) -> None:
    """A ring of the same tickets, of no more slots than it takes."""
    span = image.head - int(image.rows[0, TICKET]) + 1 if len(image.rows) else 0
    capacity = max(_MIN_CAPACITY, 1 << max(span - 1, 0).bit_length())
    while capacity > _MIN_CAPACITY and capacity * RECORD_BYTES > share:
        capacity //= 2
    rows = image.rows[image.rows[:, TICKET] > image.head - capacity]
    slots = np.zeros((capacity, RECORD_WORDS), np.int64)
    slots[(rows[:, TICKET] - 1) & (capacity - 1)] = rows
    used = capacity if image.head > capacity else image.head
    words = np.frombuffer(header[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), np.int64).copy()
    words[H_CAPACITY], words[H_HEAD] = capacity, image.head
    names = header[NAMES_OFFSET : NAMES_OFFSET + len(image.names) * NAME_BYTES]
    parts = [(0, words.tobytes()), (NAMES_OFFSET, names), (RECORDS_OFFSET, slots[:used].tobytes())]
    _write(path, parts, RECORDS_OFFSET + capacity * RECORD_BYTES)


def _write(path: Path, parts: list[tuple[int, bytes]], size: int = 0) -> None:
    """A new private file; what lies between the parts is no block on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        if size:
            os.truncate(descriptor, size)
        for offset, data in parts:
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
    finally:
        os.close(descriptor)


def _prune(flight_dir: Path, newest: Path) -> None:
    """Remove the oldest beyond the limits, and what a keeper that was killed has left."""
    for name in os.listdir(flight_dir):
        if name.startswith(".new-") and _is_own_directory(flight_dir / name):
            shutil.rmtree(flight_dir / name, ignore_errors=True)
    total = 0
    for number, path in enumerate([newest, *(p for p in kept_runs(flight_dir) if p != newest)]):
        total += sum(file.lstat().st_blocks * 512 for file in path.iterdir())
        if number and (number >= MAX_RUNS or total > MAX_BYTES):
            shutil.rmtree(path, ignore_errors=True)
