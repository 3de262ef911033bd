"""The frame of a step: the arrays that a plan becomes.

Owns the translation, and the memory that frames lie in. Knows nothing of how a plan came about,
nor of torch: the channel turns arrays into tensors. It publishes arrays as fast as tensors, 9 us
for either while dimensions repeat.

What costs time is reading tables and tokens out of lists. So the frame before is the start of the
next: rows of tables that are known are copied, and a step in which the same sequences go on
decoding is the step before plus one. Two frames' memory is used in turn.
"""

from typing import Any

import numpy as np

from .admission import SchedulerConfig
from .block_ops import Pair
from .step import ScheduledSequence, StepPlan
from .step_arrays import Array, StepArrays, table_columns
from .swap_ledger import SwapLedger

_NO_PAIRS = np.empty((0, 2), dtype=np.int64)
_NO_BLOCKS = np.empty(0, dtype=np.int64)
_NOTHING = (_NO_BLOCKS, _NO_BLOCKS, _NO_BLOCKS)  # rows, columns, blocks


class InputBuilder:
    """Builds the frames of an engine's steps, one after the other.

    Relies on what scheduler and block manager keep to: the block table of a sequence that is in two
    steps in a row is appended to in place; anything else makes it a new list, or comes in a step
    with copies. An entry of the plan that is in the next one too, the same object, is a decode that
    goes on.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        max_blocks = -(-config.max_model_len // config.block_size)
        dimensions = config.max_batch_tokens, config.max_sequences, max_blocks
        self._block_size = config.block_size
        self._latest, self._other = StepArrays(*dimensions), StepArrays(*dimensions)
        self._ledger = SwapLedger(config.num_blocks)
        # Of the latest build:
        self._step = -1
        self._scheduled: list[ScheduledSequence] = []
        self._tables: list[list[int]] = []
        self._lengths = _NO_BLOCKS  # of the tables, as they are in the frame
        self._steps_to_go = 0  # that only count on from it; 0: not all of it are decodes
        self._singles = 0  # sequences with one new token, which come first
        self._grown = _NOTHING  # what it added to tables, if it only counted on
        self._new_blocks: list[Array] = []  # what the frame before did not have

    def build(self, plan: StepPlan) -> dict[str, Any]:
        """The frame of a step, read from the sequences before the step is accounted for.

        With T tokens, B sequences, W at least the blocks in the widest table, R rows of logits:

            step              int
            swaps_awaited     int            newest step, perhaps this one, whose swaps must be over
                                             before copy and forward; -1: none, or none not
                                             awaited by an earlier step
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

        The arrays are numpy's, for reading, and valid until the next build but one. A plan that has
        changed since is built again. AssertionError where a token has no block.
        """
        ops, ledger = plan.block_ops, self._ledger
        swap_out, swap_in, copy = _pairs(ops.swap_out), _pairs(ops.swap_in), _pairs(ops.copy)
        ledger.begin(plan.step, swap_out, swap_in)
        goes_on = (
            self._steps_to_go > 0
            and plan.step == self._step + 1
            and not ops.copy
            and plan.scheduled == self._scheduled
        )
        if goes_on:
            self._count_on()
        else:
            self._lay_out(plan.scheduled, keep_tables=not ops.copy)
        self._write_tokens()
        if ledger.open:
            ledger.touch(copy)
            if ops.swap_out or ops.swap_in or plan.step == self._step:
                ledger.touch(self._used_blocks())
            else:  # the step before had the others
                for blocks in self._new_blocks:
                    ledger.touch(blocks)
        self._step = plan.step
        arrays = self._latest
        return {
            "step": plan.step,
            "swaps_awaited": ledger.awaits,
            "swap_out": swap_out,
            "swap_in": swap_in,
            "copy": copy,
            "input_ids": arrays.input_ids,
            "positions": arrays.positions,
            "slot_mapping": arrays.slot_mapping,
            "query_start_loc": arrays.query_start_loc,
            "seq_lens": arrays.seq_lens,
            "block_tables": arrays.block_tables,
            "logits_indices": arrays.logits_indices,
        }

    def fill(self, plan: StepPlan) -> None:
        """Write tokens that have become known since into the frame of the latest build."""
        assert plan.step == self._step and plan.scheduled == self._scheduled, "build it first"
        self._write_tokens()

    def _lay_out(self, scheduled: list[ScheduledSequence], keep_tables: bool) -> None:
        """All but the tokens, of any step."""
        num_sequences, size = len(scheduled), self._block_size
        tables = [entry.sequence.block_table for entry in scheduled]
        lengths = np.array([*map(len, tables)], dtype=np.int64)
        num_new = np.array([entry.num_new_tokens for entry in scheduled], dtype=np.int64)
        starts = np.array([entry.sequence.num_computed for entry in scheduled], dtype=np.int64)
        samples = np.array([entry.samples for entry in scheduled], dtype=np.bool_)
        ends = starts + num_new
        # Padding would silently stand in for a missing block.
        assert (ends <= lengths * size).all(), "tokens without a block"
        singles = int((num_new == 1).sum())
        assert (num_new[:singles] == 1).all(), "sequences with one new token come first"

        last, arrays = self._latest, self._other
        columns, num_tokens = table_columns(int(lengths.max(initial=0))), int(num_new.sum())
        arrays.resize(num_tokens, num_sequences, columns, int(samples.sum()))
        self._copy_tables(tables, lengths, last.block_tables, arrays.block_tables, keep_tables)
        offsets = arrays.query_start_loc
        np.cumsum(num_new, out=offsets[1:])
        arrays.seq_lens[:] = ends
        if num_tokens == num_sequences:
            rows = np.arange(num_sequences)
            arrays.positions[:] = starts
        else:
            rows = np.repeat(np.arange(num_sequences), num_new)
            np.add(np.arange(num_tokens), (starts - offsets[:-1])[rows], out=arrays.positions)
        quotients, remainders = np.divmod(arrays.positions, size)
        arrays.slot_mapping[:] = arrays.block_tables[rows, quotients]
        arrays.slot_mapping *= size
        arrays.slot_mapping += remainders
        arrays.logits_indices[:] = offsets[1:][samples] - 1

        arrays.generation = last.generation + 1
        self._latest, self._other = arrays, last
        self._scheduled, self._tables, self._lengths = list(scheduled), tables, lengths
        self._singles, self._grown = singles, _NOTHING
        self._steps_to_go = 0
        if num_tokens and num_sequences == num_tokens == len(arrays.logits_indices):
            self._steps_to_go = columns * size - int(ends.max())

    def _count_on(self) -> None:
        """All but the tokens, of the step after a step of decodes, with the same sequences."""
        last, arrays, size = self._latest, self._other, self._block_size
        if arrays.generation == last.generation:
            rows, columns, blocks = self._grown
            arrays.block_tables[rows, columns] = blocks
        else:
            arrays.repeat(last)
        np.add(last.seq_lens, 1, out=arrays.seq_lens)
        np.add(last.slot_mapping, 1, out=arrays.slot_mapping)
        positions = np.add(last.positions, 1, out=arrays.positions)
        assert positions[0] == self._scheduled[0].sequence.num_computed, "a step was left out"
        rows = np.flatnonzero(positions % size == 0)
        self._grown, self._new_blocks = _NOTHING, []
        if len(rows):
            columns = positions[rows] // size
            blocks = np.array(self._blocks_at(rows.tolist(), columns.tolist()), dtype=np.int64)
            arrays.block_tables[rows, columns] = blocks
            arrays.slot_mapping[rows] = blocks * size
            self._lengths[rows] = columns + 1
            self._grown, self._new_blocks = (rows, columns, blocks), [blocks]
        self._steps_to_go -= 1
        self._latest, self._other = arrays, last

    def _blocks_at(self, rows: list[int], columns: list[int]) -> list[int]:
        tables = self._tables
        try:
            return [tables[row][column] for row, column in zip(rows, columns, strict=True)]
        except IndexError:
            raise AssertionError("tokens without a block") from None

    def _copy_tables(
        self,
        tables: list[list[int]],
        lengths: Array,
        before: Array,
        after: Array,
        keep: bool,
    ) -> None:
        """Fill `after`: rows of known tables from `before`, and what is new from the tables."""
        after[:] = 0
        self._new_blocks = []
        filled = np.zeros(len(tables), dtype=np.int64)
        if keep and self._tables:
            known = {id(table): row for row, table in enumerate(self._tables)}
            rows = np.array([known.get(id(table), -1) for table in tables], dtype=np.int64)
            kept = (rows >= 0) & (self._lengths[rows] <= lengths)
            sources, width = rows[kept], min(before.shape[1], after.shape[1])
            after[kept, :width] = before[sources, :width]
            filled[kept] = self._lengths[sources]
        for row in np.flatnonzero(filled < lengths).tolist():
            first = int(filled[row])
            new = after[row, first : len(tables[row])]
            new[:] = tables[row][first:]
            self._new_blocks.append(new)

    def _write_tokens(self) -> None:
        scheduled, singles, out = self._scheduled, self._singles, self._latest.input_ids
        if self._steps_to_go:  # decodes: their last known token
            out[:] = [entry.sequence.token_ids[-1] for entry in scheduled]
            return
        tokens = [
            (sequence := entry.sequence).token_ids[sequence.num_computed]
            for entry in scheduled[:singles]
        ]
        for entry in scheduled[singles:]:
            start = entry.sequence.num_computed
            tokens += entry.sequence.token_ids[start : start + entry.num_new_tokens]
        out[:] = tokens

    def _used_blocks(self) -> Array:
        tables = self._latest.block_tables
        return tables[np.arange(tables.shape[1]) < self._lengths[:, None]]


def _pairs(pairs: list[Pair]) -> Array:
    return np.array(pairs, dtype=np.int64) if pairs else _NO_PAIRS
