"""The directory in which the ranks of one node and their sidecar meet.

Owns its name, its place and its removal. The name is unguessable and never fixed, so any number
of engines live on one host; the caller makes it once per node and tells the other local ranks.
"""

import os
import secrets
import shutil
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


def ring_path(run_dir: str, rank: int) -> Path:
    return Path(run_dir) / f"rank-{rank}.ring"


def remove_run_dir(run_dir: str) -> None:
    """Remove the directory; already gone is fine, as either end may have been first."""
    shutil.rmtree(run_dir, ignore_errors=True)
