"""The frame of a step: the arrays that a plan becomes, checked by hand."""

from typing import Any

from plain_inputs import DTYPES

from onecast.runtime.admission import SchedulerConfig
from onecast.runtime.input_builder import InputBuilder
from onecast.runtime.request import Request, SamplingParams, Sequence
from onecast.runtime.step import BlockOps, ScheduledSequence, StepPlan


def sequence(tokens: list[int], num_computed: int, table: list[int]) -> Sequence:
    (result,) = Request("r", tuple(tokens), SamplingParams()).sequences
    result.num_computed, result.block_table = num_computed, table
    return result


def build(plan: StepPlan, block_size: int) -> dict[str, Any]:
    return InputBuilder(SchedulerConfig(block_size, 16, 16, 64, 8, 64)).build(plan)


def check(plan: StepPlan, block_size: int, expected: dict[str, Any]) -> None:
    frame = build(plan, block_size)
    assert list(frame) == ["step", "swaps_awaited", *DTYPES], "keys and their order never change"
    assert type(frame["step"]) is int and type(frame["swaps_awaited"]) is int
    for name, dtype in DTYPES.items():
        assert frame[name].dtype == dtype, name
        assert frame[name].flags.c_contiguous, name
        frame[name] = frame[name].tolist()
    assert [row[8:] for row in frame["block_tables"]] == [[]] * len(plan.scheduled)
    expected["block_tables"] = [row + [0] * (8 - len(row)) for row in expected["block_tables"]]
    assert frame == expected


def test_a_mixed_step() -> None:
    decode = sequence([10, 11, 12, 13, 14], 4, [7, 2])  # its 5th token opens block 2
    chunk = sequence([20, 21, 22, 23, 24, 25, 26, 27], 2, [5, 9])  # tokens 2 to 6 of 8
    prompt = sequence([30, 31, 32], 0, [1])  # all of it
    plan = StepPlan(
        41,
        [
            ScheduledSequence(decode, 1, True),
            ScheduledSequence(chunk, 5, False),
            ScheduledSequence(prompt, 3, True),
        ],
        BlockOps(swap_out=[(3, 0)], copy=[(4, 2), (4, 6)]),
    )
    check(
        plan,
        4,
        {
            "step": 41,
            "swaps_awaited": -1,
            "swap_out": [[3, 0]],
            "swap_in": [],
            "copy": [[4, 2], [4, 6]],
            "input_ids": [14, 22, 23, 24, 25, 26, 30, 31, 32],
            "positions": [4, 2, 3, 4, 5, 6, 0, 1, 2],
            "slot_mapping": [8, 22, 23, 36, 37, 38, 4, 5, 6],
            "query_start_loc": [0, 1, 6, 9],
            "seq_lens": [5, 7, 3],
            "block_tables": [[7, 2], [5, 9], [1, 0]],
            "logits_indices": [0, 8],
        },
    )


def test_a_step_of_decodes() -> None:
    plan = StepPlan(
        7,
        [
            ScheduledSequence(sequence([1, 2, 3], 2, [6, 4]), 1, True),
            ScheduledSequence(sequence([5, 6, 7, 8], 3, [3, 0]), 1, True),
            ScheduledSequence(sequence([9, 9, 9], 1, [1, 2]), 1, False),  # a prefill of one token
        ],
        BlockOps(swap_in=[(8, 3)]),
    )
    check(
        plan,
        2,
        {
            "step": 7,
            "swaps_awaited": 7,  # block 3 comes in this very step
            "swap_out": [],
            "swap_in": [[8, 3]],
            "copy": [],
            "input_ids": [3, 8, 9],
            "positions": [2, 3, 1],
            "slot_mapping": [8, 1, 3],
            "query_start_loc": [0, 1, 2, 3],
            "seq_lens": [3, 4, 2],
            "block_tables": [[6, 4], [3, 0], [1, 2]],
            "logits_indices": [0, 1],
        },
    )


def test_a_frame_without_sequences_has_the_layout_of_all_others() -> None:
    expected: dict[str, Any] = {name: [] for name in DTYPES}
    check(StepPlan(5), 16, {"step": 5, "swaps_awaited": -1, **expected, "query_start_loc": [0]})
    frame = build(StepPlan(5), 16)
    assert [frame[name].shape for name in ("swap_out", "swap_in", "copy")] == [(0, 2)] * 3
    assert frame["block_tables"].shape == (0, 0)
