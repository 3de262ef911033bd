"""A process group of a channel's own, for a few ranks of a larger one.

Owns its name, its life, and the way out while one of its broadcasts is still under way. Knows
nothing of what is broadcast.
"""

import ctypes
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

# A broadcast may wait a night for the next frame; whoever waits for it has time-outs of its own.
_OPERATION_TIMEOUT = timedelta(days=365)


class PrivateGroup:
    """A Gloo group of the global ranks `ranks`, which all make it, and nobody else.

    `name` is one that the store has never seen. Raises RuntimeError if the ranks do not find one
    another within `timeout_s`.

    `dist.new_group` cannot be used: it wants all ranks of the world, or derives a name from the
    number of groups that each rank is in, which need not be equal. This is what it does otherwise.
    """

    def __init__(self, ranks: Sequence[int], name: str, timeout_s: float) -> None:
        ranks = sorted(ranks)
        store = c10d._get_default_store()
        self.handle, _ = c10d._new_process_group_helper(
            len(ranks),
            ranks.index(dist.get_rank()),
            ranks,
            dist.Backend("gloo"),
            store,
            name,  # type: ignore[arg-type]
            timeout=timedelta(seconds=timeout_s),
            group_desc="onecast leaders",
        )
        c10d._world.pg_group_ranks[self.handle] = {rank: at for at, rank in enumerate(ranks)}
        c10d._set_pg_timeout(_OPERATION_TIMEOUT, self.handle)

    def exists(self) -> bool:
        """Whether it was not destroyed with all others."""
        return self.handle in c10d._world.pg_map

    def close(self, busy: bool) -> None:
        """Leave the group. `busy`: one of its operations is still under way.

        Nothing can end such an operation, and to take a group apart waits for it, perhaps for ever.
        So a busy group is forgotten instead: its sockets stay open until the process ends.
        """
        if busy:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.handle))
        if self.exists():
            dist.destroy_process_group(self.handle)
        del self.handle
