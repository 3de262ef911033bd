"""Runs of `onecast generate` on the shipped checkpoint, as a user starts them, and their ranks.

Owns the processes and finds them; what a run means is for the situations. A run that fails is a
RuntimeError with what it said.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKPOINT = Path(__file__).parents[3] / "runtime" / "demo" / "checkpoint"
ONECAST = Path(sys.executable).with_name("onecast")
RUN_TIMEOUT_S = 300.0
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that is over: what it took from start to end, and what it printed."""

    wall_s: float
    output: str
    status: int


def generate(
    batch: Path,
    folder: Path,
    *,
    port: int,
    trace: Path,
    options: Sequence[str],
    meanwhile: Callable[[int], None] | None = None,
) -> Ended:
    """Answer `batch` with two ranks on the CPU, one thread each, metrics at `port`.

    `meanwhile` is called with the launcher's pid as soon as it runs.
    """
    command = [
        str(ONECAST),
        "generate",
        f"--model={CHECKPOINT}",
        f"--input={batch}",
        f"--output={folder / 'out.jsonl'}",
        "--overwrite",
        "--tp=2",
        f"--metrics-port={port}",
        f"--trace={trace}",
        *options,
    ]
    # With every step as a trace, and one thread a rank: two runs differ in the options alone.
    variables = {"OMP_NUM_THREADS": "1", "ONECAST_TRACE_ONE_IN": "1", "PYTHONSAFEPATH": "1"}
    return run(command, folder, variables, meanwhile)


def run(
    command: Sequence[str],
    folder: Path,
    variables: dict[str, str],
    meanwhile: Callable[[int], None] | None = None,
    *,
    may_fail: bool = False,
) -> Ended:
    """Run a command to its end. RuntimeError when it fails, unless it may, or takes too long."""
    started, log = time.monotonic(), folder / "run.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if meanwhile is not None:
                meanwhile(process.pid)
            status = process.wait(RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command[0]} ran for {RUN_TIMEOUT_S:.0f} s") from None
        finally:
            if process.poll() is None:
                _end(process)
    ended = Ended(time.monotonic() - started, log.read_text(errors="replace"), status)
    if status and not may_fail:
        raise RuntimeError(f"{' '.join(command)} ended with {status}:\n{ended.output[-3000:]}")
    return ended


def _end(process: subprocess.Popen[bytes]) -> None:
    """It ends its ranks by itself when it is asked to; all of its session where it does not."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def await_ranks(launcher: int, ranks: int = 2) -> dict[int, int]:
    """Rank -> pid of the workers that `launcher` starts, once all are there."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        found = _ranks_of(launcher)
        if len(found) == ranks:
            return found
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(found)} of {ranks} ranks after {START_TIMEOUT_S:.0f} s")
        time.sleep(0.02)


def await_port(port: int) -> None:
    """Until somebody listens there on loopback: a run serves its metrics before its first step."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody at port {port} after {START_TIMEOUT_S:.0f} s") from None
            time.sleep(0.02)


def _ranks_of(launcher: int) -> dict[int, int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    found = {}
    for child in children.read_text().split() if children.exists() else ():
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        for variable in environment:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(child)
    return found


def pin(pid: int, cpu: int) -> None:
    """Let all threads of a process, and those it will start, run on one CPU only."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {cpu})
