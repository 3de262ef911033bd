"""One step as the workers see it: the plan, and its frame of arrays.

Owns the translation of a plan into the arrays of the step's frame. Knows nothing of how the plan
came about, nor of torch: the channel turns the arrays into tensors.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from .block_ops import BlockOps, Pair
from .request import Sequence

__all__ = ["BlockOps", "ScheduledSequence", "StepPlan", "prepare_inputs"]


@dataclass(slots=True, eq=False)
class ScheduledSequence:
    """A sequence's part of a step: its next `num_new_tokens` tokens not in the cache yet.

    One that goes on decoding has the same entry in every step; entries are not changed.
    """

    sequence: Sequence
    num_new_tokens: int
    samples: bool  # the last of them is its last known token, so the next one can be drawn


@dataclass(slots=True)
class StepPlan:
    """What every rank does in one step. Sequences with one new token come first.

    Sample i, for `samples[i]`, is drawn from logits row `sample_rows[i]`; all choices of a request
    draw their first token from the one row of its prompt.
    """

    step: int
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    block_ops: BlockOps = field(default_factory=BlockOps)
    samples: list[Sequence] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do for any rank."""
        ops = self.block_ops
        return not (self.scheduled or ops.swap_out or ops.swap_in or ops.copy)


def prepare_inputs(plan: StepPlan, block_size: int) -> dict[str, Any]:
    """The frame of a step, read from the sequences before the step is committed.

    With T tokens, B sequences, W blocks in the widest table, R rows of logits:

        step              int
        swap_out          int64 [n, 2]   (device block, host block)
        swap_in           int64 [n, 2]   (host block, device block)
        copy              int64 [n, 2]   (source, destination) device blocks
        input_ids         int64 [T]      sequences one after the other
        positions         int64 [T]
        slot_mapping      int64 [T]      block * block_size + offset
        query_start_loc   int32 [B + 1]  tokens of sequence b: [b] to [b + 1]
        seq_lens          int32 [B]      tokens in the cache after this step
        block_tables      int32 [B, W]   padded with 0
        logits_indices    int64 [R]      the tokens whose logits are wanted

    A plan without sequences gives arrays of length zero, and so the same layout.
    """
    scheduled = plan.scheduled
    sequences = [entry.sequence for entry in scheduled]
    num_new = np.array([entry.num_new_tokens for entry in scheduled], dtype=np.int64)
    starts = np.array([sequence.num_computed for sequence in sequences], dtype=np.int64)
    samples = np.array([entry.samples for entry in scheduled], dtype=np.bool_)
    tables = [sequence.block_table for sequence in sequences]
    table_lengths = np.array([len(table) for table in tables], dtype=np.int64)
    block_tables = _pad_tables(tables, table_lengths)
    seq_lens = starts + num_new
    # Padding would silently stand in for a missing block.
    assert (seq_lens <= table_lengths * block_size).all(), "tokens without a block"

    query_start_loc = np.zeros(len(scheduled) + 1, dtype=np.int64)
    np.cumsum(num_new, out=query_start_loc[1:])
    num_tokens = int(query_start_loc[-1])
    if num_tokens == len(scheduled):  # decodes only
        rows = np.arange(num_tokens)
        positions = starts
        input_ids = [sequence.token_ids[sequence.num_computed] for sequence in sequences]
    else:
        rows = np.repeat(np.arange(len(scheduled)), num_new)
        positions = np.arange(num_tokens) + (starts - query_start_loc[:-1])[rows]
        input_ids = []
        for entry in scheduled:
            start = entry.sequence.num_computed
            input_ids += entry.sequence.token_ids[start : start + entry.num_new_tokens]
    blocks = block_tables[rows, positions // block_size].astype(np.int64)
    return {
        "step": plan.step,
        "swap_out": _pairs(plan.block_ops.swap_out),
        "swap_in": _pairs(plan.block_ops.swap_in),
        "copy": _pairs(plan.block_ops.copy),
        "input_ids": np.array(input_ids, dtype=np.int64),
        "positions": positions,
        "slot_mapping": blocks * block_size + positions % block_size,
        "query_start_loc": query_start_loc.astype(np.int32),
        "seq_lens": seq_lens.astype(np.int32),
        "block_tables": block_tables,
        "logits_indices": query_start_loc[1:][samples] - 1,
    }


def _pairs(pairs: list[Pair]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _pad_tables(
    tables: list[list[int]], lengths: np.ndarray[Any, np.dtype[np.int64]]
) -> np.ndarray[Any, np.dtype[np.int32]]:
    width = int(lengths.max(initial=0))
    padded = np.zeros((len(tables), width), dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=int(lengths.sum()))
    padded[np.arange(width) < lengths[:, None]] = flat
    return padded
