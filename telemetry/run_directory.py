"""The directory in which the ranks of one node and their sidecar meet.

Owns its name, its place, how the ranks of a node agree on it, its lock and its removal. Knows
nothing of what rings hold.

    <run_dir>/                mode 0700
        rank-<rank>.ring      one for each local rank that records
        rank-<rank>.graphs    what its captured CUDA graphs hold, if it has any
        sidecar.lock          held (flock) by whoever joins, starts the sidecar or takes this down
        sidecar.json          who is the sidecar: `sidecar_record`
        sidecar.state         how far it has read, held (flock) by it: `cursors`
        sidecar.sock          where it answers: `report_socket`
        unrecorded            a rank could not record, and has said so

The lock goes last when the directory is taken down, and whoever has waited for it looks whether it
is still the one in the directory: nobody joins a directory that is going.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import TelemetryError

_SHARED_MEMORY = "/dev/shm"
LOCK = "sidecar.lock"
_RETRY_S = 0.01


def _parent() -> str:
    usable = os.access(_SHARED_MEMORY, os.W_OK | os.X_OK)
    return _SHARED_MEMORY if usable else tempfile.gettempdir()


def name_run_dir() -> str:
    """An unguessable path on tmpfs, or in the temporary directory without one; nothing is made."""
    return f"{_parent()}/onecast-{secrets.token_hex(8)}"


def make_run_dir(path: str | None = None) -> str:
    """Make the directory, private (mode 0700): `path`, which must be new, or one of its own."""
    path = path or name_run_dir()
    os.mkdir(path, 0o700)
    return path


def shared_run_dir(key: str) -> str:
    """The directory of this user for `key`, made by whoever comes first.

    Local ranks that know the same key meet there without a collective call. Let the key be of this
    one run and node. Raises TelemetryError if something else of that name is there.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = f"{_parent()}/onecast-{os.getuid()}-{digest}"
    ensure_run_dir(path)
    return path


def ensure_run_dir(path: str) -> None:
    """Make the directory, or see that the one that is there is ours and closed to others."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            what = "no directory"
        elif found.st_uid != os.getuid():
            what = f"of user {found.st_uid}"
        elif found.st_mode & 0o077:
            what = f"open to others (mode {found.st_mode & 0o777:o})"
        else:
            return
        raise TelemetryError(f"telemetry cannot use {path}: it is {what}") from None


def agree_on_run_dir(local_rank: int, *, node: object = None, path: str | None = None) -> str:
    """Local rank 0 of every node makes a directory; its other ranks are told of it.

    A collective call of torch.distributed's default group. `node` tells nodes apart (None: by
    host name), `path` is as in `make_run_dir`. ValueError: the group is not there yet.
    TelemetryError, on all ranks of the node: the directory cannot be made.
    """
    import torch.distributed as dist  # not needed by the sidecar

    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised: ranks cannot agree on a run_dir")
    node = socket.gethostname() if node is None else node
    mine: tuple[str | None, str] | None = None  # the path, or why there is none
    if local_rank == 0:
        try:
            mine = make_run_dir(path), ""
        except OSError as error:
            mine = None, f"no directory for telemetry: {error}"
    found: list[tuple[object, tuple[str | None, str] | None]] = [(None, None)]
    found *= dist.get_world_size()
    dist.all_gather_object(found, (node, mine))
    made = [said for where, said in found if where == node and said is not None]
    if len(made) != 1:
        raise ValueError(f"node {node!r} has {len(made)} ranks with local rank 0; it must be 1")
    directory, why = made[0]
    if directory is None:
        raise TelemetryError(why)
    return directory


def ring_path(run_dir: str, rank: int) -> Path:
    return Path(run_dir) / f"rank-{rank}.ring"


@contextlib.contextmanager
def locked(run_dir: str, timeout_s: float, *, make: bool = False) -> Iterator[None]:
    """Hold the directory's lock; with `make`, make what is missing of both.

    FileNotFoundError: the directory is not there, or gone by now. TelemetryError: others held the
    lock for `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if make:
            ensure_run_dir(run_dir)
        try:
            descriptor = _open_lock(run_dir, make)
        except FileNotFoundError:
            if make:
                continue  # gone between the two calls
            raise
        try:
            _acquire(descriptor, run_dir, timeout_s, deadline)
            if _still_there(descriptor, run_dir):
                yield
                return
        finally:
            # Not left to close(): a child forked meanwhile holds the same open file.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _open_lock(run_dir: str, make: bool) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if make else 0)
    return os.open(Path(run_dir, LOCK), flags, 0o600)


def _acquire(descriptor: int, run_dir: str, timeout_s: float, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TelemetryError(
                    f"another process has held {run_dir}/{LOCK} for {timeout_s:.1f} s"
                ) from None
            time.sleep(_RETRY_S)


def _still_there(descriptor: int, run_dir: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(Path(run_dir, LOCK)))
    except FileNotFoundError:
        return False


def empty_run_dir(run_dir: str) -> None:
    """Remove all files of the directory but its lock, which the caller holds."""
    for name in os.listdir(run_dir):
        if name != LOCK:
            Path(run_dir, name).unlink(missing_ok=True)


def remove_run_dir(run_dir: str) -> None:
    """Remove the directory; already gone is fine, as either end may have been first.

    Mappings of what was in it stay valid.
    """
    try:
        empty_run_dir(run_dir)
        Path(run_dir, LOCK).unlink(missing_ok=True)
        os.rmdir(run_dir)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # somebody has just moved in
            raise
