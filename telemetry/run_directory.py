"""The directory in which the ranks of one node and their sidecar meet.

Owns its name, its place and its removal. The name is unguessable and never fixed, so any number
of engines live on one host; the caller makes it once per node and tells the other local ranks.
"""

import os
import shutil
import tempfile
from pathlib import Path

_SHARED_MEMORY = "/dev/shm"


def make_run_dir() -> str:
    """A new private directory (mode 0700) on tmpfs, or in the temporary directory without one."""
    parent = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK | os.X_OK) else None
    return tempfile.mkdtemp(prefix="onecast-", dir=parent)  # mkdtemp: 0700, random name


def ring_path(run_dir: str, rank: int) -> Path:
    return Path(run_dir) / f"rank-{rank}.ring"


def remove_run_dir(run_dir: str) -> None:
    """Remove the directory; already gone is fine, as either end may have been first."""
    shutil.rmtree(run_dir, ignore_errors=True)
