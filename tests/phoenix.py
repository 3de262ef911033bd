"""Arize Phoenix, an OTLP backend, in a virtual environment of its own. A helper, not a test."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REQUIREMENT = "arize-phoenix==20.26.1"
ENVIRONMENT = Path(__file__).parents[1] / "build" / "phoenix"  # kept between runs
_INSTALL_S, _START_S = 400, 120


@dataclass(frozen=True)
class Phoenix:
    http: str
    grpc: str

    def spans(self, project: str) -> list[dict[str, Any]]:
        """All spans of a project (the resource's `openinference.project.name`), page by page."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            try:
                page = self._get(f"/v1/projects/{project}/spans?limit=1000{cursor}")
            except urllib.error.HTTPError as error:
                if error.code == 404:  # nothing has arrived yet
                    return []
                raise
            found += page["data"]
            if page["next_cursor"] is None:
                return found
            cursor = f"&cursor={page['next_cursor']}"

    def _get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.http + path, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def install_phoenix() -> Path:
    """Its virtual environment; skips the test where it cannot be had."""
    stamp = ENVIRONMENT / REQUIREMENT
    ENVIRONMENT.parent.mkdir(exist_ok=True)
    with open(ENVIRONMENT.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists():
            return ENVIRONMENT
        commands = (
            [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)],
            [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", REQUIREMENT],
        )
        for command in commands:
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=_INSTALL_S)
            except (OSError, subprocess.SubprocessError) as error:
                output = getattr(error, "stderr", None) or b""
                lines = output.decode(errors="replace").strip().splitlines()
                pytest.skip(f"{REQUIREMENT} cannot be installed: {lines[-1] if lines else error}")
        stamp.touch()
    return ENVIRONMENT


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def phoenix(folder: Path) -> Iterator[Phoenix]:
    """Serves on loopback until the end; keeps what it has in `folder`."""
    http_port, grpc_port = _free_ports(2)
    environment = {
        **{name: text for name, text in os.environ.items() if not name.startswith("PYTHON")},
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(http_port),
        "PHOENIX_GRPC_PORT": str(grpc_port),
        "PHOENIX_WORKING_DIR": str(folder),
        "PHOENIX_TELEMETRY_ENABLED": "false",
        "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
    }
    served = Phoenix(f"http://127.0.0.1:{http_port}", f"http://127.0.0.1:{grpc_port}")
    log = folder / "phoenix.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(ENVIRONMENT / "bin" / "phoenix"), "serve"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_up(served, process, log)
        yield served
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(served: Phoenix, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(f"{served.http}/healthz", timeout=5):
                return
        except OSError as error:
            assert process.poll() is None, f"phoenix has ended\n{log.read_text()}"
            assert time.monotonic() < deadline, f"waited {_START_S} s for phoenix: {error}"
            time.sleep(0.2)
