"""/metrics: line for line what prometheus_client would write, in both formats."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import prometheus_client.openmetrics.parser as openmetrics_parser
import prometheus_client.parser as text_parser
import pytest
from metric_rows import Names, collective, record, rows
from reference_exposition import reference

from onecast.telemetry.aggregate import Aggregate, GroupKey
from onecast.telemetry.catalogue import CATALOGUE, Metric, markdown_table
from onecast.telemetry.exposition import (
    OPENMETRICS_TYPE,
    TEXT_TYPE,
    Exposition,
    Histograms,
    Numbers,
    prefers_openmetrics,
)
from onecast.telemetry.histograms import DURATIONS, HistogramTable
from onecast.telemetry.metrics import MetricsPage, RankState, Snapshot, families_of
from onecast.telemetry.requests import RequestRecorder
from onecast.telemetry.ring import DEVICE, ERROR, FRAME, PHASE, STEP_KIND, RingWriter
from onecast.telemetry.ring_reader import RingReader, Rows
from onecast.telemetry.steps import JoinedStep
from onecast.telemetry.values import VALUES

NASTY = 'a "quoted" \\back\\slash, new\nline, 100%, %d %s {x="y"} é'


def busy_aggregate(tmp_path: Path) -> tuple[Aggregate, dict[int, Names]]:
    """Something in every series; a group's and a phase's name are as bad as names can be."""
    names = {rank: Names() for rank in range(2)}
    totals = Aggregate(local_ranks=2)
    generator = np.random.default_rng(0)
    for rank, table in names.items():
        error = ERROR | table.of("RuntimeError") << 8
        records = [
            collective(
                table,
                number,
                number * 10_000 + rank * 777,
                number * 10_000 + 3000 + int(generator.integers(1, 6000)),
                op=("all_reduce", "broadcast", "barrier")[number % 3],
                group=f"{NASTY}\tg" if number % 2 else "tp\th",
                nbytes=4 ** (number % 8),
                step=number // 20,
                aux=error if number % 17 == 0 else 0,
            )
            for number in range(1, 200)
        ]
        records += [
            record(table, STEP_KIND, step * 200_000 + 5000, step * 200_000 + 200_000, step=step)
            for step in range(10)
        ]
        for number in range(5):
            records += [
                record(table, PHASE, number * 10, number * 10 + 2000, name=NASTY),
                record(table, FRAME, 0, 9000, name="published", group="step", nbytes=18_000),
                record(table, DEVICE, 5, 90, name="all_reduce", group="tp\th", size=2),
            ]
        totals.add(rank, rows(records), table)
    ring = RingWriter(tmp_path / "rank-9.ring", capacity=64, rank=9)
    RequestRecorder(ring).finished(0, 0, 10_000_000, 20_000_000, 5, 6, "stop")
    reader = RingReader(ring.path)
    totals.add(9, reader.drain().rows, reader.names)
    return totals, names


def span_ids(rank: int, found: Rows) -> np.ndarray:
    return found[:, 0].astype(np.uint64) + np.uint64(1 << 63) + np.uint64(rank)


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    totals, names = busy_aggregate(tmp_path)
    kept = {
        rank: rows(
            collective(table, 3 + rank, 100, 100 + 1500 * (n + 1), nbytes=2000) for n in range(4)
        )
        for rank, table in names.items()
    }
    for rank, found in kept.items():
        totals.add(rank, found, names[rank])
    totals.exemplify(JoinedStep(7, kept), names, 0xABC << 100 | 5, span_ids)
    in_flight = {GroupKey("all_reduce", NASTY, 0): 12.25}
    ranks = [
        RankState(
            0, True, {index: index * 7 for index in range(len(VALUES))}, {NASTY: 0}, in_flight
        ),
        RankState(1, False, {}, {"tp": 3}),
    ]
    dropped = {("records", "overrun"): 0, ("spans", "queue_full"): 12}
    found = {("hang", "all_reduce", NASTY): 1, ("desync", "barrier", "tp"): 2}
    return Snapshot(NASTY, totals, ranks, dropped, found, sidecar_restarts=1)


@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_line_is_the_one_that_prometheus_client_writes(
    snapshot: Snapshot, openmetrics: bool
) -> None:
    families = families_of(snapshot)
    exposition = Exposition()
    ours = exposition.render(families, openmetrics=openmetrics).decode()
    theirs = reference(families, openmetrics=openmetrics)
    if not openmetrics:  # prometheus_client has exemplars in OpenMetrics only, too
        assert " # " not in ours.replace("# HELP", "").replace("# TYPE", "")
    assert ours.splitlines() == theirs.splitlines()
    assert (
        exposition.render(families, openmetrics=openmetrics).decode() == ours
    )  # from what it kept
    parse = openmetrics_parser if openmetrics else text_parser
    samples = [
        sample for family in parse.text_string_to_metric_families(ours) for sample in family.samples
    ]
    assert any(sample.labels.get("group") == NASTY for sample in samples)
    assert len(samples) > 1000


def test_the_page_has_every_series_of_the_catalogue_with_its_labels(snapshot: Snapshot) -> None:
    page = Exposition().render(families_of(snapshot), openmetrics=False).decode()
    parsed = {family.name: family for family in text_parser.text_string_to_metric_families(page)}
    graphs = {name for name in CATALOGUE if "graph" in name}  # no graph was replayed
    for name, metric in CATALOGUE.items():
        family = parsed[name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        if name not in graphs:
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            assert labels == set(metric.labels), name
            assert family.samples, name
    assert len(parsed) == len(CATALOGUE)


def test_exemplars_lie_in_their_buckets_and_name_trace_and_span(snapshot: Snapshot) -> None:
    page = Exposition().render(families_of(snapshot), openmetrics=True).decode()
    found = []
    for family in openmetrics_parser.text_string_to_metric_families(page):
        below = 0.0
        for sample in family.samples:
            bound = float(sample.labels.get("le", "nan"))
            if sample.exemplar is not None:
                found.append(sample)
                assert below < sample.exemplar.value <= bound
                assert sample.exemplar.labels["trace_id"] == f"{0xABC << 100 | 5:032x}"
                assert sample.exemplar.labels["span_id"] in (
                    f"{(1 << 63) + 100 + rank:016x}" for rank in range(2)
                )
                assert family.name == "onecast_collective_duration_seconds"
                assert sample.value > 0
            below = bound
    # 1.5, 3, 4.5 and 6 µs fall into three buckets; two ranks.
    assert len(found) == 6


def test_counts_beyond_a_million_keep_every_digit() -> None:
    table: HistogramTable[int] = HistogramTable(DURATIONS)
    table.row(0)
    table.counts[0, 100] = 12_345_678_901_234_567
    table.totals[0] = 1 << 60
    histogram = Metric("onecast_test_seconds", "histogram", ("rank",), "x")
    counter = Metric("onecast_test_total", "counter", ("rank",), "x")
    families = [
        Histograms(histogram, [(table.freeze(), ())]),
        Numbers(counter, [(("0",), 12_345_678_901), (("1",), 0.5), (("2",), float("inf"))]),
    ]
    for openmetrics in (False, True):
        text = Exposition().render(families, openmetrics=openmetrics).decode()
        assert 'onecast_test_seconds_count{rank="0"} 12345678901234567.0\n' in text
        assert 'onecast_test_total{rank="0"} 12345678901.0\n' in text
        ours, theirs = (
            [line.rpartition(" ") for line in each.splitlines()]
            for each in (text, reference(families, openmetrics=openmetrics))
        )
        assert [(start, blank) for start, blank, _ in ours] == [
            (start, blank) for start, blank, _ in theirs
        ]
        numbers = [
            (float(a), float(b))
            for (start, _, a), (_, _, b) in zip(ours, theirs, strict=True)
            if not start.startswith("#")
        ]
        assert all(a == b for a, b in numbers) and len(numbers) == 25


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        (None, False),
        ("", False),
        ("*/*", False),
        ("text/html", False),
        ("text/plain; version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        ("Application/OpenMetrics-Text;version=0.0.1", True),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.2, text/plain;q=0.9", False),
        ("application/openmetrics-text;q=nonsense", False),
        (  # what Prometheus 2.42 sends
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;"
            "version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            True,
        ),
        (  # what Prometheus 3 sends
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/"
            "openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;"
            "q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            True,
        ),
    ],
)
def test_the_accept_header_chooses_the_format(accept: str | None, openmetrics: bool) -> None:
    assert prefers_openmetrics(accept) is openmetrics
    assert MetricsPage.content_type(accept) == (OPENMETRICS_TYPE if openmetrics else TEXT_TYPE)


def test_the_node_is_let_go_before_the_text_is_made(snapshot: Snapshot) -> None:
    """What is counted between the copy and the text is not in the text."""
    names = Names()

    @contextmanager
    def held() -> Iterator[Snapshot]:
        yield snapshot
        more = rows(collective(names, n, n, n + 5, group="late\tz", size=1) for n in range(1, 50))
        snapshot.aggregate.add(0, more, names)
        assert snapshot.aggregate.collectives  # counted, new series and all

    before = Exposition().render(families_of(snapshot), openmetrics=True)
    page = MetricsPage(held)
    assert page.render(OPENMETRICS_TYPE) == before
    after = page.render(TEXT_TYPE).decode()
    assert 'onecast_collective_calls_total{group="late",mode="eager",op="all_reduce"' in after


def test_threads_may_ask_at_once(snapshot: Snapshot) -> None:
    lock = threading.Lock()

    @contextmanager
    def held() -> Iterator[Snapshot]:
        with lock:
            yield snapshot

    page = MetricsPage(held)
    pages: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: pages.append(page.render(TEXT_TYPE))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(pages) == 6 and len(set(pages)) == 1


def test_labels_never_hold_what_grows_without_end() -> None:
    labels = {label for metric in CATALOGUE.values() for label in metric.labels}
    assert not labels & {"step", "sequence", "seq", "request", "request_id", "trace_id", "pid"}
    for name, metric in CATALOGUE.items():
        assert re.fullmatch(r"onecast_[a-z_]+", name)
        assert (metric.kind == "counter") == name.endswith("_total"), name
        if metric.kind == "histogram":
            assert name.endswith(("_seconds", "_bytes")), name


def test_the_table_for_people_has_a_row_for_every_series() -> None:
    table = markdown_table().splitlines()
    assert len(table) == 2 + len(CATALOGUE)
    assert all(line.count("|") == 5 for line in table)
