"""The frame of a step in the plainest way, token by token: what `InputBuilder` must equal."""

from typing import Any

import numpy as np

from onecast.runtime.step import StepPlan

DTYPES = {
    "swap_out": np.int64,
    "swap_in": np.int64,
    "copy": np.int64,
    "input_ids": np.int64,
    "positions": np.int64,
    "slot_mapping": np.int64,
    "query_start_loc": np.int32,
    "seq_lens": np.int32,
    "block_tables": np.int32,
    "logits_indices": np.int64,
}


def plain_inputs(plan: StepPlan, block_size: int) -> dict[str, list[Any]]:
    """The arrays of a step as lists; tables no wider than they must be."""
    lists: dict[str, list[Any]] = {name: [] for name in DTYPES}
    lists["swap_out"] = [list(pair) for pair in plan.block_ops.swap_out]
    lists["swap_in"] = [list(pair) for pair in plan.block_ops.swap_in]
    lists["copy"] = [list(pair) for pair in plan.block_ops.copy]
    lists["query_start_loc"] = [0]
    width = max((len(entry.sequence.block_table) for entry in plan.scheduled), default=0)
    for entry in plan.scheduled:
        sequence = entry.sequence
        table, end = sequence.block_table, sequence.num_computed + entry.num_new_tokens
        for position in range(sequence.num_computed, end):
            lists["input_ids"].append(sequence.token_ids[position])
            lists["positions"].append(position)
            block = table[position // block_size]
            lists["slot_mapping"].append(block * block_size + position % block_size)
        lists["query_start_loc"].append(len(lists["input_ids"]))
        lists["seq_lens"].append(end)
        lists["block_tables"].append(table + [0] * (width - len(table)))
        if entry.samples:
            lists["logits_indices"].append(len(lists["input_ids"]) - 1)
    return lists


def check_frame(frame: dict[str, Any], plan: StepPlan, block_size: int) -> None:
    """A frame has what its plan says, in the layout that all frames have."""
    assert list(frame) == ["step", "swaps_awaited", *DTYPES], "keys and their order never change"
    assert type(frame["step"]) is int and type(frame["swaps_awaited"]) is int
    assert frame["step"] == plan.step
    for name, expected in plain_inputs(plan, block_size).items():
        array = frame[name]
        assert array.dtype == DTYPES[name], name
        assert array.flags.c_contiguous, name
        if name == "block_tables":
            assert array.ndim == 2 and array.shape[1] % 8 == 0
            width = len(expected[0]) if expected else 0
            assert not array[:, width:].any()
            array = array[:, :width]
        elif name in ("swap_out", "swap_in", "copy"):
            assert array.shape[1:] == (2,)
        assert array.tolist() == expected, name
