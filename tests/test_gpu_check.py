"""`onecast gpu-check`: it runs wherever torch is, says what is missing, and fails when it must."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from onecast.runtime import cli, gpu_check, gpu_parts
from onecast.runtime.bench import (
    blocks_gpu,
    e2e_gpu,
    gpu,
    gpu_copies,
    gpu_part,
    gpu_profiler,
    nccl,
    telemetry_gpu,
)
from onecast.runtime.bench.e2e_channels import CHANNELS
from onecast.runtime.gpu_report import Outcome, print_report, read_junit

ROOT = Path(__file__).parents[1]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
ALL_PARTS = ", ".join(gpu_parts.PARTS)
# What a machine with a GPU may lack.
NOT_THERE = ("hypothesis", "opentelemetry", "rich", "transformers", "prometheus_client", "grpc",
             "requests", "google", "playwright")  # fmt: skip


class Machine:
    """A bare checkout, and a Python that has torch and little else."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        for name in ("comm", "runtime", "telemetry", "tests", ".links"):
            ignored = shutil.ignore_patterns("__pycache__", "checkpoint")
            shutil.copytree(ROOT / name, self.checkout / name, symlinks=True, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        venv.create(folder / "python", symlinks=True)
        self._python = folder / "python" / "bin" / "python"
        (self._packages,) = (folder / "python" / "lib").glob("python*/site-packages")

    def run(self, *arguments: str, without: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        for entry in self._packages.iterdir():
            entry.unlink()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            hidden = entry.name.lower().startswith((*without, "onecast", "__editable__"))
            if not hidden and entry.suffix != ".pth":
                (self._packages / entry.name).symlink_to(entry)
        environment = {key: value for key, value in os.environ.items() if key[:6] != "PYTHON"}
        return subprocess.run(
            [self._python, "-P", "-m", *arguments],
            cwd=self.checkout,
            env={**environment, "PYTHONPATH": ".links", "XDG_CACHE_HOME": str(self.checkout)},
            capture_output=True,
            text=True,
            timeout=200,
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.mark.slow
def test_it_runs_from_a_bare_checkout_with_little_more_than_torch(machine, tmp_path):
    path = tmp_path / "report.json"
    pages = tmp_path / "pages"
    arguments = ("--device=cpu", "--steps=3", f"--json={path}", f"--report={pages}")
    result = machine.run("onecast.runtime.gpu_check", *arguments, without=NOT_THERE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith("gpu-check: ok")
    assert "Traceback" not in result.stderr
    report = json.loads(path.read_text())
    assert report["missing"] == [] and 0 < report["seconds"] < 480
    parts = {part["part"]: part for part in report["parts"]}
    assert [*parts] == [*gpu_parts.PARTS]
    ran = [name for name in parts if name != "tests"]
    assert {parts[name]["state"] for name in ran} == {"passed"}
    reasons = " ".join(parts["tests"]["skipped"])
    assert "test_process_group_channel: needs the package hypothesis" in reasons
    if not torch.cuda.is_available():
        assert parts["tests"]["state"] == "skipped"
        assert "test_gpu_channels.test_on_a_gpu: needs a GPU" in reasons
    methods = {(row["method"], row["metric"]) for row in parts["host"]["rows"]}
    names = gpu.methods_of("gloo", only_group=False)
    assert methods == {(name, f"{of} us") for name in names for of in ("one-way", "sender")}
    assert all(row["n"] == 3 and 0 < row["median"] <= row["p99"] for row in parts["host"]["rows"])
    found = {(row["ranks"], row["metric"]) for row in parts["nccl"]["rows"]}
    assert found == {(1, "sender us")} | {
        (n, f"{of} us") for n in (2, 4) for of in ("one-way", "sender")
    }
    copies = {(row["workload"], row["method"]) for row in parts["copies"]["rows"]}
    sizes = [f"{size} bytes" for size in gpu_copies.COPY_BYTES]
    assert copies == {(size, name) for size in sizes for name in gpu_copies.COPIES}
    issued = {(row["workload"], row["method"]) for row in parts["telemetry"]["rows"]}
    methods = (telemetry_gpu.NOTHING, telemetry_gpu.RECORDED, telemetry_gpu.TIMED)
    assert issued == {(size, method) for size in ("16 KiB", "16 MiB") for method in methods}
    by = {(row["workload"], row["method"], row["n"]) for row in parts["profiler"]["rows"]}
    both = (gpu_profiler.RECORDED, gpu_profiler.PROFILED)
    assert by == {(size, one, 2 * 3) for size in ("16 KiB", "1 MiB") for one in both}
    assert parts["profiler"]["ratios"][0]["name"] == gpu_profiler.ERROR
    moved = parts["blocks"]["rows"]
    assert all(row["workload"].endswith(" (CPU)") and row["n"] == 3 for row in moved)
    assert {row["workload"] for row in moved} >= {
        "out, 64 scattered (CPU)",
        "copy, 1 contiguous (CPU)",
    }
    figures = parts["blocks"]["ratios"]
    assert [figure["name"] for figure in figures] == [*blocks_gpu.FIGURES]
    assert {figure["holds"] for figure in figures} == {None}  # they say nothing of a GPU
    alone, sharing = parts["e2e"]["reports"]
    assert alone["plan"]["tp"] == [1] and sharing["plan"]["tp"] == [2]
    assert alone["model"]["synthetic"] == sharing["model"]["synthetic"] == "small"
    shown = {(row["method"], row["metric"]) for row in parts["e2e"]["rows"]}
    assert shown == {(channel, metric) for channel in CHANNELS for metric in e2e_gpu.SHOWN}
    for name in ("tp1", "tp2"):
        assert "synthetic small" in (pages / name / "e2e.html").read_text()


def test_a_part_runs_from_a_bare_checkout(machine, tmp_path):
    path = tmp_path / "report.json"
    arguments = ("--device=cpu", "--steps=1", "--only=copies", f"--json={path}")
    result = machine.run("onecast.runtime.gpu_check", *arguments, without=NOT_THERE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(
        r"gpu-check: ok \(\d+ s, tried out on the CPU\)", result.stdout.splitlines()[-1]
    )
    (part,) = json.loads(path.read_text())["parts"]
    assert (part["part"], part["state"], len(part["rows"])) == ("copies", "passed", 6)


def test_what_is_missing_is_said_first_and_without_a_traceback(machine):
    result = machine.run("onecast.runtime.gpu_check", without=("msgspec", "pytest", "_pytest"))
    assert result.returncode == 3
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    said = lines[: lines.index("==== gpu-check")]
    assert f"MISSING: the package msgspec; without it: no {ALL_PARTS}" in said
    assert "MISSING: the package pytest; without it: no tests" in said
    assert "How to bring a package to a machine without a network: see --help" in said
    assert lines[-1].startswith(f"gpu-check: NOT RUN ({ALL_PARTS}) (")


def test_torch_that_is_missing_is_said(machine):
    result = machine.run("onecast.runtime.gpu_check", without=("torch",))
    assert result.returncode == 3
    assert result.stderr == ""
    assert f"MISSING: torch (No module named 'torch'); without it: no {ALL_PARTS}" in result.stdout


def test_the_results_say_which_gpu_and_which_nccl_they_are_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("LD_PRELOAD", "")
    for version, said in (((2, 31, 2), "2.31.2"), ((), "missing")):
        monkeypatch.setattr(nccl, "nccl_version", lambda version=version: version)
        line, *environment = gpu_check.describe_machine()
        assert line.endswith(f", 2 x A GPU, CUDA 13.0, NCCL {said}")
        assert "LD_PRELOAD=" in environment


def test_it_imports_nothing_that_such_a_machine_lacks():
    code = (
        "import sys, onecast.runtime.gpu_check, onecast.runtime.bench.gpu\n"
        "import onecast.runtime.bench.blocks_gpu, onecast.runtime.cuda_mover\n"
        "names = ('rich', 'opentelemetry', 'onecast.telemetry', 'prometheus_client')\n"
        "print([name for name in sys.modules if name.startswith(names)])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


@WITHOUT_GPU
def test_without_a_gpu_nothing_fails_and_nothing_passes(capfd, tmp_path):
    path = tmp_path / "report.json"
    assert cli.main(["gpu-check", "--json", str(path)]) == 3
    out = capfd.readouterr().out
    assert "MISSING: a GPU that torch can use (" in out
    assert out.splitlines()[-1].startswith(f"gpu-check: NOT RUN ({ALL_PARTS}) (")
    parts = json.loads(path.read_text())["parts"]
    assert {part["state"] for part in parts} == {"not run"}
    assert all(part["text"].startswith("missing: a GPU that torch can use") for part in parts)


def test_what_fails_tells_more_than_what_did_not_run(capfd, monkeypatch, tmp_path):
    missing = [gpu_check.Missing("the package pytest", ("tests",))]
    monkeypatch.setattr(gpu_check, "find_missing", lambda device: missing)
    only = ["--device=cpu", "--only=tests", "--only=copies", "--steps=1"]
    monkeypatch.setattr(gpu_check, "run_benchmark", lambda *_: Outcome("copies", "passed", ""))
    assert gpu_check.main(only) == 3
    assert "gpu-check: NOT RUN (tests) (" in capfd.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(gpu_check, "run_benchmark", lambda *_: Outcome("copies", "failed", ""))
    assert gpu_check.main(only) == 1
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("gpu-check: FAILED (copies); NOT RUN (tests) (")


def test_a_part_that_fails_fails_the_command(capfd, tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.cuda\n"
        "def test_right():\n    pass\n"
        "@pytest.mark.cuda\n"
        "def test_wrong():\n    assert 1 == 2\n"
        "def test_of_another_kind():\n    assert 0\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda: x\n")
    arguments = ["--device=cpu", "--only=tests", f"--tests={tmp_path}"]
    assert gpu_check.main(arguments) == 1
    out = capfd.readouterr().out
    assert "1 passed, 1 failed, 0 skipped" in out
    assert "test_it.test_wrong: assert 1 == 2" in out
    assert out.splitlines()[-1].startswith("gpu-check: FAILED (tests)")


def test_a_folder_without_such_tests_is_a_reason_to_skip(capfd, tmp_path):
    assert gpu_check.main(["--device=cpu", "--only=tests", f"--tests={tmp_path}"]) == 0
    assert f"no test that needs a GPU lies in {tmp_path}" in capfd.readouterr().out


# ---- time


def test_all_parts_together_take_less_than_eight_minutes():
    budgets = {name: part.budget_s for name, part in gpu_parts.PARTS.items()}
    assert sum(budgets.values()) <= gpu_parts.TOTAL_S < 480
    least = gpu_parts.GRACE_S + gpu_parts.STACKS_S
    assert min(budgets.values()) >= least  # something is left to measure in
    assert gpu_part.HUNG_STATUS == gpu_parts.HUNG_STATUS


def test_a_part_has_its_budget_and_what_others_left(monkeypatch):
    parts = {name: gpu_parts.Part(s) for name, s in {"a": 10.0, "b": 20.0, "c": 30.0}.items()}
    monkeypatch.setattr(gpu_parts, "PARTS", parts)
    assert gpu_parts.limit_of("a", ["a", "b", "c"], 60) == 10
    assert gpu_parts.limit_of("b", ["a", "b", "c"], 58) == 28  # `a` took 2
    assert gpu_parts.limit_of("c", ["a", "b", "c"], 57) == 57
    assert gpu_parts.limit_of("a", ["a", "c"], 60) == 30
    assert gpu_parts.limit_of("c", ["a", "b", "c"], 5) == 30  # whatever became of the others


def test_tests_that_run_out_of_time_tell_what_they_have(capfd, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_parts.PARTS, "tests", gpu_parts.Part(0.0))
    monkeypatch.setattr(gpu_check, "TOTAL_S", 4.0)
    monkeypatch.setattr(gpu_parts, "GRACE_S", 1.5)
    (tmp_path / "test_it.py").write_text(
        "import pytest, subprocess, time\n"
        "@pytest.mark.cuda\n"
        "def test_right():\n    pass\n"
        "@pytest.mark.cuda\n"
        "def test_without_end():\n    time.sleep(100)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda: x\n")
    arguments = ["--device=cpu", "--only=tests", f"--tests={tmp_path}"]
    assert gpu_check.main(arguments) == 3
    out = capfd.readouterr().out
    assert re.search(r"it did not end within \d s; by then: [12] passed, 0 failed", out)
    assert "gpu-check: OUT OF TIME (tests)" in out.splitlines()[-1]


@pytest.fixture
def slow_python(tmp_path, monkeypatch):
    """A Python that leaves two rows and what else it is told, and then hangs or ends."""
    script = tmp_path / "python"

    def make(then: str) -> None:
        script.write_text(
            f"#!{sys.executable}\n"
            "import json, sys, time\n"
            "(path,) = [one.partition('=')[2] for one in sys.argv if one.startswith('--json=')]\n"
            "row = {'workload': 'w', 'method': 'm', 'metric': 'us', 'median': 1, 'p99': 2,"
            " 'n': 3}\n"
            "found = {'rows': [row, row], 'ratios': [], 'skipped': ['why'], 'reports': []}\n"
            "open(path, 'w').write(json.dumps(found))\n"
            f"{then}\n"
        )
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return make


@pytest.mark.parametrize("then", ["time.sleep(100)", f"sys.exit({gpu_parts.HUNG_STATUS})"])
def test_a_part_that_runs_out_of_time_is_told_and_the_next_one_runs(
    capfd, tmp_path, monkeypatch, slow_python, then
):
    slow_python(then)
    monkeypatch.setattr(gpu_parts, "GRACE_S", 0.5)
    short = {name: part._replace(budget_s=1.0) for name, part in gpu_parts.PARTS.items()}
    monkeypatch.setattr(gpu_parts, "PARTS", short)
    monkeypatch.setattr(gpu_check, "TOTAL_S", 2.0)
    path = tmp_path / "report.json"
    arguments = ["--device=cpu", "--only=copies", "--only=blocks", f"--json={path}"]
    assert gpu_check.main(arguments) == 3
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("gpu-check: OUT OF TIME (copies, blocks) (")
    for part in json.loads(path.read_text())["parts"]:
        assert part["state"] == "out of time" and len(part["rows"]) == 2
        assert re.fullmatch(r"it did not end within [12] s; by then: 2 rows", part["text"])
        assert part["skipped"] == ["why"]


def test_what_is_known_is_written_whatever_ends_the_command(tmp_path, monkeypatch):
    outcomes = iter([Outcome("copies", "passed", "")])
    monkeypatch.setattr(gpu_check, "run_benchmark", lambda *_: next(outcomes))
    path = tmp_path / "report.json"
    with pytest.raises(RuntimeError, match="StopIteration"):
        gpu_check.main(["--device=cpu", "--only=copies", "--only=blocks", f"--json={path}"])
    (part,) = json.loads(path.read_text())["parts"]
    assert part["part"] == "copies"


def test_the_end_to_end_part_has_a_page_for_each_number_of_ranks(capfd, tmp_path, monkeypatch):
    reports = [{"plan": {"tp": [tp]}, "command": f"onecast of {tp}"} for tp in (1, 2)]
    found = [Outcome("copies", "passed", ""), Outcome("e2e", "passed", "", reports=reports)]
    outcomes = iter(found)
    monkeypatch.setattr(gpu_check, "run_benchmark", lambda *_: next(outcomes))
    arguments = ["--device=cpu", "--only=copies", "--only=e2e", f"--report={tmp_path / 'pages'}"]
    assert gpu_check.main(arguments) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("gpu-check: ok")
    for tp in (1, 2):
        assert f"onecast of {tp}" in (tmp_path / "pages" / f"tp{tp}" / "e2e.html").read_text()


def test_a_benchmark_that_ends_badly_fails_with_what_it_had(capfd, slow_python):
    slow_python("sys.exit(1)")
    assert gpu_check.main(["--device=cpu", "--only=copies"]) == 1
    assert "it ended with status 1; by then: 2 rows" in capfd.readouterr().out


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(capsys, tmp_path):
    (tmp_path / "file").touch()
    for option in (f"--json={tmp_path}/absent/report.json", f"--report={tmp_path}/file/pages"):
        with pytest.raises(SystemExit):
            gpu_check.main(["--device=cpu", option])
        assert "can be made at" in capsys.readouterr().err


# ---- what pytest reports


def junit(*cases: str) -> str:
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"


def collection_error(text: str) -> str:
    error = f'<error message="collection failure">{text}</error>'
    return f'<testcase classname="" name="tests.test_it">{error}</testcase>'


def test_a_module_that_needs_an_absent_package_is_skipped_and_a_broken_one_is_not():
    absent = collection_error("E   ModuleNotFoundError: No module named 'surely_absent.part'")
    outcome = read_junit(junit(absent), 1.0)
    assert (outcome.state, outcome.failed) == ("skipped", ())
    assert outcome.skipped == ("tests.test_it: needs the package surely_absent",)
    for text in (
        "E   ModuleNotFoundError: No module named 'onecast.comm.nothing'",
        "E   ImportError: cannot import name 'x' from 'json'",
    ):
        assert read_junit(junit(collection_error(text)), 1.0).state == "failed"


def test_a_failure_for_want_of_a_module_in_a_test_is_a_failure():
    text = "<failure message=\"ModuleNotFoundError: No module named 'surely_absent'\">x</failure>"
    case = f'<testcase classname="a" name="b">{text}</testcase>'
    assert read_junit(junit(case), 1.0).state == "failed"


def test_equal_reasons_are_counted():
    skips = [
        f'<testcase classname="a" name="b[{i}]"><skipped message="needs a GPU"/></testcase>'
        for i in range(3)
    ]
    passed = '<testcase classname="a" name="c"/>'
    outcome = read_junit(junit(*skips, passed), 1.0)
    assert outcome.state == "passed"
    assert outcome.skipped == ("a.b: needs a GPU (3x)",)
    assert outcome.text == "1 passed, 0 failed, 3 skipped"


def test_no_test_at_all_is_a_failure():
    assert read_junit(junit(), 1.0).state == "failed"


def test_the_table_is_plain_and_the_verdict_last(capsys):
    row = {"workload": "W2", "method": "a", "metric": "one-way us", "n": 7}
    rows = [{**row, "median": 1.25, "p99": 20.0}, {**row, "median": 2, "p99": 3, "method": "b c"}]
    print_report(
        [
            Outcome("host", "passed", "2 rows", 1.0, rows=rows),
            Outcome("tests", "failed", "1 failed", 2.0, ("x: a reason",), ("y: why",)),
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "",
        "==== gpu-check",
        "",
        "host  method  one-way us  p99   n",
        "W2    a       1.2         20.0  7",
        "W2    b c     2.0         3.0   7",
        "",
        "tests, skipped:",
        "  x: a reason",
        "",
        "tests, FAILED:",
        "  y: why",
        "",
        "part   state   seconds",
        "host   passed  1.0      2 rows",
        "tests  failed  2.0      1 failed",
        "",
        "gpu-check: FAILED (tests)",
    ]


def test_methods_with_other_metrics_have_a_table_of_their_own_and_figures_theirs(capsys):
    row = {"workload": "out, 64", "method": "a", "n": 7, "median": 2.0, "p99": 1.0}
    figure = {"name": "swap_share", "value": 0.913, "target": ">= 0.9", "holds": True}
    missed = figure | {"name": "copy", "value": 0.5, "holds": False}
    rows = [row | {"metric": "GB/s"}, row | {"metric": "% hidden", "method": "b"}]
    print_report([Outcome("blocks", "passed", "2 rows", 1.0, rows=rows, ratios=[figure, missed])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:13] == [
        "blocks   method  GB/s  p99  n",
        "out, 64  a       2.0   1.0  7",
        "",
        "blocks   method  % hidden  p99  n",
        "out, 64  b       2.0       1.0  7",
        "",
        "blocks      value  target",
        "swap_share  0.91   >= 0.9  met",
        "copy        0.50   >= 0.9  missed",
        "",
    ]
    assert lines[-1] == "gpu-check: ok"  # a figure that is missed is no test that failed
