"""Who this rank is, and by which name its run goes, in a program that tells us nothing.

Owns the reading of what torchrun says in the environment, and of the key-value store with which
torch's process groups come up; that store is asked once, with no collective call. Knows
nothing of sessions.

    engine id   equal on all ranks of all nodes, and another one for every run: traces derive from
                it. The store settles it: the first rank's proposal holds.
    key         equal on the ranks of one node alone, for `shared_run_dir`: the engine id and the
                node. torchrun's agents count nodes (GROUP_RANK); elsewhere ranks tell their hosts.
"""

import hashlib
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

_RUN = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_NAME_CHARS = 64
# Ranks that were started without us never tell their host; the others do so at the same moment.
_HOSTS_TIMEOUT_S = 3.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # host names need not differ


@dataclass(frozen=True, slots=True)
class Identity:
    """A rank, its place on its node, and the names of its run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    engine_id: str
    key: str


def identify(rank: int, world_size: int, store: Any, environ: Mapping[str, str]) -> Identity:
    """The identity of `rank` of `world_size` in the default group that `store` brought up.

    A store that cannot be asked (MPI has none) leaves what the environment says.
    """
    engine_id = _engine_id(store, environ)
    local = _by_launcher(rank, world_size, environ)
    if local is not None:
        node = environ.get("GROUP_RANK", "0")
    else:
        local = _by_hosts(rank, world_size, store)
        node = "host"
    return Identity(rank, world_size, *local, engine_id, f"{engine_id} node {node}")


def _engine_id(store: Any, environ: Mapping[str, str]) -> str:
    run = environ.get("TORCHELASTIC_RUN_ID", "")
    name = run[:_NAME_CHARS] if run not in ("", "none") else "torch"
    try:
        agreed = store.compare_set("onecast/engine", "", secrets.token_hex(4))
        return f"{name}-{agreed.decode()}"
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        said = [environ.get(variable, "") for variable in _RUN]
        if not any(said):  # nothing that ranks have in common: each goes alone
            return f"{name}-{secrets.token_hex(4)}"
        return f"{name}-{hashlib.sha256(chr(10).join(said).encode()).hexdigest()[:8]}"


def _by_launcher(rank: int, world_size: int, environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Local rank and local world size as torchrun says them, if it speaks of this very group."""
    try:
        said = [int(environ[variable]) for variable in _RANKS]
    except (KeyError, ValueError):
        return None
    said_rank, said_world, local_rank, local_world_size = said
    if (said_rank, said_world) != (rank, world_size):
        return None
    return (local_rank, local_world_size) if 0 <= local_rank < local_world_size else None


def _by_hosts(rank: int, world_size: int, store: Any) -> tuple[int, int]:
    """Local rank and local world size from who else says to be on this host."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    mine = f"{socket.gethostname()} {boot}".encode()
    keys = [f"onecast/host/{other}" for other in range(world_size)]
    try:
        store.set(keys[rank], mine)
        try:
            store.wait(keys, timedelta(seconds=_HOSTS_TIMEOUT_S))
        except RuntimeError:  # torch's DistStoreError is one
            keys = [key for key in keys if store.check([key])]
        here = [key for key in keys if store.get(key) == mine]
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return 0, 1
    return here.index(f"onecast/host/{rank}"), len(here)
