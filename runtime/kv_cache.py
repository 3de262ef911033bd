"""The paged KV cache of one rank: a device pool, a host pool, and moving blocks between them.

Owns the two pools, their layout, and the order of moves inside a step. Which block holds what is
the block manager's business; how bytes move is its `BlockMover`'s.

    pool [num_blocks, num_layers, 2 (key, value), block_size, num_kv_heads, head_dim]

One block of all layers is contiguous, so that it moves in one piece.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .block_mover import BlockMover, Pairs
from .block_runs import check_range, host_pairs
from .host_mover import HostMover
from .pool_memory import check_room, zeros

MakeMover: TypeAlias = Callable[[Tensor, Tensor], BlockMover]

_KINDS = ("swap_out", "swap_in", "copy")
_NO_PAIRS: Pairs = np.empty((0, 2), np.int64)


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What a model keeps per token; `num_kv_heads` are those of this rank.

    Raises ValueError where a number is not positive.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} {value} of a KV cache is less than 1")


class KVCache:
    """Keys and values of all layers in blocks of `block_size` tokens.

    `device_pool` and `host_pool` have the layout above; `layers[i]` is the pair of views
    `(keys, values)`, each `[num_blocks, block_size, num_kv_heads, head_dim]`, of layer i.
    """

    def __init__(
        self,
        spec: CacheSpec,
        *,
        num_blocks: int,
        num_host_blocks: int,
        block_size: int,
        device: torch.device | str,
        make_mover: MakeMover | None = None,
    ) -> None:
        """Raise ValueError where a size is not positive or memory does not hold the pools.

        `make_mover` makes what moves the blocks, from the device's and the host's pool as rows of
        bytes, uint8 [blocks, bytes per block]; by default the one for `device`.
        """
        for name, value, least in (
            ("num_blocks", num_blocks, 1),
            ("num_host_blocks", num_host_blocks, 0),
            ("block_size", block_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name} {value} is less than {least}")
        self.spec = spec
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        block_shape = (spec.num_layers, 2, block_size, spec.num_kv_heads, spec.head_dim)
        block_bytes = self.bytes_per_block(spec, block_size)
        host, cuda = torch.device("cpu"), self.device.type == "cuda"
        check_room((self.device, num_blocks * block_bytes), (host, num_host_blocks * block_bytes))
        self.device_pool = zeros((num_blocks, *block_shape), spec.dtype, self.device)
        self.host_pool = zeros((num_host_blocks, *block_shape), spec.dtype, host, locked=cuda)
        self.layers = [
            (self.device_pool[:, layer, 0], self.device_pool[:, layer, 1])
            for layer in range(spec.num_layers)
        ]
        self._gathered = torch.empty(2, 0, *block_shape[2:], dtype=spec.dtype, device=device)
        make_mover = make_mover or _mover_class(self.device)
        self._mover = make_mover(_rows(self.device_pool), _rows(self.host_pool))
        self._limits = {
            "swap_out": (num_blocks, num_host_blocks),
            "swap_in": (num_host_blocks, num_blocks),
            "copy": (num_blocks, num_blocks),
        }
        self._step = 0  # of the latest moves

    @staticmethod
    def bytes_per_block(spec: CacheSpec, block_size: int) -> int:
        """Size of one block: all layers, keys and values, of this rank."""
        numbers = spec.num_layers * 2 * block_size * spec.num_kv_heads * spec.head_dim
        return numbers * spec.dtype.itemsize

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `blocks` [n] in one layer, `[n, block_size, num_kv_heads, head_dim]`.

        Valid until the next call: the memory is reused. Fresh memory for megabytes in every layer
        of every step would cost more in page faults than gathering and attention together.
        """
        n = blocks.shape[0]
        if self._gathered.shape[1] < n:
            size = (2, n + n // 4, *self._gathered.shape[2:])  # contexts grow: not every step
            with torch.inference_mode(False):
                self._gathered = self._gathered.new_empty(size)
        keys, values = self.layers[layer]
        return (
            torch.index_select(keys, 0, blocks, out=self._gathered[0, :n]),
            torch.index_select(values, 0, blocks, out=self._gathered[1, :n]),
        )

    def apply(
        self,
        mapping: Mapping[str, Any],
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Carry out a step's `swap_out`, then `swap_in`, then `copy`: int64 [n, 2] each.

        Each that has anything to do runs inside `phase("kv.swap_out")` and so on. `step` of the
        mapping is the step's number. Swaps of steps up to `swaps_awaited` are over before the
        copies and whatever follows on the current stream; where that is missing, all are.

        The pairs of one kind may be carried out in any order: see the rules of `block_ops.py`.
        AssertionError, before any block is moved, where a pair leaves a pool.
        """
        step = self._step = mapping["step"]
        checked = {kind: self._checked(kind, mapping[kind]) for kind in _KINDS}
        if len(checked["swap_out"]):
            with phase("kv.swap_out"):
                self._mover.swap_out(step, checked["swap_out"])
        if len(checked["swap_in"]):
            with phase("kv.swap_in"):
                self._mover.swap_in(step, checked["swap_in"])
        self._mover.wait(mapping.get("swaps_awaited", step))
        if len(checked["copy"]):
            with phase("kv.copy"):
                self._mover.copy(checked["copy"])

    def swap_out(self, pairs: Any) -> None:
        """Copy blocks from the device to the host: pairs (device block, host block).

        In any order or at once: no host block may be named twice. Comes before whatever follows
        on the current stream. AssertionError, before any is moved, where a pair leaves a pool.
        """
        checked = self._checked("swap_out", pairs)
        if len(checked):
            self._mover.swap_out(self._step, checked)
            self._mover.wait(self._step)

    def swap_in(self, pairs: Any) -> None:
        """Copy blocks from the host to the device: pairs (host block, device block).

        As `swap_out`; no device block may be named twice.
        """
        checked = self._checked("swap_in", pairs)
        if len(checked):
            self._mover.swap_in(self._step, checked)
            self._mover.wait(self._step)

    def copy(self, pairs: Any) -> None:
        """Copy blocks within the device: pairs (source, destination).

        In any order or at once: no block may be a destination twice, nor both source and
        destination. AssertionError, before any is moved, where a pair leaves the pool.
        """
        checked = self._checked("copy", pairs)
        if len(checked):
            self._mover.wait(self._step)  # for what a step left under way
            self._mover.copy(checked)

    def close(self) -> None:
        """Return once no swap is under way any more; the cache is not used afterwards."""
        self._mover.close()

    def _checked(self, kind: str, pairs: Any) -> Pairs:
        # A tensor of 0 dimensions has no length, and the length of others takes a detour.
        if isinstance(pairs, Tensor):
            size = pairs.numel()
        else:
            size = pairs.size if isinstance(pairs, np.ndarray) else len(pairs)
        if not size:
            return _NO_PAIRS
        checked = host_pairs(pairs)
        check_range(kind, checked, *self._limits[kind])
        return checked


def _rows(pool: Tensor) -> Tensor:
    """The pool as one row of bytes per block."""
    return pool.view(pool.shape[0], pool.stride(0)).view(torch.uint8)


def _mover_class(device: torch.device) -> MakeMover:
    if device.type != "cuda":
        return HostMover
    from .cuda_mover import CudaMover  # what it needs is not there without a GPU

    return CudaMover
