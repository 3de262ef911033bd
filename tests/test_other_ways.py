"""What does the work of a process group in another way is recorded as the group's own is."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from recorded_ranks import instrumented, recorded_ranks, say, wait_for_test
from test_intercept import Recording

from onecast.comm import CollectiveProbe, Mismatch, open_all_reduce
from onecast.comm.testing import run_ranks
from onecast.telemetry.hang import HangWatch
from onecast.telemetry.ring import ERROR, OK


def _both_ways(rank: int) -> tuple[dict[Any, Any], list[int], int]:
    group = dist.new_group(group_desc="tp")
    assert group is not None
    recording = Recording(rank)
    probe: CollectiveProbe | None = recording.instrumentor.other_ways()
    assert probe is not None
    reducer = open_all_reduce(group, transport="shared-memory", probe=probe, max_bytes=1000)
    recording.rows()  # of the opening
    unrecorded = []
    dist.all_reduce(torch.zeros(3), group=group)
    reducer.all_reduce(torch.zeros(4))
    unrecorded.append(recording.unrecorded())
    reducer.all_reduce(torch.zeros(5, dtype=torch.float16))
    reducer.all_reduce(torch.zeros(1000))  # too large: the group carries it
    dist.barrier(group)
    with pytest.raises(Mismatch):
        reducer.all_reduce(torch.zeros(1 + rank))
    reducer.all_reduce(torch.zeros(6))
    dist.all_reduce(torch.zeros(7), group=group)
    reducer.gather(torch.zeros(3, 2))
    dist.gather(torch.zeros(6), [torch.zeros(6)] * 2 if rank == 0 else None, group=group)
    unrecorded.append(recording.unrecorded())
    seen = recording.seen()
    for covered in recording.instrumentor.coverage():
        assert covered.recorded == covered.issued, covered
    recording.close()
    assert recording.instrumentor.other_ways() is None
    reducer.all_reduce(torch.zeros(8))
    assert not recording.rows(), "recording has ended"
    reducer.close()
    return seen, unrecorded, sum(len(found) for found in seen.values())


def test_it_is_numbered_among_the_groups_own_and_leaves_its_coverage_exact() -> None:
    for rank, (seen, unrecorded, total) in enumerate(run_ranks(_both_ways, 2)):
        reduced = seen["all_reduce", "tp"]
        first = reduced[0][0]
        assert reduced == [
            (first, 12, "float32", OK),
            (first + 1, 16, "float32", OK),
            (first + 2, 10, "float16", OK),
            (first + 3, 4000, "float32", OK),
            (first + 5, 4 * (1 + rank), "float32", ERROR),
            (first + 6, 24, "float32", OK),
            (first + 7, 28, "float32", OK),
        ]
        assert [row[0] for row in seen["barrier", "tp"]] == [first + 4]
        # What is gathered counts as the whole, as torch.distributed's own does.
        assert seen["gather", "tp"] == [
            (first + 8, 48, "float32", OK),
            (first + 9, 48, "float32", OK),
        ]
        assert total == 10
        assert unrecorded == [0, 0]


def _does_not_come(rank: int, run_dir: str) -> None:
    _, instrumentor = instrumented(rank, run_dir)
    reducer = open_all_reduce(transport="shared-memory", probe=instrumentor.other_ways())
    tensor = torch.ones(4096)
    for _ in range(3):
        reducer.all_reduce(tensor)
    if rank == 1:
        say(run_dir, "away")
        wait_for_test(run_dir)
    wait_for_test(run_dir, "away")
    reducer.all_reduce(tensor)
    wait_for_test(run_dir, "leave")
    reducer.close()


def test_a_rank_that_does_not_come_is_named_while_the_other_waits() -> None:
    with recorded_ranks(_does_not_come) as ranks:
        watch = HangWatch(0.3, 2)

        def look() -> Any:
            drained = {rank: reader.drain() for rank, reader in ranks.readers.items()}
            return watch.poll(ranks.readers, drained, time.perf_counter_ns())

        (hang,) = ranks.until(look, "a hang")
    assert (hang.kind, hang.op) == ("hang", "all_reduce")
    assert hang.text.startswith(f"rank 0 waits in all_reduce #{hang.sequence} (default_pg, 16 KiB)")
    assert f"rank 1 never entered it: last finished #{hang.sequence - 1}" in hang.text
