"""`onecast gpu-check`: every test and every benchmark that needs a GPU, and a short table last.

Owns which parts there are, the processes they run in, and the verdict. It needs no more than the
standard library to say what a machine lacks, installs nothing, and runs from a bare checkout too:

    PYTHONPATH=.links python -P -m onecast.runtime.gpu_check

The environment goes to every part as it is: several ranks of NCCL on one GPU need
NCCL_MULTI_RANK_GPU_ENABLE=1 and a library that can do it (LD_PRELOAD); without, they are skipped.

Exit status 0: all parts have run and all tests have passed, but for what was skipped for a reason
that is printed; 1: something failed; 2: bad usage; 3: nothing failed, but parts did not run because
this machine lacks what they need: a GPU, torch, pytest. Figures that are missed are printed so.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .gpu_report import FAILED, NOT_RUN, PASSED, SKIPPED, Outcome, print_report, read_junit

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = {"tests": 450.0, "host": 120.0, "nccl": 120.0, "copies": 60.0}
_TIMEOUT_S |= {"telemetry": 120.0, "blocks": 120.0}
_MODULES = {"telemetry": "telemetry_gpu", "blocks": "blocks_gpu"}  # the others are parts of one
_GRACE_S = 10.0  # for a part that is told to end
_CANNOT_RUN = 3
_STEPS = 500
_RANKS = 2  # of the benchmark
_ENVIRONMENT = ("NCCL_MULTI_RANK_GPU_ENABLE", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES")


class Missing(NamedTuple):
    """What this machine lacks; `parts` cannot run for it."""

    what: str
    parts: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="onecast gpu-check", description="Run all tests and benchmarks that need a GPU."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the command out"
    )
    parser.add_argument("--steps", type=int, default=_STEPS, help="of a benchmark (%(default)s)")
    parser.add_argument("--tests", type=Path, default=_ROOT / "tests", metavar="DIR")
    parser.add_argument("--only", choices=tuple(_TIMEOUT_S), action="append", metavar="PART")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}, at least 1 is needed")
    missing = find_missing(options.device)
    machine = describe_machine()
    for line in machine:
        print(line)
    for one in missing:
        print(f"MISSING: {one.what}; without it: no {', '.join(one.parts)}")
    sys.stdout.flush()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="onecast-gpu-check-") as folder:
        for part in options.only or _TIMEOUT_S:
            lacks = [one.what for one in missing if part in one.parts]
            if lacks:
                outcomes.append(Outcome(part, NOT_RUN, f"missing: {', '.join(lacks)}"))
            elif part == "tests":
                outcomes.append(_run_tests(options.tests, Path(folder, "tests.xml")))
            else:
                result = Path(folder, f"{part}.json")
                outcomes.append(_run_benchmark(part, options.device, options.steps, result))
    if options.json is not None:
        report = {
            "machine": machine,
            "missing": [one.what for one in missing],
            "parts": [outcome._asdict() for outcome in outcomes],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print_report(outcomes, "" if options.device == "cuda" else " (tried out on the CPU)")
    states = {outcome.state for outcome in outcomes}
    return 1 if FAILED in states else _CANNOT_RUN if NOT_RUN in states else 0


def find_missing(device: str) -> list[Missing]:
    """What the parts need and this machine has not."""
    everything = tuple(_TIMEOUT_S)
    missing = []
    for package in ("numpy", "msgspec"):
        if importlib.util.find_spec(package) is None:
            missing.append(Missing(f"the package {package}", everything))
    if importlib.util.find_spec("pytest") is None:
        missing.append(Missing("the package pytest", ("tests",)))
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: of a library that it loads
        missing.append(Missing(f"torch ({error})", everything))
    else:
        if device == "cuda" and not torch.cuda.is_available():
            why = "built without CUDA" if torch.version.cuda is None else "it sees none"
            missing.append(Missing(f"a GPU that torch can use ({why})", everything))
    return missing


def describe_machine() -> list[str]:
    """Lines that say what the results are of."""
    lines = [f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores"]
    try:
        import torch
    except (ImportError, OSError):
        pass  # it is missing, and told so
    else:
        lines[0] += f", torch {torch.__version__}"
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            names = {torch.cuda.get_device_name(index) for index in range(count)}
            lines[0] += f", {count} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
    for name in _ENVIRONMENT:
        lines.append(f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set")
    return lines


def _run_tests(folder: Path, junit: Path) -> Outcome:
    files = [file for file in sorted(folder.glob("test_*.py")) if "mark.cuda" in file.read_text()]
    if not files:
        return Outcome("tests", SKIPPED, f"no test that needs a GPU lies in {folder}")
    command = [
        *("-m", "pytest", "-m", "cuda", "-q", "-rs", "-p", "no:cacheprovider"),
        *("--continue-on-collection-errors", f"--junitxml={junit}", *map(str, files)),
    ]
    code, seconds, ending = _run("tests", command, folder.parent)
    if ending is None and code not in (0, 1, 2, 5):
        ending = f"pytest ended with status {code}"
    if not junit.exists():
        return Outcome("tests", FAILED, ending or "pytest left no report", seconds)
    outcome = read_junit(junit.read_text(), seconds)
    if ending is not None:
        text = f"{ending}; by then: {outcome.text}, with the one that was running"
        return outcome._replace(state=FAILED, text=text)
    return outcome


def _run_benchmark(part: str, device: str, steps: int, result: Path) -> Outcome:
    if part == "nccl":
        from .bench.gpu import nccl_refusal

        refusal = nccl_refusal(_RANKS)
        if refusal is not None:
            return Outcome(part, SKIPPED, refusal)
    limit_s = _TIMEOUT_S[part]
    module = (_MODULES[part],) if part in _MODULES else ("gpu", part)
    command = [
        *("-m", f"onecast.runtime.bench.{module[0]}", *module[1:]),
        *(f"--device={device}", f"--steps={steps}", f"--json={result}"),
        f"--timeout={limit_s - 20}",  # the ranks' stacks come before the end
    ]
    code, seconds, ending = _run(part, command, _ROOT)
    if ending is not None or code != 0 or not result.exists():
        return Outcome(part, FAILED, ending or f"it ended with status {code}", seconds)
    report: Any = json.loads(result.read_text())
    rows, ratios = (report["rows"], report["ratios"]) if part == "blocks" else (report, ())
    return Outcome(part, PASSED, f"{len(rows)} rows", seconds, rows=rows, ratios=ratios)


def _run(part: str, arguments: Sequence[str], folder: Path) -> tuple[int, float, str | None]:
    """Run Python so; its exit status, the seconds it took, and why it was ended if it was."""
    command = [sys.executable, "-P", *arguments]
    print(f"\n---- {part}: {' '.join(command)}", flush=True)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),  # it runs in another folder
        "PYTHONSAFEPATH": "1",  # for what it starts: a checkout has a folder called comm
        "OMP_NUM_THREADS": "1",
    }
    limit_s = _TIMEOUT_S[part]
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=limit_s)
        return code, time.monotonic() - start, None
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then reports what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_S)
        return -signal.SIGKILL, time.monotonic() - start, f"it did not end within {limit_s:g} s"
    finally:
        if process.poll() is None:  # its ranks end themselves when they see it gone
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
