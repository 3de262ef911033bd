"""The paged KV cache of one rank: a device pool, a host pool, and moving blocks between them.

Owns the two pools, their layout, and the order of moves inside a step. Which block holds what is
the block manager's business.

    pool [num_blocks, num_layers, 2 (key, value), block_size, num_kv_heads, head_dim]

One block of all layers is contiguous, so that it moves in one piece.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .memory import available_host_bytes


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What a model keeps per token; `num_kv_heads` are those of this rank."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


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
    ) -> None:
        """Raise ValueError where a size is not positive or memory does not hold the pools."""
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
        host = torch.device("cpu")
        _check_room((self.device, num_blocks * block_bytes), (host, num_host_blocks * block_bytes))
        # Zeros, not empty: a slot that was never written may be read under a mask, where a NaN
        # would survive being multiplied by zero.
        self.device_pool = torch.zeros(num_blocks, *block_shape, dtype=spec.dtype, device=device)
        self.host_pool = _host_zeros(
            (num_host_blocks, *block_shape), spec.dtype, pinned=self.device.type == "cuda"
        )
        self.layers = [
            (self.device_pool[:, layer, 0], self.device_pool[:, layer, 1])
            for layer in range(spec.num_layers)
        ]
        self._gathered = torch.empty(2, 0, *block_shape[2:], dtype=spec.dtype, device=device)
        self._moves = (("swap_out", self.swap_out), ("swap_in", self.swap_in), ("copy", self.copy))
        self._device_rows = _rows(self.device_pool, self.device)
        self._host_rows = _rows(self.host_pool, self.device)

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

        Each that has anything to do runs inside `phase("kv.swap_out")` and so on.
        """
        for name, move in self._moves:
            pairs = mapping[name]
            if len(pairs):
                with phase(f"kv.{name}"):
                    move(pairs)

    def swap_out(self, pairs: Any) -> None:
        """Copy blocks from the device to the host: pairs (device block, host block)."""
        _move(self._device_rows, self._host_rows, pairs)

    def swap_in(self, pairs: Any) -> None:
        """Copy blocks from the host to the device: pairs (host block, device block)."""
        _move(self._host_rows, self._device_rows, pairs)

    def copy(self, pairs: Any) -> None:
        """Copy blocks within the device: pairs (source, destination), one after the other."""
        _move(self._device_rows, self._device_rows, pairs)


def _rows(pool: Tensor, device: torch.device) -> Any:
    """The pool as one row of bytes per block.

    A numpy array where both pools are on the CPU: assigning a row is then one memcpy, without the
    3 us that indexing and `copy_` of torch add.
    """
    flat = pool.view(pool.shape[0], pool.stride(0)).view(torch.uint8)
    return flat.numpy() if device.type == "cpu" else flat


def _move(source: Any, destination: Any, pairs: Any) -> None:
    """Copy rows one after the other, so that a row may be a destination and then a source.

    On a GPU every copy goes to the current stream: it comes after the kernels that wrote the
    source and before those that will read the destination.
    """
    num_sources, num_destinations = source.shape[0], destination.shape[0]
    for a, b in pairs.tolist():
        assert 0 <= a < num_sources, f"block {a} of {num_sources} to copy from"
        assert 0 <= b < num_destinations, f"block {b} of {num_destinations} to copy to"
        if isinstance(destination, np.ndarray):
            destination[b] = source[a]
        else:
            destination[b].copy_(source[a], non_blocking=True)


def _host_zeros(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    if pinned and size:
        try:
            return torch.zeros(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            warnings.warn(
                f"cannot lock {size:,} bytes of host memory for "
                f"swapped blocks, swapping will be slower: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
    return torch.zeros(shape, dtype=dtype)


def _check_room(*wanted: tuple[torch.device, int]) -> None:
    """Raise ValueError where the pools on one device need more than it has free."""
    needs: dict[torch.device, int] = {}
    for device, size in wanted:
        needs[device] = needs.get(device, 0) + size
    for device, size in needs.items():
        cuda = device.type == "cuda"
        available = torch.cuda.mem_get_info(device)[0] if cuda else available_host_bytes()
        if size > available:
            raise ValueError(
                f"the KV cache needs {size:,} bytes of {device} memory; {available:,} are available"
            )
