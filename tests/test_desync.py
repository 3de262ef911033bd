"""The first disagreement: found at the first call that differs, whatever differs, and only then."""

from pathlib import Path

import numpy as np
import pytest
from written_rings import WrittenRing

from onecast.telemetry.desync import Disagreement, first_disagreement


def found(*rings: WrittenRing) -> Disagreement | None:
    looks = [ring.look() for ring in rings]
    return first_disagreement(
        {look.rank: np.concatenate([look.finished, look.pending]) for look in looks},
        {look.rank: look.names for look in looks},
    )


@pytest.fixture
def rings(tmp_path: Path) -> list[WrittenRing]:
    rings = [WrittenRing(tmp_path, rank, world_size=3, local_world_size=3) for rank in range(3)]
    for ring in rings:
        ring.ring.intern(f"only of {ring.rank}" * ring.rank)  # tables differ between ranks
        for sequence in range(1, 5):
            ring.call(sequence, sequence + 0.5, sequence)
    return rings


def test_ranks_that_agree_do_not_disagree(rings: list[WrittenRing]) -> None:
    rings[0].call(5, None, 5, op="barrier")  # the others have not come to it
    rings[1].call(5, 6, 1, op="send")  # counted apart
    rings[2].call(5, 6, 1, op="recv", nbytes=3)
    for ring in rings:
        ring.call(7, 8, 1, op="all_to_all_single", nbytes=ring.rank, group="ep")
        ring.call(7, 8, 1, op="all_reduce", group=f"backend {ring.rank}", nbytes=ring.rank)
    assert found(*rings) is None
    assert found(rings[0]) is None
    assert first_disagreement({}, {}) is None


@pytest.mark.parametrize(
    ("what", "odd", "calls"),
    [
        ("op", {"op": "reduce"}, ["all_reduce (16 KiB)", "reduce (16 KiB)"]),
        ("size", {"nbytes": 8192}, ["all_reduce (16 KiB)", "all_reduce (8 KiB)"]),
        (
            "dtype",
            {"dtype": "bfloat16"},
            ["all_reduce (16 KiB) of float32", "all_reduce (16 KiB) of bfloat16"],
        ),
    ],
)
def test_what_differs_is_named_with_who_called_what(
    rings: list[WrittenRing], what: str, odd: dict[str, str], calls: list[str]
) -> None:
    for ring in rings:
        ring.call(5, 6, 5, **(odd if ring.rank == 1 else {}))  # type: ignore[arg-type]
        ring.call(6, 7, 6, nbytes=ring.rank)  # only the first is told
    disagreement = found(*rings)
    assert disagreement is not None
    assert (disagreement.what, disagreement.group, disagreement.sequence) == (what, "tp", 5)
    assert disagreement.calls == {0: calls[0], 1: calls[1], 2: calls[0]}
    assert disagreement.text == (
        f"ranks disagree on #5 of tp: ranks 0, 2 called {calls[0]}, rank 1 called {calls[1]}"
    )
    assert disagreement.to_dict()["calls"] == {str(k): v for k, v in disagreement.calls.items()}


def test_the_same_calls_in_another_order_are_told_as_that(rings: list[WrittenRing]) -> None:
    for ring in rings:
        ops = ["broadcast", "all_reduce"] if ring.rank == 2 else ["all_reduce", "broadcast"]
        for sequence, op in enumerate(ops, 5):
            ring.call(sequence, sequence + 0.5, sequence, op=op)
    disagreement = found(*rings)
    assert disagreement is not None and disagreement.what == "order"
    assert disagreement.text.endswith(": the same two calls, in another order on rank 2")


def test_a_call_left_out_is_told_as_that(rings: list[WrittenRing]) -> None:
    sizes = [1, 2, 3, 4, 5, 6]
    for ring in rings:
        own = sizes[1:] if ring.rank == 1 else sizes
        for sequence, nbytes in enumerate(own, 5):
            ring.call(sequence, sequence + 0.5, sequence, nbytes=nbytes)
    disagreement = found(*rings)
    assert disagreement is not None and disagreement.what == "order"
    assert "rank 0 makes one call more than rank 1, or rank 1 left one out" in disagreement.text


def test_the_earliest_of_several_groups_is_the_first(rings: list[WrittenRing]) -> None:
    for ring in rings:
        ring.call(9, 10, 5, nbytes=ring.rank)
        ring.call(8, 11, 400, nbytes=ring.rank, group="dp")
    disagreement = found(*rings)
    assert disagreement is not None
    assert (disagreement.group, disagreement.sequence) == ("dp", 400)


def test_what_was_overwritten_is_not_compared(tmp_path: Path) -> None:
    rings = [WrittenRing(tmp_path, rank, capacity=64) for rank in range(2)]
    for ring in rings:
        for sequence in range(1, 201 if ring.rank else 101):
            ring.call(sequence, sequence + 0.5, sequence, nbytes=sequence)
    assert found(*rings) is None
