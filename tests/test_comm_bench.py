"""`onecast bench comm`: it runs, and reports each figure with its target."""

import json
import math

import pytest

from onecast.runtime.bench import all_reduce, comm, launch, workloads
from onecast.runtime.bench.ablation import ABLATION
from onecast.runtime.bench.methods import IDLE, METHODS, PACED, PACED_MORE_RANKS

FIGURES = {
    "shm_vs_two_broadcast_W2": ">= 150",
    "gloo_vs_two_broadcast_W2": ">= 10",
    "gloo_vs_raw_W2": "<= 1.3",
    "shm_one_way_us_W2": "reported",
    "shm_vs_floor_W2": "<= 5",
    "shm_vs_pickle_numpy_shm_W2": ">= 3",
    "idle_wait_cpu_percent": "< 1",
    "paced_wait_cpu_percent": "<= 15",
    "paced_one_way_vs_spinning": "<= 1.5",
    "metadata_bytes_block_message": "<= 40",
    "metadata_bytes_per_tensor": "<= 3",
    "broadcasts_per_step": "= 1",
    "shm_allreduce_vs_gloo_16KiB": ">= 4",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "report.json"
    assert comm.main(["--quick", "--steps", "2", "--json", str(path)]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_every_figure_is_reported_with_its_target(report):
    ratios = {ratio["name"]: ratio for ratio in report["ratios"]}
    assert {name: ratios[name]["target"] for name in FIGURES} == FIGURES
    for ratio in ratios.values():
        assert math.isfinite(ratio["value"])
        low, high = ratio["spread"]
        assert low <= ratio["value"] <= high  # of one launch
        assert (ratio["holds"] is None) == (ratio["target"] == "reported")
        assert ratio["holds"] in (None, True, False)


def test_figures_that_no_busy_machine_changes_hold(report):
    ratios = {ratio["name"]: ratio for ratio in report["ratios"]}
    for name in ("metadata_bytes_block_message", "metadata_bytes_per_tensor"):
        assert ratios[name]["holds"]
    assert ratios["broadcasts_per_step"]["value"] == 1


def test_every_method_is_measured_where_it_should_be(report):
    one_way = {
        (row["ranks"], row["mode"], row["workload"], row["method"])
        for row in report["rows"]
        if row["metric"] == launch.ONE_WAY
    }
    expected = {
        (ranks, "tight", workload, method)
        for ranks in comm.RANKS
        for workload in workloads.WORKLOADS
        for method in METHODS
    }
    expected |= {(2, "tight", workload, name) for workload in ("W1", "W2") for name in ABLATION}
    expected |= {(2, "alternating", "W2", method) for method in METHODS}
    expected |= {(2, "paced", "W2", method) for method in PACED}
    expected |= {(4, "paced", "W2", method) for method in PACED_MORE_RANKS}
    assert one_way == expected
    cpu = {
        (row["ranks"], row["mode"], row["method"])
        for row in report["rows"]
        if row["metric"] == launch.CPU
    }
    assert cpu == (
        {(2, "paced", method) for method in PACED}
        | {(4, "paced", method) for method in PACED_MORE_RANKS}
        | {(2, "idle", method) for method in IDLE}
    )


def test_rows_have_all_fields_and_sound_numbers(report):
    fields = {"workload", "method", "ranks", "mode", "metric", "median", "p99", "n"}
    for row in report["rows"]:
        assert set(row) == fields
        assert math.isfinite(row["median"]) and 0 <= row["median"] <= row["p99"]
        assert row["n"] >= 1
        if row["metric"] == launch.ONE_WAY:
            assert 0 < row["median"] and row["n"] == (2 if row["ranks"] == 2 else 1)


def test_shared_memory_needs_no_broadcast_and_prior_protocols_one_per_tensor(report):
    broadcasts = {
        row["method"]: row["median"]
        for row in report["rows"]
        if (row["workload"], row["ranks"], row["metric"]) == ("W2", 2, launch.BROADCASTS)
    }
    assert broadcasts["shared-memory"] == broadcasts["memcpy-flag"] == 0
    assert broadcasts["process-group"] == broadcasts["raw-broadcast"] == 1
    assert broadcasts["fixed-metadata"] == 1 + 8
    assert broadcasts["two-broadcasts"] == broadcasts["ablation-fat-many"] == 2 + 8
    assert broadcasts["ablation-fat-one"] == broadcasts["ablation-compact-one"] == 1


def test_the_ablation_varies_what_it_says(report):
    nbytes = {
        row["method"]: row["median"]
        for row in report["rows"]
        if (row["workload"], row["ranks"], row["metric"]) == ("W1", 2, launch.METADATA)
    }
    assert nbytes["ablation-fat-many"] == nbytes["ablation-fat-one"]
    assert nbytes["ablation-compact-many"] == nbytes["ablation-compact-one"]
    assert nbytes["ablation-compact-one"] == nbytes["process-group"] + 8  # its size goes along
    assert nbytes["ablation-fat-one"] > 3 * nbytes["ablation-compact-one"]


def test_a_step_count_that_measures_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        comm.main(["--steps", "0"])
    assert "--steps: 0 is below 1" in capsys.readouterr().err


def test_a_run_on_a_slow_machine_has_fewer_steps_in_its_later_launches(monkeypatch, capsys):
    assert comm.steps_for(700, took_s=180, left_s=190) == 700  # in time: as many as ever
    assert comm.steps_for(700, took_s=420, left_s=80) == 700 * 60 // 400
    assert comm.steps_for(700, took_s=600, left_s=-20) == 20  # late: yet something is measured
    assert comm.steps_for(2, took_s=600, left_s=-20) == 2
    clock, asked = [0.0], []

    def launch(plan):
        asked.append((plan.ranks, plan.tight_steps))
        clock[0] += plan.tight_steps * 0.2  # 280 s a launch of 700 steps, both numbers of ranks
        return {}

    monkeypatch.setattr(comm, "launch", launch)
    monkeypatch.setattr(comm, "time_all_reduces", lambda ranks, steps: {})
    monkeypatch.setattr(comm, "make_rows", list)
    monkeypatch.setattr(comm, "make_ratios", list)
    monkeypatch.setattr(comm.time, "monotonic", lambda: clock[0])
    comm.measure(700, launches=3, quick=False)
    steps = [steps for ranks, steps in asked if ranks == 2]
    assert asked == [(ranks, of) for of in steps for ranks in (2, 4)]
    assert steps[0] == 700 and 300 < steps[1] < 350 and steps[1] <= steps[2] * 1.01
    assert clock[0] <= 560
    assert f"{steps[1]} steps in place of 700 from now on" in capsys.readouterr().err


def test_a_workload_that_is_not_there_is_refused_by_name():
    with pytest.raises(ValueError, match="'W9'; there are: W1, W2, W3, W4"):
        workloads.make_workload("W9")


def test_all_reduces_of_every_size_are_measured_both_ways(report):
    rows = {
        (row["workload"], row["method"], row["ranks"]): row["n"]
        for row in report["rows"]
        if row["metric"] == all_reduce.METRIC
    }
    assert set(rows) == {
        (size, method, ranks)
        for size in ("1 KiB", "4 KiB", "16 KiB", "64 KiB", "256 KiB", "1024 KiB")
        for method in all_reduce.METHODS
        for ranks in comm.RANKS
    }
    assert set(rows.values()) == {1}
