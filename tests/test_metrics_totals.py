"""What records add up to: exact, whatever the size of the batches they are counted in."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metric_rows import Names, collective, record, rows

from onecast.telemetry import RingProbe, RingReader, RingWriter, batches
from onecast.telemetry.aggregate import Aggregate, CollectiveKey, GroupKey
from onecast.telemetry.cuda_graphs import graphs_path
from onecast.telemetry.exposed import union_lengths
from onecast.telemetry.histograms import (
    DURATIONS,
    LONG_DURATIONS,
    REQUEST_DURATIONS,
    SIZES,
    Histogram,
    HistogramTable,
    Scale,
)
from onecast.telemetry.labels import SIZE_CLASSES, size_classes
from onecast.telemetry.requests import RequestRecorder
from onecast.telemetry.ring import (
    DEVICE,
    DISCARDED,
    ERROR,
    GRAPH,
    PHASE,
    STEP_KIND,
    UNWAITED,
)


@pytest.mark.parametrize("scale", [DURATIONS, LONG_DURATIONS, REQUEST_DURATIONS, SIZES])
def test_a_value_finds_its_bucket_as_by_binary_search(scale: Scale) -> None:
    generator = np.random.default_rng(0)
    spread = np.exp(generator.uniform(0, 40, 100_000)).astype(np.int64)
    near = np.concatenate([scale.edges + offset for offset in (-1, 0, 1)])
    values = np.concatenate([np.arange(70_000), spread, near, np.array([-7, 0, 1 << 60])])
    assert np.array_equal(scale.index(values), np.searchsorted(scale.edges, values, side="left"))
    shown = np.array([round(bound / scale.unit) for bound in scale.bounds])
    assert np.array_equal(scale.shown_bucket(values), np.searchsorted(shown, values, side="left"))


def test_the_buckets_of_collectives_are_1_microsecond_doubled_18_times() -> None:
    assert DURATIONS.bounds == [pytest.approx(1e-6 * 2**n, rel=1e-9) for n in range(19)]
    assert LONG_DURATIONS.bounds[:19] == DURATIONS.bounds
    assert REQUEST_DURATIONS.bounds == [pytest.approx(1e-3 * 2**n, rel=1e-9) for n in range(19)]


def test_a_table_grows_and_keeps_its_rows() -> None:
    table: HistogramTable[int] = HistogramTable(SIZES)
    alone = [Histogram(SIZES) for _ in range(40)]
    for number in range(40):
        table.row(number)
        values = np.arange(1, number + 2) * 100
        table.add(np.full(number + 1, table.row(number)), values)
        alone[number].add(values)
    frozen = table.freeze()
    table.add(np.array([3]), np.array([64]))
    assert frozen.keys == list(range(40)) and len(table) == 40
    for number in range(40):
        assert frozen.cumulative[number].tolist() == [count for _, count in alone[number].buckets()]
        assert frozen.sums[number] == alone[number].sum
    assert table[3].count == 5


def random_records(seed: int, names: Names) -> list[list[int]]:
    generator = random.Random(seed)
    found = []
    step_begin = 0
    for number in range(1, 400):
        begin = number * 1_000_000
        kind = generator.randrange(8)
        end = begin + generator.randint(1, 3_000_000)
        common: dict[str, Any] = {"step": number // 10, "nbytes": 4 ** generator.randint(0, 14)}
        op = generator.choice(["all_reduce", "broadcast", "all_gather", "send"])
        aux = generator.choice([0, 0, 0, 1, UNWAITED])
        if aux == 1:
            aux = ERROR | names.of(generator.choice(["RuntimeError", "DistBackendError"])) << 8
        if kind < 5:
            group = generator.choice(["tp\ta", "dp\tb", "dp\tc"])
            dtype = generator.choice(["float32", "bfloat16"])
            found.append(
                collective(
                    names,
                    number,
                    begin,
                    end,
                    op=op,
                    group=group,
                    size=1,
                    dtype=dtype,
                    aux=aux,
                    **common,
                )
            )
        elif kind == 5:
            name = generator.choice(["model.forward", "sample"])
            found.append(record(names, PHASE, begin, end, name=name, step=number // 10))
        elif kind == 6:
            # A step holds what began since the one before; some of that ends only after it.
            found.append(record(names, STEP_KIND, step_begin, begin + 500_000, step=number))
            step_begin = begin + 500_001
        else:
            found.append(
                record(names, DEVICE, begin, end, name=op, group="tp\ta", size=1, **common)
            )
    return found


def summary(totals: Aggregate) -> dict[str, Any]:
    def table(series: Any) -> dict[Any, Any]:
        return {key: (h.count, h.total, h.counts.tolist()) for key, h in series.items()}

    return {
        "collectives": table(totals.collectives),
        "waits": table(totals.arrival_waits),
        "transfers": table(totals.transfers),
        "device": table(totals.device_durations),
        "phases": table(totals.phases),
        "steps": table(totals.steps),
        "exposed": table(totals.exposed),
        "payload": dict(totals.payload_bytes),
        "bus": dict(totals.bus_bytes),
        "errors": dict(totals.errors),
        "sequence": dict(totals.sequence),
        "last": dict(totals.last_arrivals),
    }


@pytest.mark.parametrize("seed", range(4))
def test_batches_of_any_size_count_the_same_as_a_plain_loop(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names()
    records = random_records(seed, names)
    whole = Aggregate(local_ranks=1)
    whole.add(0, rows(records), names)
    pieces = Aggregate(local_ranks=1)
    monkeypatch.setattr(batches, "_BATCH", 50)
    generator = random.Random(seed)
    start = 0
    while start < len(records):
        count = generator.randint(1, 30)
        pieces.add(0, rows(records[start : start + count]), names)
        start += count
    assert summary(pieces) == summary(whole)

    counts: Counter[CollectiveKey] = Counter()
    times: Counter[CollectiveKey] = Counter()
    payload: Counter[CollectiveKey] = Counter()
    errors: Counter[tuple[GroupKey, str]] = Counter()
    sequence: dict[GroupKey, int] = {}
    for begin, end, _, meta, number, nbytes, aux, _ in records:
        if meta & 0xF != 1:
            continue
        op, group = names[meta >> 4 & 0xFFF], names[meta >> 16 & 0xFFF].partition("\t")[0]
        sequence[GroupKey(op, group, 0)] = number
        if aux & 0xFF == ERROR:
            errors[GroupKey(op, group, 0), names[aux >> 8]] += 1
            continue
        size = next(
            (name for limit, name in enumerate(SIZE_CLASSES[:-1], 5) if nbytes <= 4**limit), "inf"
        )
        key = CollectiveKey(op, group, size, 0)
        counts[key] += 1
        times[key] += end - begin
        payload[key] += nbytes
    assert {key: h.count for key, h in whole.collectives.items()} == counts
    assert {key: h.total for key, h in whole.collectives.items()} == times
    assert whole.payload_bytes == payload
    assert whole.errors == errors
    assert whole.sequence == sequence
    assert whole.exposed[0].count == whole.steps[0].count and whole.exposed[0].total > 0
    assert whole.phases.keys() == {("model.forward", 0), ("sample", 0)}


def test_there_are_eight_size_classes_in_powers_of_four() -> None:
    assert len(SIZE_CLASSES) == 8
    edges = np.array([0, 1024, 1025, 4096, 4097, 4 << 20, (4 << 20) + 1, 1 << 50])
    assert [SIZE_CLASSES[index] for index in size_classes(edges)] == [
        "1KiB", "1KiB", "4KiB", "4KiB", "16KiB", "4MiB", "inf", "inf",
    ]  # fmt: skip


def test_bus_bytes_over_transfer_time_is_the_bandwidth_that_nccl_tests_would_print() -> None:
    names = {rank: Names() for rank in range(4)}
    totals = Aggregate(local_ranks=4)
    for rank, table in names.items():
        calls = [("all_reduce", 1), ("all_gather", 2), ("broadcast", 3), ("barrier", 4)]
        totals.add(
            rank,
            rows(
                collective(table, n, n * 10**9 + rank, n * 10**9 + 2003, op=op, size=4, nbytes=8000)
                for op, n in calls
            ),
            table,
        )
    bandwidth = {
        key.op: totals.bus_bytes[key] / histogram.sum
        for key, histogram in totals.transfers.items()
        if key.rank == 2
    }
    gigabytes = {op: round(value / 1e9, 6) for op, value in bandwidth.items()}
    assert gigabytes == {"all_reduce": 6.0, "all_gather": 3.0, "broadcast": 4.0, "barrier": 0.0}


@pytest.mark.parametrize("seed", range(5))
def test_overlapping_operations_are_exposed_once(seed: int) -> None:
    generator = random.Random(seed)
    owners, starts, ends, expected = [], [], [], []
    for owner in range(20):
        covered: set[int] = set()
        for _ in range(generator.randint(0, 12)):
            start = owner * 50 + generator.randint(0, 99)  # owners overlap each other
            end = start + generator.randint(0, 30)
            covered |= set(range(start, end))
            owners.append(owner)
            starts.append(start)
            ends.append(end)
        expected.append(len(covered))
    order = list(range(len(owners)))
    generator.shuffle(order)
    columns = (np.array(column)[order] for column in (owners, starts, ends))
    assert union_lengths(*columns, 20).tolist() == expected


def test_exposed_communication_counts_what_the_step_waited_for_and_nothing_else() -> None:
    names = Names()
    step: Any = {"step": 4}
    records = [
        collective(names, 1, 100, 200, **step),  # waited for at once
        collective(names, 2, 150, 260, **step),  # by another thread: 60 more
        collective(names, 3, 300, 500, aux=150 << 8, **step),  # compute in between: 50
        collective(names, 4, 600, 700, aux=UNWAITED, **step),  # nobody waited
        collective(names, 5, 800, 900, aux=ERROR, **step),  # waited, and then it raised: 100
        collective(names, 6, 950, 1200, **step),  # longer than the step: 50
        collective(names, 7, 1300, 1400),  # between the steps
        record(names, STEP_KIND, 90, 1000, **step),
        record(names, STEP_KIND, 2000, 2500, step=5),  # nothing in it
        record(names, STEP_KIND, 3000, 3500, step=6, aux=DISCARDED),
        collective(names, 8, 4000, 4070, step=7),
    ]
    totals = Aggregate()
    totals.add(0, rows(records), names)
    assert (totals.exposed[0].count, totals.exposed[0].total) == (2, 160 + 50 + 100 + 50)
    totals.add(0, rows([record(names, STEP_KIND, 3990, 4090, step=7)]), names)
    assert (totals.exposed[0].count, totals.exposed[0].total) == (3, 430)


def test_device_times_stand_beside_those_of_the_host() -> None:
    names = Names()
    totals = Aggregate(local_ranks=1)
    key = CollectiveKey("all_reduce", "tp", "4KiB", 0)
    common: dict[str, Any] = {"name": "all_reduce", "group": "tp\tx", "size": 1, "nbytes": 2048}
    totals.add(0, rows([record(names, 1, 10, 50, sequence=1, **common)]), names)
    totals.add(0, rows([record(names, DEVICE, 10, 17, sequence=1, **common)]), names)
    assert totals.collectives[key].total == 40
    assert totals.device_durations[key].total == 7
    assert totals.payload_bytes == {key: 2048}


def test_replays_of_a_graph_count_the_collectives_of_its_manifest(tmp_path: Path) -> None:
    names = Names()
    totals = Aggregate(local_ranks=2, run_dir=str(tmp_path))

    def replay(manifest: int, times: int) -> None:
        records = [record(names, GRAPH, 5, 25, sequence=manifest) for _ in range(times)]
        totals.add(1, rows(records), names)

    def capture(ops: list[str]) -> None:
        one = {"group": "tp\t3", "group_size": 4, "dtype": "bfloat16", "bytes": 16384}
        manifest = {"name": "graph", "collectives": [{"op": op, **one} for op in ops]}
        with graphs_path(str(tmp_path), 1).open("a") as file:
            file.write(json.dumps(manifest) + "\n")

    capture(["all_reduce", "all_reduce", "all_gather"])
    replay(0, 10)
    replay(1, 3)  # its manifest is not there yet
    key = CollectiveKey("all_reduce", "tp", "16KiB", 1)
    assert totals.graphs.collectives[key] == 20 and totals.graphs.unknown == 3
    capture(["all_reduce"])
    assert totals.graphs.collectives == {key: 23, key._replace(op="all_gather"): 10}
    assert totals.graphs.unknown == 0
    assert totals.graphs.payload_bytes[key] == 23 * 16384
    assert totals.graphs.bus_bytes[key] == 23 * 16384 * 1.5
    assert (totals.graphs.launches[1].count, totals.graphs.launches[1].total) == (13, 260)
    assert not totals.collectives


def test_a_manifest_that_cannot_be_read_is_told_of_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = Names()
    graphs_path(str(tmp_path), 0).write_text('{"name": 1}\n')
    totals = Aggregate(run_dir=str(tmp_path))
    totals.add(0, rows([record(names, GRAPH, 5, 25, sequence=0)]), names)
    totals.add(0, rows([collective(names, 1, 5, 9, size=1)]), names)
    assert sum(h.count for h in totals.collectives.values()) == 1
    assert totals.graphs.unknown == 1
    assert "cannot read the CUDA graphs of rank 0" in caplog.text


def test_requests_are_counted_by_why_they_ended(tmp_path: Path) -> None:
    ring = RingWriter(tmp_path / "rank-0.ring", capacity=64, rank=0)
    recorder = RequestRecorder(ring)
    millisecond = 1_000_000
    recorder.finished(0, 0, 20 * millisecond, 50 * millisecond, 7, 20, "length")
    recorder.finished(1, 0, 30 * millisecond, 90 * millisecond, 7, 9, "stop")
    recorder.finished(2, 0, 0, 0, 7, 0, "ValueError", True)
    RingProbe(ring).published(1, 18_000, 33, 1, 1000, 3000, 8000)
    reader = RingReader(ring.path)
    totals = Aggregate()
    totals.add(0, reader.drain().rows, reader.names)
    assert totals.requests.finished == {("length", 0): 1, ("stop", 0): 1, ("ValueError", 0): 1}
    assert totals.requests.durations[0].count == totals.requests.queued[0].count == 3
    first = totals.requests.first_token[0]
    assert (first.count, first.sum) == (2, pytest.approx(0.140))
    assert totals.of_steps.frame_metadata_bytes["step", "published", 0].total == 33


def test_a_torn_record_that_names_nobody_is_counted_as_unknown() -> None:
    names, table = Names(), Names()
    torn = collective(table, 1, 5, 9, size=1)
    totals = Aggregate()
    totals.add(0, rows([torn]), names)  # whose table has no such entries
    assert list(totals.collectives) == [CollectiveKey("(unknown)", "(unknown)", "1KiB", 0)]
