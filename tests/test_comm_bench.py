"""`onecast bench comm`: it runs, and reports each figure with its target."""

import json

import pytest

from onecast.runtime.bench import comm


def test_the_report_has_every_method_and_every_figure(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert comm.main(["--quick", "--steps", "3", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    rows = [row for row in report["rows"] if row["metric"] == "one-way us"]
    assert {(row["workload"], row["method"], row["mode"]) for row in rows} == {
        (w, m, mode) for w in comm.WORKLOADS for m in comm.METHODS for mode in comm.MODES
    }
    assert {row["n"] for row in rows} == {3}
    for row in report["rows"]:
        assert row["ranks"] == 2 and row["n"] >= 1
        assert 0 < row["median"] <= row["p99"]
    ratios = {ratio["name"]: ratio for ratio in report["ratios"]}
    assert {"gloo_vs_two_broadcast_W2", "gloo_vs_raw_W2"} < set(ratios)
    # These do not depend on how busy the machine is.
    assert ratios["metadata_bytes_block_message"]["value"] == 35
    assert ratios["metadata_bytes_per_tensor"]["holds"]
    assert ratios["broadcasts_per_step"]["value"] == 1
    assert "gloo_vs_raw_W2" in capsys.readouterr().out


def test_a_step_count_that_measures_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        comm.main(["--steps", "0"])
    assert "--steps is 0, at least 1" in capsys.readouterr().err
