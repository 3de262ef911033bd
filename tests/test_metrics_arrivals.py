"""Who came last, and how long the others waited: joined exactly, in bounded memory."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from metric_rows import Names, collective, record, rows

from onecast.comm.testing import run_ranks
from onecast.telemetry import CollectiveInstrumentor, RingReader, RingWriter, arrivals
from onecast.telemetry.aggregate import Aggregate, GroupKey
from onecast.telemetry.arrivals import arrivals_of
from onecast.telemetry.ring import ERROR, NBYTES, PHASE, UNWAITED
from onecast.telemetry.ring_reader import Rows
from onecast.telemetry.run_directory import ring_path

SECOND = 10**9
Call = tuple[str, str, int, tuple[int, ...], dict[int, tuple[int, int]]]  # rank: begin, end


def random_calls(seed: int, ranks: int) -> list[Call]:
    """(op, group, sequence, ranks of the group, times by rank) of a program of several groups."""
    generator = random.Random(seed)
    members = {"tp\ta": tuple(range(ranks))}
    for number in range(3):
        chosen = tuple(sorted(generator.sample(range(ranks), generator.randint(1, ranks - 1))))
        members[f"sub\tb{number}"] = chosen
    calls: list[Call] = []
    sequences: Counter[str] = Counter()
    now = 1000
    for _ in range(120):
        group = generator.choice(list(members))
        sequences[group] += 1
        now += generator.randint(1, 10_000)
        times = {}
        for rank in members[group]:
            begin = now + generator.choice([0, 0, generator.randint(0, 5000)])
            times[rank] = (begin, begin + generator.randint(1, 9000))
        op = generator.choice(["all_reduce", "broadcast", "barrier"])
        calls.append((op, group, sequences[group], members[group], times))
    return calls


def as_rows(calls: list[Call], ranks: int, names: dict[int, Names]) -> dict[int, Rows]:
    found: dict[int, list[list[int]]] = {rank: [] for rank in range(ranks)}
    for op, group, sequence, members, times in calls:
        for rank, (begin, end) in times.items():
            found[rank].append(
                collective(names[rank], sequence, begin, end, op=op, group=group, size=len(members))
            )
    return {rank: rows(records) for rank, records in found.items()}


@pytest.mark.parametrize("seed", range(5))
def test_waits_are_those_that_a_plain_loop_finds(seed: int) -> None:
    ranks = 5
    calls = random_calls(seed, ranks)
    generator = random.Random(seed)
    for call in generator.sample(calls, 20):  # some ranks' records are missing
        del call[4][generator.choice(list(call[4]))]
    names = {rank: Names() for rank in range(ranks)}
    for rank, table in names.items():  # no two ranks number their names alike
        table.extend(f"filler {number}" for number in range(rank))
    found = arrivals_of(as_rows(calls, ranks, names), names)
    seen: Counter[int] = Counter()
    for _, _, _, members, times in calls:
        last = max((begin for begin, _ in times.values()), default=0)
        lasts = 0
        for rank, (begin, end) in times.items():
            place = seen[rank]
            seen[rank] += 1
            wait, is_last, transfer = (column[place] for column in found[rank])
            if len(times) < len(members):
                assert (wait, is_last, transfer) == (-1, False, -1)
                continue
            assert (wait, transfer) == (last - begin, max(0, end - last))
            assert not is_last or begin == last
            lasts += is_last
        assert lasts == (len(times) == len(members))


def test_what_is_no_collective_of_all_is_not_joined() -> None:
    names = {0: Names(), 1: Names()}
    of_rank = {
        rank: rows(
            [
                record(table, PHASE, 5, 9, name="model.forward"),
                collective(table, 1, 10 + rank, 30, op="send"),
                collective(table, 1, 20 + rank, 40, op="all_reduce" if rank else "barrier"),
                collective(table, 2, 50 + rank, 0 if rank else 70),  # one is still in it
            ]
        )
        for rank, table in names.items()
    }
    found = arrivals_of(of_rank, names)
    assert found[0].wait_ns.tolist() == [-1, -1, -1, 1]
    assert found[1].wait_ns.tolist() == [-1, -1, -1, 0]
    assert found[0].transfer_ns.tolist() == [-1, -1, -1, 19]
    assert found[1].transfer_ns.tolist() == [-1, -1, -1, -1]
    assert found[1].is_last.tolist() == [False, False, False, True]
    assert arrivals_of({}, {}) == {}
    assert len(arrivals_of({0: rows([])}, {0: Names()})[0].wait_ns) == 0


@pytest.mark.parametrize("seed", range(3))
def test_totals_are_exact_however_late_and_in_whatever_pieces_records_come(seed: int) -> None:
    ranks = 4
    calls = random_calls(seed, ranks)
    names = {rank: Names() for rank in range(ranks)}
    of_rank = as_rows(calls, ranks, names)
    generator = random.Random(seed)
    aggregate = Aggregate(local_ranks=ranks)
    left = {rank: list(found) for rank, found in of_rank.items()}
    while any(left.values()):
        rank = generator.choice([rank for rank, found in left.items() if found])
        count = generator.randint(1, 40)
        aggregate.add(rank, rows(left[rank][:count]), names[rank])
        del left[rank][:count]
        if generator.random() < 0.3:
            assert aggregate.unjoined is not None  # a reader, who makes it count what it has
    assert not any(aggregate.unjoined.values())
    waits: Counter[GroupKey] = Counter()
    transfers: Counter[GroupKey] = Counter()
    for op, group, _, _, times in calls:
        last = max(begin for begin, _ in times.values())
        for rank, (begin, end) in times.items():
            key = GroupKey(op, group.partition("\t")[0], rank)
            waits[key] += last - begin
            transfers[key] += max(0, end - last)
    for expected, tables in ((waits, aggregate.arrival_waits), (transfers, aggregate.transfers)):
        sums: Counter[GroupKey] = Counter()
        for series, histogram in tables.items():
            sums[GroupKey(series.op, series.group, series.rank)] += histogram.total
        assert +sums == +expected
    assert sum(aggregate.last_arrivals.values()) == len(calls)
    assert sum(histogram.count for histogram in aggregate.arrival_waits.values()) == sum(
        len(times) for *_, times in calls
    )


def one_by_one(aggregate: Aggregate, *parts: tuple[int, list[list[int]], Names]) -> None:
    for rank, records, names in parts:
        aggregate.add(rank, rows(records), names)
        assert aggregate.unjoined is not None


def test_a_group_with_ranks_elsewhere_is_counted_and_forgotten() -> None:
    names = {0: Names(), 1: Names()}
    aggregate = Aggregate(local_ranks=2)
    for rank, table in names.items():  # 4 ranks, 2 of them here
        one_by_one(
            aggregate,
            (
                rank,
                [collective(table, n, n, n + 1, group="dp\tall", size=4) for n in (1, 2)],
                table,
            ),
        )
    assert aggregate.unjoined == {"other_nodes": 4}
    # 2 ranks, 1 of them here: that shows only when the other one never calls it.
    for second in range(1, 15):
        at = second * SECOND
        one_by_one(
            aggregate,
            (0, [collective(names[0], second, at, at + 1, group="dp\tpair")], names[0]),
            (1, [collective(names[1], second, at, at + 1, group="dp\tother pair")], names[1]),
        )
    assert aggregate.unjoined["other_nodes"] > 4
    before = aggregate.unjoined["other_nodes"]
    at = 20 * SECOND
    one_by_one(aggregate, (0, [collective(names[0], 99, at, at, group="dp\tpair")], names[0]))
    assert aggregate.unjoined == {"other_nodes": before + 1}
    assert aggregate.totals.joiner.pending < 14 * 2
    # The other one was only late: as soon as it calls the group, they are joined.
    for rank, table in names.items():
        one = collective(table, 100, at + 5 + rank, at + 9, group="dp\tpair")
        aggregate.add(rank, rows([one]), table)
    assert {(key.rank, h.count, h.total) for key, h in aggregate.arrival_waits.items()} == {
        (0, 1, 1),
        (1, 1, 0),
    }


def test_a_record_whose_partner_was_overrun_is_lost_after_a_while() -> None:
    names = {0: Names(), 1: Names()}
    aggregate = Aggregate(local_ranks=2)
    of_rank = {
        rank: [collective(table, n, n * SECOND, n * SECOND + 5) for n in range(1, 100)]
        for rank, table in names.items()
    }
    del of_rank[1][3:10]  # seven records were overwritten before anybody read them
    for second in range(99):
        for rank, table in names.items():
            one_by_one(aggregate, (rank, of_rank[rank][second : second + 1], table))
    assert aggregate.unjoined == {"lost": 7}
    assert {series.rank: h.count for series, h in aggregate.arrival_waits.items()} == {0: 92, 1: 92}
    assert aggregate.totals.joiner.pending == 0


def test_different_operations_under_one_number_are_a_desync_and_no_wait() -> None:
    names = {0: Names(), 1: Names()}
    aggregate = Aggregate(local_ranks=2)
    for rank, table in names.items():
        ops = ["all_reduce", "broadcast" if rank else "all_reduce", "all_reduce"]
        one_by_one(
            aggregate,
            (rank, [collective(table, n, n, n + 9, op=op) for n, op in enumerate(ops, 1)], table),
        )
    assert aggregate.unjoined == {"desync": 2}
    counts = {(k.op, k.rank): h.count for k, h in aggregate.arrival_waits.items()}
    assert counts == {("all_reduce", 0): 2, ("all_reduce", 1): 2}


def test_who_fails_has_not_come_and_the_end_of_what_nobody_waits_for_says_nothing() -> None:
    names = {0: Names(), 1: Names()}
    aggregate = Aggregate(local_ranks=2)
    for rank, table in names.items():
        error = ERROR | table.of("RuntimeError") << 8
        one_by_one(
            aggregate,
            (
                rank,
                [
                    collective(table, 1, 10 + 5 * rank, 90, aux=error),
                    collective(table, 2, 110 + 5 * rank, 190, aux=UNWAITED),
                    collective(table, 3, 210 + 5 * rank, 290, aux=60 << 8),
                ],
                table,
            ),
        )
    waits = aggregate.arrival_waits
    assert {key.rank: (h.count, h.total) for key, h in waits.items()} == {0: (2, 10), 1: (2, 0)}
    assert sum(aggregate.last_arrivals.values()) == 2
    assert {key.rank: h.total for key, h in aggregate.transfers.items()} == {0: 75, 1: 75}
    assert {key.rank: h.count for key, h in aggregate.transfers.items()} == {0: 1, 1: 1}
    assert {key.rank: h.count for key, h in aggregate.collectives.items()} == {0: 2, 1: 2}
    assert aggregate.errors[GroupKey("all_reduce", "tp", 1), "RuntimeError"] == 1


def test_the_memory_for_ranks_that_never_come_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_MAX_PENDING", 100)
    names = Names()
    aggregate = Aggregate(local_ranks=2)
    aggregate.add(0, rows(collective(names, n, n, n + 1) for n in range(1, 1001)), names)
    assert aggregate.unjoined == {"lost": 900}
    assert aggregate.totals.joiner.pending == 100
    # The newest are those that are still waited for.
    other = Names()
    aggregate.add(1, rows(collective(other, n, n, n + 1) for n in range(901, 1001)), other)
    assert aggregate.totals.joiner.pending == 0
    assert sum(aggregate.last_arrivals.values()) == 100


def test_a_sidecar_that_starts_in_mid_stream_joins_what_both_ranks_still_have() -> None:
    """The one before had counted rank 0 up to 500 and rank 1 up to 480."""
    names = {0: Names(), 1: Names()}
    aggregate = Aggregate(local_ranks=2)
    for rank, start in ((0, 501), (1, 481)):
        table = names[rank]
        records = [collective(table, n, n, n + 1) for n in range(start, 601)]
        aggregate.add(rank, rows(records), table)
    assert {series.rank: h.count for series, h in aggregate.arrival_waits.items()} == {
        0: 100,
        1: 100,
    }
    at = 100 * SECOND
    for rank, table in names.items():
        aggregate.add(rank, rows([collective(table, 601, at, at + 1)]), table)
    assert aggregate.unjoined == {"lost": 20}


def test_a_group_whose_name_comes_back_with_another_size_is_joined_by_its_new_size() -> None:
    names = {rank: Names() for rank in range(3)}
    aggregate = Aggregate(local_ranks=3)
    for rank in (0, 1):
        aggregate.add(rank, rows([collective(names[rank], 1, 10, 20)]), names[rank])
    assert sum(aggregate.last_arrivals.values()) == 1
    for rank in range(3):
        aggregate.add(rank, rows([collective(names[rank], 1, 30, 40, size=3)]), names[rank])
    assert sum(aggregate.last_arrivals.values()) == 2
    assert aggregate.unjoined == {}


DELAY_NS = 4_000_000
LATE_CALLS = 12


def _await_entry(other: RingReader, nbytes: int) -> None:
    """Until that rank is in a collective of this size: however slow the machine, it was first."""
    deadline = time.monotonic() + 30
    while not (other.drain().pending[:, NBYTES] == nbytes).any():
        assert time.monotonic() < deadline, "the other rank never came"
        time.sleep(0.0005)


def _delayed_rank(rank: int, world_size: int, run_dir: str, late_rank: int) -> None:
    """Rank `late_rank` comes 4 ms late to every all_reduce of 64 KiB, and to nothing else."""
    torch.set_num_threads(1)
    ring = RingWriter(ring_path(run_dir, rank), capacity=1024, rank=rank, world_size=world_size)
    instrumentor = CollectiveInstrumentor()
    instrumentor.instrument(ring)
    small, large = torch.ones(64), torch.ones(16384)
    dist.barrier()  # all rings are there
    others = [
        RingReader(ring_path(run_dir, other))
        for other in range(world_size)
        if rank == late_rank and other != rank
    ]
    for _ in range(LATE_CALLS):
        dist.all_reduce(small)
        dist.barrier()
        for other in others:
            _await_entry(other, large.nbytes)
        if rank == late_rank:
            time.sleep(DELAY_NS * 1e-9)
        dist.all_reduce(large)
    instrumentor.uninstrument()
    ring.close()


@pytest.mark.parametrize(("world_size", "late_rank"), [(2, 1), (3, 0)])
def test_a_delay_of_4_ms_is_laid_at_the_door_of_the_rank_and_the_collective(
    tmp_path: Path, world_size: int, late_rank: int
) -> None:
    run_ranks(_delayed_rank, world_size, world_size, str(tmp_path), late_rank)
    aggregate = Aggregate(local_ranks=world_size)
    waits: dict[int, list[int]] = {}
    readers = {rank: RingReader(ring_path(str(tmp_path), rank)) for rank in range(world_size)}
    drained = {rank: reader.drain().rows for rank, reader in readers.items()}
    names = {rank: reader.names for rank, reader in readers.items()}
    for rank, found in drained.items():
        aggregate.add(rank, found, names[rank])
    for rank, found in arrivals_of(drained, names).items():
        large = drained[rank][:, NBYTES] == 65536
        waits[rank] = found.wait_ns[large].tolist()
        # (Which rank was last to the others is chance: they are not asserted.)
        assert int(found.is_last[large].sum()) == (LATE_CALLS if rank == late_rank else 0)
    series = {key.rank: h for key, h in aggregate.arrival_waits.items() if key.size == "64KiB"}
    for rank in range(world_size):
        if rank == late_rank:
            assert waits[rank] == [0] * LATE_CALLS
        else:
            # What comes on top of the sleep depends on the machine.
            assert min(waits[rank]) >= DELAY_NS
            assert series[rank].count == LATE_CALLS
            assert series[rank].total == sum(waits[rank])
    assert sum(aggregate.last_arrivals.values()) == 3 * LATE_CALLS + 1
    late = GroupKey("all_reduce", "default_pg", late_rank)
    assert aggregate.last_arrivals[late] >= LATE_CALLS
    assert not any(aggregate.unjoined.values())
