"""Runs mean what their pairs mean, one by one, and are as few as they can be."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from onecast.runtime import block_runs
from onecast.runtime.block_runs import check_range, host_pairs, merge_runs, run_columns

MANY = block_runs._FEW_PAIRS + 1  # from here on numpy does it
BLOCKS = 400


@st.composite
def pieces(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Pairs of distinct destinations in any order: pieces of neighbours, and single blocks."""
    pairs: list[tuple[int, int]] = []
    filled: set[int] = set()
    count = st.integers(1, 60)
    for _ in range(draw(st.integers(0, 6))):
        source, destination = draw(st.integers(0, BLOCKS - 61)), draw(st.integers(0, BLOCKS - 61))
        for offset in range(draw(count)):
            if destination + offset not in filled:
                filled.add(destination + offset)
                pairs.append((source + offset, destination + offset))
    return draw(st.permutations(pairs))


def as_array(pairs: list[tuple[int, int]]) -> Any:
    return np.array(pairs, np.int64).reshape(-1, 2)


@given(pieces())
@example([(1, 2), (2, 3)])
@example([(i, 2 * i) for i in range(MANY)])
@example([(i, i + 7) for i in range(MANY)][::-1])
@example([(0, i) for i in range(MANY)])
def test_runs_copy_what_the_pairs_copy_one_by_one(pairs: list[tuple[int, int]]) -> None:
    source = np.arange(BLOCKS)
    one_by_one, by_runs = -np.ones(BLOCKS), -np.ones(BLOCKS)
    for a, b in pairs:
        one_by_one[b] = source[a]
    runs = merge_runs(as_array(pairs))
    for start, target, length in runs:
        assert (by_runs[target : target + length] == -1).all(), "a block is filled twice"
        by_runs[target : target + length] = source[start : start + length]
    assert (by_runs == one_by_one).all()
    assert sum(length for _, _, length in runs) == len(pairs)


@given(pieces())
def test_no_two_runs_could_be_one_and_they_come_by_rising_source(
    pairs: list[tuple[int, int]],
) -> None:
    pairs = list({a: (a, b) for a, b in pairs}.values())  # no source twice
    runs = merge_runs(as_array(pairs))
    assert runs == sorted(runs)
    ends = {(start + length, target + length) for start, target, length in runs}
    assert not ends & {(start, target) for start, target, _ in runs}


@given(pieces(), st.integers(1, 2**40))
def test_few_pairs_and_many_are_merged_alike_in_any_unit(
    pairs: list[tuple[int, int]], unit: int
) -> None:
    few, many = block_runs._few, block_runs._many
    if pairs:
        columns = [list(column) for column in many(as_array(pairs), 1)]
        assert [list(column) for column in few(as_array(pairs), 1)] == columns
        expected = [[number * unit for number in column] for column in columns]
        assert [list(column) for column in many(as_array(pairs), unit)] == expected
        assert [list(column) for column in few(as_array(pairs), unit)] == expected


def test_neighbours_become_one_run_wherever_they_stand() -> None:
    assert merge_runs(as_array([(7, 2), (4, 9), (8, 3), (5, 0)])) == [
        (4, 9, 1),
        (5, 0, 1),
        (7, 2, 2),
    ]
    assert merge_runs(as_array([])) == []
    assert run_columns(as_array([(3, 1), (4, 2)]), 512) == ([1536], [512], [1024])
    large = 2**31 - 100
    ends = [(i, large + i) for i in range(MANY)]
    assert merge_runs(as_array(ends)) == [(0, large, MANY)]
    assert merge_runs(as_array([(b, a) for a, b in ends])) == [(large, 0, MANY)]


@pytest.mark.parametrize(
    "given_pairs",
    [
        [(1, 2), (3, 4)],
        ((1, 2), (3, 4)),
        np.array([[1, 2], [3, 4]], np.int32),
        np.array([[1, 3], [2, 4]], np.int64).T,
        torch.tensor([[1, 2], [3, 4]]),
        torch.tensor([[1, 2, 9], [3, 4, 9]])[:, :2],
    ],
)
def test_pairs_of_any_kind_become_contiguous_int64_on_the_host(given_pairs: Any) -> None:
    pairs = host_pairs(given_pairs)
    assert isinstance(pairs, np.ndarray) and pairs.dtype == np.int64 and pairs.flags.c_contiguous
    assert pairs.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("nothing", [[], np.empty((0, 2), np.int64), torch.empty(0, 2).long()])
def test_no_pairs_stay_no_pairs(nothing: Any) -> None:
    pairs = host_pairs(nothing)
    assert pairs.shape == (0, 2)
    check_range("copy", pairs, 0, 0)


def test_pairs_that_are_right_already_are_not_copied() -> None:
    frame = np.frombuffer(np.arange(6).tobytes(), np.int64).reshape(3, 2)
    assert np.shares_memory(host_pairs(frame), frame)
    tensor = torch.arange(6).view(3, 2)
    assert np.shares_memory(host_pairs(tensor), tensor.numpy())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([1, 2], "int64 [2]; they must be integers [n, 2]"),
        ([(1, 2, 3)], "int64 [1, 3]; they must be integers [n, 2]"),
        ([(1.0, 2.0)], "float64 [1, 2]; they must be integers [n, 2]"),
        (torch.zeros(3, 2), "float32 [3, 2]; they must be integers [n, 2]"),
        (torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True), "bfloat16 [3, 2]; they must"),
        (torch.tensor(3), "int64 []; they must be integers [n, 2]"),
        (np.array([[0, 2**64 - 1]], np.uint64), "block 18446744073709551615 is above 922337"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused_with_its_shape(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        host_pairs(wrong)


@given(st.lists(st.tuples(st.integers(-2, 12), st.integers(-2, 12)), max_size=80))
def test_the_first_pair_out_of_range_is_named_and_none_in_range_is(
    pairs: list[tuple[int, int]],
) -> None:
    wrong = [(a, b) for a, b in pairs if not (0 <= a < 10 and 0 <= b < 8)]
    if not wrong:
        check_range("swap_in", as_array(pairs), 10, 8)
        return
    source, destination = wrong[0]
    block, size, verb = (destination, 8, "fill") if 0 <= source < 10 else (source, 10, "read")
    with pytest.raises(AssertionError) as caught:
        check_range("swap_in", as_array(pairs), 10, 8)
    named = f"swap_in ({source}, {destination}): block {block} of {size} to {verb}"
    assert str(caught.value) == named
