"""Attention over a paged KV cache, in plain torch operations for CPU and GPU.

Owns what all layers of a step share (which slots are written, which blocks are gathered, the
masks), worked out once, and the attention of one layer. Knows nothing of projections or ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .kv_cache import KVCache

# Padding tokens that cost as much as attending to one more group of sequences: about 50 us a layer
# on a CPU core at 2 heads of 64.
_GROUP_COST = 1024


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences of similar length with one new token each, padded to the longest."""

    rows: slice  # among the decoding sequences, in the order of this step's groups
    blocks: Tensor  # [n * w], the block tables one after the other
    mask: Tensor  # [n, 1, 1, w * block_size], 0 or -inf


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Several new tokens of one sequence, behind those that are in the cache."""

    rows: slice  # among the tokens of the step
    length: int  # tokens in the cache after this step
    blocks: Tensor | None  # [w]; None: the whole sequence is in this step
    mask: Tensor | None  # [new tokens, length], 0 or -inf; None: plain causal


class AttentionStep:
    """The attention of one step; `attend` is called once per layer."""

    def __init__(
        self,
        inputs: Mapping[str, Any],
        kv_cache: KVCache,
        *,
        sliding_window: int | None = None,
    ) -> None:
        """`inputs`: see `ModelRunner.forward`."""
        self._kv_cache = kv_cache
        block_size, device = kv_cache.block_size, kv_cache.device
        self._dtype, self._window = kv_cache.spec.dtype, sliding_window
        slots = inputs["slot_mapping"].to(device)
        self._slots = (slots // block_size, slots % block_size)
        starts, lengths = inputs["query_start_loc"].tolist(), inputs["seq_lens"].tolist()
        num_decodes = 0
        while num_decodes < len(lengths) and starts[num_decodes + 1] == num_decodes + 1:
            num_decodes += 1
        self._num_decodes = num_decodes
        tables = inputs["block_tables"].to(device)
        self._order: Tensor | None = None  # how groups order the sequences, if not as they came
        self._groups = self._group_decodes(lengths[:num_decodes], tables, block_size)
        self._chunks = [
            self._make_chunk(starts[b], starts[b + 1], lengths[b], tables[b], block_size)
            for b in range(num_decodes, len(lengths))
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the new keys and values to the cache, then attend.

        `query` [T, heads, head_dim]; `key`, `value` [T, kv heads, head_dim]; any strides but that
        of the last dimension. Returns [T, heads * head_dim].
        """
        keys, values = self._kv_cache.layers[layer]
        keys.index_put_(self._slots, key)
        values.index_put_(self._slots, value)
        num_tokens, num_kv_heads, head_dim = key.shape
        # [T, kv heads, heads of each, head_dim]
        grouped = query.view(num_tokens, num_kv_heads, -1, head_dim)
        if len(self._groups) == 1 and not self._chunks:
            return self._attend_group(layer, self._groups[0], grouped)
        out = query.new_empty(num_tokens, query.shape[1] * head_dim)
        if self._groups:
            self._attend_groups(layer, grouped[: self._num_decodes], out)
        for chunk in self._chunks:
            rows = chunk.rows
            out[rows] = self._attend_chunk(layer, chunk, grouped[rows], key[rows], value[rows])
        return out

    def _attend_groups(self, layer: int, query: Tensor, out: Tensor) -> None:
        if self._order is None:
            out[: self._num_decodes] = self._attend_group(layer, self._groups[0], query)
            return
        query = query.index_select(0, self._order)
        parts = [self._attend_group(layer, group, query[group.rows]) for group in self._groups]
        out[self._order] = torch.cat(parts)

    def _attend_group(self, layer: int, group: _DecodeGroup, query: Tensor) -> Tensor:
        """`query` [n, kv heads, heads of each, head_dim]: heads that share keys are its rows."""
        n, num_kv_heads, _, head_dim = query.shape
        keys, values = self._kv_cache.gather(layer, group.blocks)
        out = scaled_dot_product_attention(
            query,
            keys.view(n, -1, num_kv_heads, head_dim).transpose(1, 2),
            values.view(n, -1, num_kv_heads, head_dim).transpose(1, 2),
            attn_mask=group.mask,
        )
        return out.reshape(n, -1)

    def _attend_chunk(
        self, layer: int, chunk: _Chunk, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        if chunk.blocks is not None:
            keys, values = self._kv_cache.gather(layer, chunk.blocks)
            key, value = keys.flatten(0, 1)[: chunk.length], values.flatten(0, 1)[: chunk.length]
        # As a batch of key/value heads, each attended to by its group of heads: keys are broadcast
        # by a stride of zero, never repeated in memory.
        shape = (key.shape[1], query.shape[2], key.shape[0], key.shape[2])
        out = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.transpose(0, 1)[:, None].expand(shape),
            value.transpose(0, 1)[:, None].expand(shape),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
        )
        return out.permute(2, 0, 1, 3).flatten(1)

    def _group_decodes(
        self, lengths: list[int], tables: Tensor, block_size: int
    ) -> list[_DecodeGroup]:
        if not lengths:
            return []
        counts = np.array(lengths)
        order = np.argsort(-counts, kind="stable")
        bounds = group_by_length(counts[order])
        if len(bounds) > 2:
            self._order = torch.from_numpy(order).to(tables.device)
            tables = tables[self._order]
            counts = counts[order]
        groups = []
        for start, stop in pairwise(bounds):
            width = -(-int(counts[start:stop].max()) // block_size)
            blocks = tables[start:stop, :width].flatten()
            ends = torch.from_numpy(counts[start:stop]).to(tables.device)[:, None]
            positions = torch.arange(width * block_size, device=tables.device)
            hidden = positions >= ends
            if self._window is not None:
                hidden |= positions < ends - self._window
            mask = self._mask(hidden)[:, None, None]
            groups.append(_DecodeGroup(slice(start, stop), blocks, mask))
        return groups

    def _make_chunk(
        self, start: int, stop: int, length: int, table: Tensor, block_size: int
    ) -> _Chunk:
        rows, new = slice(start, stop), stop - start
        if new == length and (self._window is None or length <= self._window):
            return _Chunk(rows, length, None, None)
        blocks = table[: -(-length // block_size)]
        positions = torch.arange(length, device=table.device)
        queries = positions[length - new :, None]
        hidden = positions > queries
        if self._window is not None:
            hidden |= positions <= queries - self._window
        return _Chunk(rows, length, blocks, self._mask(hidden))

    def _mask(self, hidden: Tensor) -> Tensor:
        """Added to scores. Made once a step; given booleans, every layer would convert them."""
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))


def group_by_length(lengths: np.ndarray[Any, Any]) -> list[int]:
    """Bounds of groups of `lengths` (descending) such that padding costs less than more groups."""
    bounds, start = [0], 0
    while len(lengths) - start > 1:
        rest = lengths[start:]
        # Cut before sequence i: all behind it are padded to its length, not to the first's.
        saved = np.arange(len(rest) - 1, 0, -1) * (rest[0] - rest[1:])
        best = int(saved.argmax())
        if saved[best] < _GROUP_COST:
            break
        start += best + 1
        bounds.append(start)
    bounds.append(len(lengths))
    return bounds
