"""The directory in which the ranks of one node and their sidecar meet.

Owns its name, its place, how the ranks of a node agree on it, and its removal. The name is
unguessable and never fixed, so any number of engines live on one host.
"""

import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path

_SHARED_MEMORY = "/dev/shm"


def name_run_dir() -> str:
    """An unguessable path on tmpfs, or in the temporary directory without one; nothing is made."""
    usable = os.access(_SHARED_MEMORY, os.W_OK | os.X_OK)
    parent = _SHARED_MEMORY if usable else tempfile.gettempdir()
    return f"{parent}/onecast-{secrets.token_hex(8)}"


def make_run_dir(path: str | None = None) -> str:
    """Make the directory, private (mode 0700): `path`, which must be new, or one of its own."""
    path = path or name_run_dir()
    os.mkdir(path, 0o700)
    return path


def agree_on_run_dir(local_rank: int, *, node: object = None, path: str | None = None) -> str:
    """Local rank 0 of every node makes a directory; its other ranks are told of it.

    A collective call of torch.distributed's default group. `node` tells nodes apart (None: by
    host name), `path` is as in `make_run_dir`. ValueError: the group is not there yet.
    """
    import torch.distributed as dist  # not needed by the sidecar

    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised: ranks cannot agree on a run_dir")
    node = socket.gethostname() if node is None else node
    mine = make_run_dir(path) if local_rank == 0 else None
    found: list[tuple[object, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(found, (node, mine))
    made = [directory for where, directory in found if where == node and directory is not None]
    if len(made) != 1:
        raise ValueError(f"node {node!r} has {len(made)} ranks with local rank 0; it must be 1")
    return made[0]


def ring_path(run_dir: str, rank: int) -> Path:
    return Path(run_dir) / f"rank-{rank}.ring"


def remove_run_dir(run_dir: str) -> None:
    """Remove the directory; already gone is fine, as either end may have been first."""
    shutil.rmtree(run_dir, ignore_errors=True)
