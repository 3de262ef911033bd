"""The parts of `onecast gpu-check`: what each runs, how long it may take, what became of it.

Owns the processes that they run in and their budgets. All of them end within eight minutes: each
has a budget, and what those before it have left of theirs. A part that runs out of time is ended,
and keeps what it had found by then. Knows nothing of tables and of what is measured; needs no more
than the standard library.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .gpu_report import FAILED, OUT_OF_TIME, PASSED, SKIPPED, Outcome, read_junit

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = 465.0  # of eight minutes, all budgets together
GRACE_S = 10.0  # of a budget: for a part that is told to end
STACKS_S = 15.0  # of a budget: ranks that hang tell where, before the part is told to end
TESTS = "tests"
# Repeats onecast.runtime.bench.gpu_part, which would bring torch along; a test holds them equal.
HUNG_STATUS = 4


class Part(NamedTuple):
    """A process of its own; `budget_s` with all that it takes to end it."""

    budget_s: float
    module: tuple[str, ...] = ()  # in onecast.runtime.bench, and its argument
    needs: tuple[str, ...] = ()  # packages beside those that all need


PARTS = {
    "host": Part(40.0, ("gpu", "host")),
    "nccl": Part(70.0, ("gpu", "nccl")),
    "copies": Part(25.0, ("gpu", "copies")),
    "telemetry": Part(50.0, ("telemetry_gpu",)),
    "profiler": Part(45.0, ("gpu_profiler",)),
    "blocks": Part(45.0, ("blocks_gpu",)),
    "e2e": Part(90.0, ("e2e_gpu",), ("tokenizers", "safetensors")),
    TESTS: Part(100.0, needs=("pytest",)),
}
NEEDED = ("numpy", "msgspec")  # by all of them, beside torch


class Ended(NamedTuple):
    """How a process came to its end."""

    code: int
    seconds: float
    in_time: bool


def limit_of(name: str, chosen: Sequence[str], left_s: float) -> float:
    """Seconds for a part of those chosen when so many are left: all but the others' budgets."""
    later = chosen[chosen.index(name) + 1 :]
    return max(PARTS[name].budget_s, left_s - sum(PARTS[one].budget_s for one in later))


def run_tests(folder: Path, junit: Path, budget_s: float) -> Outcome:
    """All tests in `folder` that need a GPU; `junit`: where pytest's own report goes."""
    files = [file for file in sorted(folder.glob("test_*.py")) if "mark.cuda" in file.read_text()]
    if not files:
        return Outcome(TESTS, SKIPPED, f"no test that needs a GPU lies in {folder}")
    command = [
        *("-m", "pytest", "-m", "cuda", "-q", "-rs", "-p", "no:cacheprovider"),
        *("--continue-on-collection-errors", f"--junitxml={junit}", *_side_by_side()),
        *map(str, files),
    ]
    ended = _run(TESTS, command, folder.parent, budget_s)
    if not junit.exists():
        why = f"pytest left no report and ended with status {ended.code}"
        text = _late(budget_s) if not ended.in_time else why
        return Outcome(TESTS, FAILED if ended.in_time else OUT_OF_TIME, text, ended.seconds)
    outcome = read_junit(junit.read_text(), ended.seconds)
    if not ended.in_time:
        text = f"{_late(budget_s)}; by then: {outcome.text}, with those that were running"
        return outcome._replace(state=FAILED if outcome.failed else OUT_OF_TIME, text=text)
    if ended.code not in (0, 1, 2, 5):
        text = f"pytest ended with status {ended.code}; by then: {outcome.text}"
        return outcome._replace(state=FAILED, text=text)
    return outcome


def _side_by_side() -> Sequence[str]:
    """Most of a test is the start of its ranks: several at once where that can be, on one GPU."""
    workers = min(4, len(os.sched_getaffinity(0)) // 4)
    if workers < 2 or importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(workers))


def run_benchmark(name: str, device: str, steps: int, result: Path, budget_s: float) -> Outcome:
    """`result`: where the part leaves what it has found, whenever it has found something."""
    module, *argument = PARTS[name].module
    command = [
        *("-m", f"onecast.runtime.bench.{module}", *argument),
        *(f"--device={device}", f"--steps={steps}", f"--json={result}"),
        f"--timeout={budget_s - GRACE_S - STACKS_S:.0f}",
    ]
    ended = _run(name, command, ROOT, budget_s)
    found: dict[str, Any] = {"rows": [], "ratios": [], "skipped": [], "reports": []}
    if result.exists():
        found = json.loads(result.read_text())
    rows, skipped = found["rows"], tuple(found.pop("skipped"))
    text = f"{len(rows)} rows"
    if not ended.in_time or ended.code == HUNG_STATUS:
        state, text = OUT_OF_TIME, f"{_late(budget_s)}; by then: {text}"
    elif ended.code != 0 or not result.exists():
        state, text = FAILED, f"it ended with status {ended.code}; by then: {text}"
    elif rows:
        state = PASSED
    else:
        state, text = SKIPPED, "; ".join(skipped)
    return Outcome(name, state, text, ended.seconds, skipped=skipped, **found)


def _late(budget_s: float) -> str:
    return f"it did not end within {budget_s:.0f} s"


def _run(name: str, arguments: Sequence[str], folder: Path, budget_s: float) -> Ended:
    """Run Python so, and end it in time."""
    command = [sys.executable, "-P", *arguments]
    print(f"\n---- {name}, at most {budget_s:.0f} s: {' '.join(command)}", flush=True)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),  # it runs in another folder
        "PYTHONSAFEPATH": "1",  # for what it starts: a checkout has a folder called comm
        "OMP_NUM_THREADS": "1",
    }
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=max(budget_s - GRACE_S, 0.1))
        return Ended(code, time.monotonic() - start, True)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest and its workers then report what they have
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
        return Ended(-signal.SIGKILL, time.monotonic() - start, False)
    finally:
        if process.poll() is None:  # its ranks end themselves when they see it gone
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
