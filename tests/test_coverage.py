"""Coverage: whatever a program does with torch.distributed is recorded once, and the groups' own
sequence numbers say so."""

from typing import Any

import coverage_cases
import pytest
from coverage_cases import CASES
from test_intercept import Recording

from onecast.comm.testing import run_ranks
from onecast.telemetry import ring as layout
from onecast.telemetry.aggregate import group_label


def _run_cases(rank: int) -> dict[str, Any]:
    import torch.distributed as dist

    world = coverage_cases.World(rank, dist.new_group([0, 1], group_desc="tp"))
    recording = Recording(rank)
    found: dict[str, Any] = {}
    for name, (run, _) in CASES.items():
        before = {one.group: one for one in recording.instrumentor.coverage()}
        run(world)
        recording.instrumentor.sample_coverage()
        names = recording.reader.names
        rows = sorted(recording.rows(), key=lambda row: row[layout.TICKET])
        found[name] = (
            [
                (
                    names[layout.meta_name(row[layout.META])],
                    group_label(names[layout.meta_group(row[layout.META])]),
                    row[layout.NBYTES],
                    names[row[layout.AUX] >> 8] if row[layout.AUX] & 0xFF == layout.ERROR else None,
                    row[layout.AUX] & 0xFF,
                    row[layout.SEQUENCE],
                )
                for row in rows
            ],
            [
                (one.group, one.recorded, one.issued)
                for one in recording.instrumentor.coverage()
                if one != before.get(one.group)
            ],
            len(recording.reader.drain().pending),
        )
    assert sum(recording.reader.coverage) == 0
    recording.close()
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(_run_cases, 2, timeout_s=90.0)


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_recorded_exactly_once(name: str, found: list[dict[str, Any]]) -> None:
    for rank, expected in enumerate(CASES[name][1]):
        recorded, coverage, pending = found[rank][name]
        assert [(op, error) for op, _, _, error, *_ in recorded] == [
            (op, error) for op, _, error in expected
        ]
        for (_, _, nbytes, _, status, _), (_, wanted, error) in zip(
            recorded, expected, strict=True
        ):
            assert wanted is None or nbytes == wanted
            assert status == (layout.ERROR if error else layout.OK)
        assert pending == 0
        assert coverage or not any(error is None for *_, error in expected)
        for group, seen, issued in coverage:
            assert seen == issued, group


def test_ranks_agree_on_the_numbers_of_collectives(found: list[dict[str, Any]]) -> None:
    keys: list[dict[tuple[str, int], str]] = []
    for by_case in found:
        own = {}
        for recorded, _, _ in by_case.values():
            for op, group, _, _, _, sequence in recorded:
                if not layout.is_point_to_point(op):
                    assert own.setdefault((group, sequence), op) == op
        keys.append(own)
    assert keys[0] == keys[1]
    assert {group for group, _ in keys[0]} == {"tp", "default_pg"}
