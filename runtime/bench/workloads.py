"""The four steps that are measured, as the mappings that a driver hands over.

Owns their shapes. Knows nothing of how they travel.

    W1  the block lists of a step alone        three tensors, 320 bytes
    W2  a decode step of 64 sequences          eight tensors, 18 KB, scalars
    W3  a prefill of 2048 tokens, 8 sequences  the runtime's own frame, 49 KB
    W4  a decode step of 256 sequences         eight tensors, 270 KB, scalars
"""

from typing import Any

import torch

WORKLOADS = ("W1", "W2", "W3", "W4")

_BLOCK_SIZE = 16  # tokens


def make_workload(name: str) -> dict[str, Any]:
    """Contiguous tensors in host memory, equal on every rank that makes them."""
    blocks = {
        "swap_in": torch.arange(16).reshape(8, 2),
        "swap_out": torch.arange(16).reshape(8, 2),
        "copy": torch.arange(8).reshape(4, 2),
    }
    if name == "W1":
        return blocks
    if name == "W2":
        return _decode(blocks, 64, 64)
    if name == "W3":
        return _prefill(blocks, 8, 256)
    if name == "W4":
        return _decode(blocks, 256, 256)
    raise ValueError(f"the workload is {name!r}; there are: {', '.join(WORKLOADS)}")


def _decode(blocks: dict[str, Any], sequences: int, width: int) -> dict[str, Any]:
    tables = torch.arange(sequences * width, dtype=torch.int32)
    return {
        "step": 1,
        "num_prefill_tokens": 0,
        "num_decode_tokens": sequences,
        "is_prompt": False,
        **blocks,
        "input_ids": torch.arange(sequences),
        "positions": torch.arange(sequences),
        "slot_mapping": torch.arange(sequences),
        "seq_lens": torch.arange(sequences, dtype=torch.int32),
        "block_tables": tables.reshape(sequences, width),
    }


def _prefill(blocks: dict[str, Any], sequences: int, length: int) -> dict[str, Any]:
    """The keys of a step of the runtime, see `InputBuilder.build`."""
    tokens = sequences * length
    width = length // _BLOCK_SIZE
    starts = torch.arange(sequences + 1, dtype=torch.int32) * length
    return {
        "step": 1,
        **blocks,
        "input_ids": torch.arange(tokens),
        "positions": torch.arange(length).repeat(sequences),
        "slot_mapping": torch.arange(tokens),
        "query_start_loc": starts,
        "seq_lens": torch.full((sequences,), length, dtype=torch.int32),
        "block_tables": torch.arange(sequences * width, dtype=torch.int32).reshape(-1, width),
        "logits_indices": starts[1:].to(torch.int64) - 1,
    }


def same_mapping(one: Any, other: Any) -> bool:
    """Equal keys in equal order, equal values, tensors of equal dtype, shape and content."""
    if list(one) != list(other):
        return False
    return all(_same(a, b) for a, b in zip(one.values(), other.values(), strict=True))


def _same(one: Any, other: Any) -> bool:
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.dtype == other.dtype and torch.equal(one, other)
