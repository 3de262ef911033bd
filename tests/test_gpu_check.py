"""`onecast gpu-check`: it runs wherever torch is, says what is missing, and fails when it must."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import torch
from racing_cuda import racing_streams
from racing_streams import Machine as GpuMachine

from onecast.runtime import cli, gpu_check
from onecast.runtime.bench import blocks_gpu, blocks_hidden, gpu, telemetry_gpu
from onecast.runtime.gpu_report import Outcome, print_report, read_junit

ROOT = Path(__file__).parents[1]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
ALL_PARTS = "tests, host, nccl, copies, telemetry, blocks"
# What a machine with a GPU may lack.
NOT_THERE = ("hypothesis", "opentelemetry", "rich", "transformers", "prometheus_client")


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
            env={**environment, "PYTHONPATH": ".links"},
            capture_output=True,
            text=True,
            timeout=200,
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


def test_it_runs_from_a_bare_checkout_with_little_more_than_torch(machine, tmp_path):
    path = tmp_path / "report.json"
    arguments = ("--device=cpu", "--steps=3", f"--json={path}")
    result = machine.run("onecast.runtime.gpu_check", *arguments, without=NOT_THERE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith("gpu-check: ok")
    assert "Traceback" not in result.stderr
    report = json.loads(path.read_text())
    assert report["missing"] == []
    parts = {part["part"]: part for part in report["parts"]}
    assert [*parts] == ["tests", "host", "nccl", "copies", "telemetry", "blocks"]
    ran = ("host", "copies", "telemetry", "blocks")
    assert {parts[name]["state"] for name in ran} == {"passed"}
    reasons = " ".join(parts["tests"]["skipped"])
    assert "test_process_group_channel: needs the package hypothesis" in reasons
    if not torch.cuda.is_available():
        assert parts["tests"]["state"] == parts["nccl"]["state"] == "skipped"
        assert parts["nccl"]["text"] == "torch sees no GPU"
        assert "test_gpu_channels.test_on_a_gpu: needs a GPU" in reasons
    methods = {(row["method"], row["metric"]) for row in parts["host"]["rows"]}
    assert methods == {(m, f"{one} us") for m in gpu.HOST_METHODS for one in ("one-way", "sender")}
    assert all(row["n"] == 3 and 0 < row["median"] <= row["p99"] for row in parts["host"]["rows"])
    copies = {(row["workload"], row["method"]) for row in parts["copies"]["rows"]}
    assert copies == {(f"{size} bytes", name) for size in gpu.COPY_BYTES for name in gpu.COPIES}
    issued = {(row["workload"], row["method"]) for row in parts["telemetry"]["rows"]}
    methods = (telemetry_gpu.NOTHING, telemetry_gpu.RECORDED, telemetry_gpu.TIMED)
    assert issued == {(size, method) for size in ("16 KiB", "16 MiB") for method in methods}
    moved = parts["blocks"]["rows"]
    assert all(row["workload"].endswith(" (CPU)") and row["n"] == 3 for row in moved)
    assert {row["workload"] for row in moved} >= {
        "out, 64 scattered (CPU)",
        "copy, 1 contiguous (CPU)",
    }
    figures = parts["blocks"]["ratios"]
    assert [figure["name"] for figure in figures] == [*blocks_gpu.FIGURES]
    assert {figure["holds"] for figure in figures} == {None}  # they say nothing of a GPU


def test_what_is_missing_is_said_first_and_without_a_traceback(machine):
    result = machine.run("onecast.runtime.gpu_check", without=("msgspec", "pytest", "_pytest"))
    assert result.returncode == 3
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    said = lines[: lines.index("==== gpu-check")]
    assert f"MISSING: the package msgspec; without it: no {ALL_PARTS}" in said
    assert "MISSING: the package pytest; without it: no tests" in said
    assert lines[-1] == f"gpu-check: NOT RUN ({ALL_PARTS})"


def test_torch_that_is_missing_is_said(machine):
    result = machine.run("onecast.runtime.gpu_check", without=("torch",))
    assert result.returncode == 3
    assert result.stderr == ""
    assert "MISSING: torch (No module named 'torch'); without it: no tests, host" in result.stdout


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
    assert out.splitlines()[-1] == f"gpu-check: NOT RUN ({ALL_PARTS})"
    parts = json.loads(path.read_text())["parts"]
    assert {part["state"] for part in parts} == {"not run"}
    assert all(part["text"].startswith("missing: a GPU that torch can use") for part in parts)


def test_what_fails_tells_more_than_what_did_not_run(capfd, monkeypatch, tmp_path):
    missing = [gpu_check.Missing("the package pytest", ("tests",))]
    monkeypatch.setattr(gpu_check, "find_missing", lambda device: missing)
    only = ["--device=cpu", "--only=tests", "--only=copies", "--steps=1"]
    assert gpu_check.main(only) == 3
    assert capfd.readouterr().out.splitlines()[-1] == (
        "gpu-check: NOT RUN (tests) (tried out on the CPU)"
    )
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert gpu_check.main(only) == 1
    assert capfd.readouterr().out.splitlines()[-1] == (
        "gpu-check: FAILED (copies); NOT RUN (tests) (tried out on the CPU)"
    )


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


def test_a_part_that_hangs_is_ended_and_tells_what_it_has(capfd, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check._TIMEOUT_S, "tests", 6.0)
    (tmp_path / "test_it.py").write_text(
        "import pytest, subprocess, time\n"
        "@pytest.mark.cuda\n"
        "def test_right():\n    pass\n"
        "@pytest.mark.cuda\n"
        "def test_without_end():\n    time.sleep(100)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda: x\n")
    start = time.monotonic()
    assert gpu_check.main(["--device=cpu", "--only=tests", f"--tests={tmp_path}"]) == 1
    assert time.monotonic() - start < 30
    assert "it did not end within 6 s; by then: 2 passed" in capfd.readouterr().out


def test_a_benchmark_that_ends_badly_fails(capfd, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert gpu_check.main(["--device=cpu", "--only=copies"]) == 1
    assert "it ended with status 1" in capfd.readouterr().out


def test_a_step_count_that_measures_nothing_is_refused(capsys):
    mains = ((gpu_check.main, []), (gpu.main, ["copies"]), (blocks_gpu.main, []))
    for main, arguments in mains:
        with pytest.raises(SystemExit):
            main([*arguments, "--steps=0"])
        assert "--steps is 0, at least 1" in capsys.readouterr().err


# ---- NCCL, and what pytest reports


@pytest.mark.parametrize(
    ("gpus", "variable", "version", "refusal"),
    [
        (0, "1", (2, 31, 2), "torch sees no GPU"),
        (1, None, (2, 31, 2), "2 ranks of NCCL on 1 GPU need .* is not set, NCCL is 2.31.2$"),
        (1, "1", (2, 28, 9), "2 ranks of NCCL on 1 GPU need .* is set, NCCL is 2.28.9$"),
        (1, "1", (2, 31, 2), None),
        (2, None, (2, 28, 9), None),
    ],
)
def test_ranks_meet_over_nccl_where_it_can_be(monkeypatch, gpus, variable, version, refusal):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(gpu.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(gpu, "nccl_version", lambda: version)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    if variable is not None:
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", variable)
    found = gpu.nccl_refusal(2)
    if refusal is None:
        assert found is None
    else:
        assert found is not None and re.match(refusal, found)


def test_the_version_of_nccl_is_that_of_the_loaded_library(monkeypatch):
    class Library:
        def __init__(self, name):
            assert name is None  # what the process has loaded, the preloaded first

        @staticmethod
        def ncclGetVersion(place):
            place._obj.value = 23102
            return 0

    monkeypatch.setattr(gpu.ctypes, "CDLL", Library)
    assert gpu.nccl_version() == (2, 31, 2)


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


# ---- blocks


def test_the_figures_of_a_gpu_have_the_targets_of_the_report():
    from onecast.runtime.bench.blocks_report import FIGURES

    assert {
        name: target for name, (target, _) in FIGURES.items() if name in blocks_gpu.FIGURES
    } == {name: target for name, target in blocks_gpu.FIGURES.items() if name in FIGURES}


def test_the_path_of_a_gpu_over_streams_that_run_late(monkeypatch):
    """All three movers, the GPU's own clock, and what every method says did arrive."""
    kernels = pytest.importorskip("onecast.runtime.kernels", exc_type=ImportError)
    machine = GpuMachine(0)
    monkeypatch.setattr(kernels, "move_rows", machine.move_rows)
    make = blocks_gpu._Bench._make_movers

    def make_movers(self, device_rows, host_rows):
        machine.adopt(device_rows, "device block")
        machine.adopt(host_rows, "host block")
        self._gpu = True
        return make(self, device_rows, host_rows)

    monkeypatch.setattr(blocks_gpu._Bench, "_make_movers", make_movers)
    monkeypatch.setattr(blocks_gpu, "_CELL_S", 0.0)
    with racing_streams(machine):
        bench = blocks_gpu._Bench(blocks_gpu.ON_CPU._replace(counts=(16,)), "cpu")
        assert [*bench.movers] == ["onecast", "copies", "kernel"]
        for op in blocks_gpu.OPS:
            for pattern in blocks_gpu.PATTERNS:
                machine.log.clear()
                rates = bench.rates(op, pattern, 16, 5)
                own = ["onecast"] if op == "copy" else ["onecast", "copies", "kernel"]
                assert [*rates] == [*own, "one copy", "per layer"]
                assert {len(values) for values in rates.values()} == {3}
                # 5 rounds; of each method one copy or kernel at least, per layer 8 a block
                moves = [line for line in machine.log if line.startswith(("copy", "kernel"))]
                assert len(moves) >= 5 * (len(own) + 1 + 16 * 8)
        bench.close()
    assert not any(stream.queue for stream in machine.streams)


def test_the_share_that_is_hidden_is_what_a_step_is_not_longer_by(monkeypatch):
    """Swaps of 2 s beside a load of 5 s, of which the step shows one half second."""
    beside = blocks_hidden._Beside(torch.device("cpu"))
    monkeypatch.setattr(beside, "_least", lambda call: 1.0)
    times = iter([2.0, 5.0, 5.5] * 4)
    monkeypatch.setattr(beside, "_elapsed", lambda call: next(times))
    assert beside.rounds(None, lambda: None, 2) == [75.0, 75.0]
