"""Runs the `onecast` command as a user does. A helper of the tests, not a test."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "runtime" / "demo" / "checkpoint"
ONECAST = Path(sys.executable).with_name("onecast")


def completion(custom_id: str, prompt: str = "And the king said", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, **body},
    }


def write_batch(path: Path, lines: Iterable[Mapping[str, Any] | str]) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    """Every line of the output, whole and in order."""
    text = path.read_text()
    assert not text or text.endswith("\n"), "half a line at the end"
    return [json.loads(line) for line in text.splitlines()]


def start(*args: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(ONECAST), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str, str]:
    """Exit status, standard output, standard error. A run that hangs is ended and fails."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        ranks = rank_processes(process.pid)
        for pid in [*ranks.values(), process.pid]:
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"hung for {timeout_s} s\n{out}\n{err}") from None
    return process.returncode, out, err


def run(*args: object, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    return finish(start(*args, env=env))


def generate_args(batch: Path, output: Path, *more: object, tp: int = 2) -> list[object]:
    model = () if any(str(arg).startswith("--model") for arg in more) else (f"--model={DEMO}",)
    return ["generate", *model, f"--input={batch}", f"--output={output}", f"--tp={tp}", *more]


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def rank_processes(launcher: int) -> dict[int, int]:
    """Rank -> pid of the workers that `launcher` has started so far."""
    found = {}
    for pid, arguments, environment in _processes():
        if b"onecast.runtime.worker" not in arguments or parent_of(pid) != launcher:
            continue
        for variable in environment.split(b"\0"):
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = pid
    return found


def wait_for(condition: Any, what: str, timeout_s: float = 60) -> Any:
    """The first true value of `condition()`; AssertionError naming `what` when time is up."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)
    return value


SESSION = f"ONECAST_TEST_SESSION={uuid.uuid4().hex}"  # in the environment of all we start


def _processes() -> Iterator[tuple[int, bytes, bytes]]:
    """Pid, command line and environment of every process that can be read."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments, environment = (
                    (entry / name).read_bytes() for name in ("cmdline", "environ")
                )
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            yield int(entry.name), arguments, environment


def stray_segments() -> set[str]:
    """Run directories in shared memory that no living process was told of."""
    found = {str(path) for path in Path("/dev/shm").glob("onecast-*")}
    for _, arguments, environment in _processes() if found else ():
        found = {path for path in found if path.encode() not in arguments + environment}
    return found


def onecast_processes() -> set[int]:
    """Ranks and sidecars that this test session has started, and that still live."""
    return {
        pid
        for pid, arguments, environment in _processes()
        if SESSION.encode() in environment
        and (b"onecast.runtime.worker" in arguments or b"onecast.telemetry" in arguments)
    }
