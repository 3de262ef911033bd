"""The memory of a step's frame: arrays as long as any step needs, and views as long as one does.

Owns allocation and shapes. What the numbers mean stands with `InputBuilder`.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_COLUMNS = 8


def table_columns(widest: int) -> int:
    """Columns of block tables of which the widest has so many blocks.

    Rounded up: a frame of dimensions that are new costs its sender 60 us more, one of dimensions
    that change 20, and 8 columns of 64 sequences a tenth of a microsecond.
    """
    return -(-widest // _COLUMNS) * _COLUMNS


class StepArrays:
    """The arrays of one frame: views of memory that outlives it."""

    __slots__ = (
        "_memory",
        "block_tables",
        "generation",
        "input_ids",
        "logits_indices",
        "positions",
        "query_start_loc",
        "seq_lens",
        "slot_mapping",
    )

    def __init__(self, max_tokens: int, max_sequences: int, max_blocks: int) -> None:
        """`max_blocks` of one table. The system gives memory only for what steps really touch."""
        self._memory = (
            np.empty((3, max_tokens), dtype=np.int64),
            np.empty(max_sequences, dtype=np.int64),
            np.zeros(max_sequences + 1, dtype=np.int32),  # starts with 0 for good
            np.empty(max_sequences, dtype=np.int32),
            np.empty(max_sequences * table_columns(max_blocks), dtype=np.int32),
        )
        self.resize(0, 0, 0, 0)
        self.generation = -1  # arrays of one generation differ in what a step of decodes changes

    @staticmethod
    def nbytes(max_tokens: int, max_sequences: int, max_blocks: int) -> int:
        """What the two of an engine take at the most, which they get bit by bit."""
        return 2 * (3 * 8 * max_tokens + max_sequences * (16 + 4 * table_columns(max_blocks)))

    def resize(self, tokens: int, sequences: int, columns: int, rows: int) -> None:
        """Views for a step of these dimensions; `rows` of logits. What they hold is undefined."""
        by_token, by_row, starts, by_sequence, tables = self._memory
        self.input_ids: Array = by_token[0, :tokens]
        self.positions: Array = by_token[1, :tokens]
        self.slot_mapping: Array = by_token[2, :tokens]
        self.logits_indices: Array = by_row[:rows]
        self.query_start_loc: Array = starts[: sequences + 1]
        self.seq_lens: Array = by_sequence[:sequences]
        self.block_tables: Array = tables[: sequences * columns].reshape(sequences, columns)

    def repeat(self, other: "StepArrays") -> None:
        """The dimensions of another step, and of its contents what steps of decodes share."""
        sequences, columns = other.block_tables.shape
        self.resize(len(other.positions), sequences, columns, len(other.logits_indices))
        self.query_start_loc[:] = other.query_start_loc
        self.logits_indices[:] = other.logits_indices
        self.block_tables[:] = other.block_tables
        self.generation = other.generation
