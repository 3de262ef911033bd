"""`onecast bench telemetry`: it runs, and reports each figure with its target."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from onecast.comm.testing import run_ranks
from onecast.runtime.bench import telemetry
from onecast.runtime.bench.telemetry_coverage import Case, coverage
from onecast.runtime.bench.telemetry_feed import Feeder, Sidecar, cpu_s
from onecast.runtime.bench.telemetry_node import NodePlan
from onecast.runtime.bench.telemetry_record import RecordPlan
from onecast.runtime.bench.telemetry_report import FIGURES, make_ratios
from onecast.runtime.bench.telemetry_steps import StepPlan, Steps
from onecast.runtime.bench.telemetry_toggle import Toggle
from onecast.telemetry import CollectiveInstrumentor, TelemetrySettings
from onecast.telemetry.ring import RingWriter

TINY = telemetry.Plan(
    launches=1,
    record=RecordPlan(pairs=2, calls=5),
    steps=StepPlan(blocks=2, steps=2, gloo_blocks=1, gloo_steps=1, pause_s=0.01),
    naive=StepPlan(blocks=1, steps=2, gloo_blocks=0, gloo_steps=0, pause_s=0.01),
    node=NodePlan(feed_s=0.2, scrapes=1, ranks=2, scraped_ranks=3),
    coverage_rounds=1,
)
TARGETS = {
    "record_ns": "<= 1000",
    "step_p50_overhead": "<= 1.01",
    "step_p99_overhead": "<= 1.05",
    "naive_step_overhead": "reported",
    "spans_per_core_second": ">= 100000",
    "sidecar_core_share_metrics_only": "< 0.05",
    "coverage": "= 1",
    "scrape_ms": "<= 100",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The report as the file has it, and the lines of the table."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry, "QUICK", TINY)
        lines = []
        patch.setattr("rich.console.Console._write_buffer", lambda console: None)
        printed = telemetry.print_report

        def print_report(report):
            lines.append(report)
            printed(report)

        patch.setattr(telemetry, "print_report", print_report)
        assert telemetry.main(["--quick", "--json", str(path)]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse), lines[0]


def test_every_figure_is_reported_with_its_target(run):
    ratios = {ratio["name"]: ratio for ratio in run[0]["ratios"]}
    assert [*ratios] == [*FIGURES]
    assert {name: ratios[name]["target"] for name in TARGETS} == TARGETS
    for ratio in ratios.values():
        assert math.isfinite(ratio["value"])
        low, high = ratio["spread"]
        assert low <= ratio["value"] <= high
        assert (ratio["holds"] is None) == (ratio["target"] == "reported")
    assert run[0] == json.loads(json.dumps(run[1]))
    assert run[0]["bench"] == "telemetry" and "torch" in run[0]["machine"]


def test_figures_that_no_busy_machine_changes_hold(run):
    ratios = {ratio["name"]: ratio for ratio in run[0]["ratios"]}
    assert run[0]["not_recorded"] == []
    assert ratios["coverage"]["holds"] and ratios["recorded_twice"]["holds"]
    assert ratios["spans_per_core_second"]["value"] > 0
    assert ratios["scrape_series"]["value"] > 3 * 10 * 20  # ranks, operations, buckets


def test_rows_say_how_much_was_measured(run):
    rows = {row["metric"]: row for row in run[0]["rows"]}
    assert rows["record_ns"]["n"] == rows["all_reduce_ns"]["n"] == 2
    for mode in ("with", "without"):
        assert rows[f"synthetic step {mode}, s"]["n"] == 2 * 2 * 2  # ranks, blocks, steps
        assert rows[f"naive step {mode}, s"]["n"] == 2 * 1 * 2
        assert rows[f"gloo step {mode}, s"]["n"] == 2 * 1 * 1
        assert rows[f"synthetic step {mode}, s"]["median"] > 130 * 20e-6  # it worked
    assert all(row["median"] <= row["p99"] for row in rows.values())
    # Two ranks and 20 steps: the collectives, a worker.step and its three phases.
    assert rows["spans_exported"]["median"] >= 2 * 20 * (130 + 4)


def test_the_table_says_met_or_missed(capsys):
    ratios = make_ratios(
        [
            {"record_ns": 900.0, "coverage": 1.0, "scrape_ms": 90.0},
            {"record_ns": 1100.0, "coverage": 0.5, "scrape_ms": 99.0},
            {"record_ns": 1200.0, "coverage": 1.0, "scrape_ms": 300.0, "all_reduce_ns": 20_000},
        ]
    )
    by_name = {ratio["name"]: ratio for ratio in ratios}
    assert [*by_name] == ["record_ns", "all_reduce_ns", "coverage", "scrape_ms"]
    assert by_name["record_ns"] == {
        "name": "record_ns",
        "value": 1100.0,
        "target": "<= 1000",
        "holds": False,
        "spread": [900.0, 1200.0],
    }
    assert by_name["all_reduce_ns"]["holds"] is None
    telemetry.print_report({"ratios": ratios, "not_recorded": ["x, [y]"], "machine": "a machine"})
    out = capsys.readouterr().out
    assert "not recorded: x, [y]\na machine\n" in out
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert "1,100" in lines["record_ns"] and "missed" in lines["record_ns"]
    assert "met" in lines["coverage"] and "met" in lines["scrape_ms"]
    assert "met" not in lines["all_reduce_ns"].replace("metric", "")


def test_ratios_of_steps_are_of_neighbours_and_of_all():
    steps = Steps([[1.0, 1.0, 9.0], [2.0, 2.0]], [[1.5, 1.5, 1.5], [2.0, 4.0, 4.0]])
    assert steps.p50 == 1.75  # of 1.5 and 2
    assert steps.p99 == 4.0 / 9.0


def test_coverage_takes_nothing_twice():
    cases = [Case("a", 4, 4), Case("b", 4, 0), Case("c", 2, 6)]
    assert coverage(cases) == 0.6


def test_a_sidecars_cost_is_that_of_its_process():
    with Sidecar(2, TelemetrySettings(trace_one_in=0)) as sidecar:
        assert cpu_s(sidecar.pid) > 0
        feeder = Feeder(sidecar.run_dir, 2)
        feeder.feed(3)
        counts = {row["op"]: row["count"] for row in sidecar.report()["collectives"]}
        feeder.close()
    assert counts == {"all_reduce": 3 * 128, "broadcast": 3, "all_gather": 3}
    assert not Path(sidecar.run_dir).exists()


def toggle_and_count(rank, folder):
    tensor, toggle, instrumentor = torch.ones(4), Toggle(), CollectiveInstrumentor()
    ring = RingWriter(Path(folder, "rank-0.ring"), capacity=64, rank=0)
    with pytest.raises(RuntimeError, match="patched no class"):
        toggle.instrumented()
    before = dist.ProcessGroup.__dict__["allreduce"]
    instrumentor.instrument(ring)
    toggle.instrumented()
    heads = []
    for on in (True, False, False, True):
        toggle.switch(on)
        dist.all_reduce(tensor)
        heads.append(ring._words[11])
    instrumentor.uninstrument()
    return heads, dist.ProcessGroup.__dict__["allreduce"] is before


def test_what_is_toggled_records_or_does_not(tmp_path):
    assert run_ranks(toggle_and_count, 1, str(tmp_path)) == [([1, 1, 1, 2], True)]
