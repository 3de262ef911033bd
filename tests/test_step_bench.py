"""`onecast bench step`: it runs on real ranks, and its figures come from its rows."""

import json
import math
import time

import pytest

from onecast.runtime import cli
from onecast.runtime.bench import step, step_report
from onecast.runtime.bench.figures import holds
from onecast.runtime.bench.step_run import (
    AUTO,
    BROADCASTS,
    CHANNELS,
    DECODE,
    HITS,
    MIXED,
    MOVED,
    OVERLAP,
    PRESSURE,
    RUNNING,
    STEPS_PER_S,
    TOKENS,
    Case,
    Plan,
    Turn,
    cases_of,
)
from onecast.runtime.bench.stopwatch import CRITICAL, PARTS, Stopwatch

TINY = Plan(
    batches=(2, 64, 256), places=8, context=100, rounds=1, warm_steps=1, steps=8, launches=1
)
TARGETS = {
    "driver_us_per_step_64": "<= 500",
    "driver_us_256_over_64": "<= 4.5",
    "null_model_steps_per_second_64": ">= 1000",
    "driver_critical_us_64": "reported",
    "driver_us_in_turn_64": "reported",
    "driver_us_overlapped_64": "reported",
    "overlap_gain_64": "reported",
    "steps_vs_two_broadcasts_64": "reported",
}


def run(path):
    assert step.main(["--quick", "--json", str(path)]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "QUICK", TINY)
        return run(tmp_path_factory.mktemp("bench") / "report.json")


def rows_of(report):
    fields = ("workload", "batch", "channel", "overlap", "metric")
    rows = {tuple(row[field] for field in fields): row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    return rows


def check(report, plan):
    """Rows of every case and metric, figures with their targets, each computed from rows."""
    rows = rows_of(report)
    timed = {f"{part} us" for part in (*PARTS, CRITICAL, "driver", "step")}
    counted = {STEPS_PER_S, RUNNING, TOKENS, MOVED, HITS, BROADCASTS}
    assert set(rows) == {(*case, of) for case in cases_of(plan) for of in timed | counted}
    for (*_, metric), row in rows.items():
        turns = plan.launches * plan.rounds
        assert row["n"] == turns * (plan.steps if metric in timed else 1)
        assert 0 <= row["median"] <= row["p99"] and math.isfinite(row["p99"])

    def median(batch, metric, channel=AUTO, overlap=OVERLAP):
        return rows[DECODE, batch, channel, overlap, metric]["median"]

    rate = median(64, STEPS_PER_S)
    values = {
        "driver_us_per_step_64": median(64, "driver us"),
        "driver_us_256_over_64": median(256, "driver us") / median(64, "driver us"),
        "null_model_steps_per_second_64": rate,
        "driver_critical_us_64": median(64, "critical us"),
        "driver_us_in_turn_64": median(64, "driver us", overlap=False),
        "driver_us_overlapped_64": median(64, "driver us", overlap=True),
        "overlap_gain_64": median(64, "step us", overlap=False)
        / median(64, "step us", overlap=True),
        "steps_vs_two_broadcasts_64": rate / median(64, STEPS_PER_S, "two-broadcasts"),
    }
    ratios = {ratio["name"]: ratio for ratio in report["ratios"]}
    assert {name: ratio["value"] for name, ratio in ratios.items()} == values
    assert {name: ratio["target"] for name, ratio in ratios.items()} == TARGETS
    for ratio in ratios.values():
        assert ratio["holds"] is holds(ratio["value"], ratio["target"])
        low, high = ratio["spread"]
        assert 0 < low <= high and math.isfinite(high)
    assert report["bench"] == "step" and "2 ranks" in report["machine"]


def test_every_case_is_run_and_every_figure_comes_from_rows(report):
    check(report, TINY)


def test_the_cases_are_what_they_are_called(report):
    rows = rows_of(report)
    for case in cases_of(TINY):
        medians = {of: rows[*case, of]["median"] for of in (RUNNING, TOKENS, MOVED, HITS)}
        if case.workload == DECODE:
            assert medians == {RUNNING: case.batch, TOKENS: case.batch, MOVED: 0, HITS: 0}
        elif case.workload == MIXED:
            assert medians[TOKENS] > case.batch and medians[MOVED] == medians[HITS] == 0
        else:
            assert medians[HITS] > 0
        assert medians[RUNNING] <= case.batch
        broadcasts = rows[*case, BROADCASTS]["median"]
        expected = {"process-group": 1, "two-broadcasts": 2 + 7}  # 7 tensors that are not empty
        assert broadcasts == expected.get(case.channel, 0)
    workloads = {(case.workload, case.channel, case.overlap) for case in cases_of(TINY)}
    assert {(DECODE, name, OVERLAP) for name in CHANNELS} < workloads
    assert {(one, AUTO, o) for one in (DECODE, MIXED, PRESSURE) for o in (0, 1)} < workloads


def test_the_parts_of_a_step_are_within_it(report):
    """Without overlap one thing comes after the other; texts may be part of what commits."""
    rows = rows_of(report)
    for batch in TINY.batches:
        case = (DECODE, batch, AUTO, False)
        medians = {part: rows[*case, f"{part} us"]["median"] for part in PARTS}
        assert all(medians[part] > 0 for part in ("schedule", "build", "publish", "sample"))
        assert sum(medians.values()) < rows[*case, "step us"]["p99"]
        assert rows[*case, "driver us"]["median"] < rows[*case, "critical us"]["median"]
    overlapped = (DECODE, max(TINY.batches), AUTO, True)
    assert rows[*overlapped, "critical us"]["median"] < rows[*overlapped, "driver us"]["median"]


def test_figures_are_medians_over_launches_with_the_spread_of_each():
    def turn(schedule, build, rate):
        parts = {part: [1.0, 1.0, 1.0] for part in (*PARTS, "critical", "step")}
        return Turn({**parts, "schedule": schedule, "build": build}, {STEPS_PER_S: rate})

    plan = TINY._replace(batches=(64, 256), rounds=1)
    slow = {case: [turn([600.0] * 3, [1.0] * 3, 900.0)] for case in cases_of(plan)}
    fast = {case: [turn([100.0, 200.0, 300.0], [50.0, 30.0, 7.0], 2000.0)] for case in slow}
    large = Case(DECODE, 256, AUTO, OVERLAP)
    for launch, us in ((slow, 602.0 * 6 - 2), (fast, 231.0 * 3 - 2)):
        launch[large] = [turn([us] * 3, [1.0] * 3, 100.0)]
    ratios = {one["name"]: one for one in step_report.make_ratios([slow, fast, fast])}
    first = ratios["driver_us_per_step_64"]
    assert (first["value"], first["spread"], first["holds"]) == (308.0, [231.0, 602.0], True)
    rate = ratios["null_model_steps_per_second_64"]
    assert (rate["value"], rate["spread"], rate["holds"]) == (2000.0, [900.0, 2000.0], True)
    assert ratios["driver_us_256_over_64"]["spread"] == [3.0, 6.0]
    assert ratios["overlap_gain_64"]["value"] == 1


def test_every_benchmark_that_the_command_names_is_there():
    assert cli.BENCHES == ("comm", "telemetry", "blocks", "step", "e2e", "nodes")
    for name in cli.BENCHES:
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", name, "--help"])
        assert ended.value.code == 0


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "missing" / "report.json", ""):
        for name in cli.BENCHES:
            with pytest.raises(SystemExit) as ended:
                cli.main(["bench", name, "--quick", "--json", str(path)])
            assert ended.value.code == 2
            assert "no file can be made at" in capsys.readouterr().err


class Worker:
    def work(self, seconds):
        time.sleep(seconds)
        return "done"

    def fail(self):
        raise RuntimeError("no")


def test_a_stopwatch_times_calls_of_one_object_and_phases_that_are_waited_for():
    watch, worker, other = Stopwatch(), Worker(), Worker()
    watch.time("build", worker, "work", "fail")
    assert worker.work(0.002) == other.work(0.001) == "done"
    with pytest.raises(RuntimeError):
        worker.fail()
    with watch.observer.phase("step.publish"), watch.observer.phase("model.forward"):
        time.sleep(0.001)
    taken = watch.take()
    assert taken["build"] >= 2e6 and taken["critical"] >= 1e6
    assert all(ns == 0 for part, ns in taken.items() if part not in ("build", "critical"))
    assert not any(watch.take().values())


def test_an_interrupted_bench_says_so_in_one_line(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "main", interrupted)
    assert cli.main(["bench", "step", "--quick"]) == 130
    assert capsys.readouterr().err == "onecast: bench step was stopped by SIGINT\n"


def test_the_tables_fit_100_columns_and_nothing_is_cut(report, capsys):
    report = {
        **report,
        "rows": [{**row, "median": 1234.6, "p99": 5678.9} for row in report["rows"]],
    }
    step_report.print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "…" not in text and "two-broadcasts" in text
    assert text.count("1235 (5679)") == 2 * 5 * (len(PARTS) + 3)  # overlap, cases
    for name in TARGETS:
        assert name in text


@pytest.mark.slow
def test_the_quick_run_measures_real_batches(tmp_path):
    check(run(tmp_path / "report.json"), step.QUICK)
