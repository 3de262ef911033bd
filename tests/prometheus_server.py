"""A real Prometheus on loopback, with the shipped rules; and promtool."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

DEPLOY = Path(__file__).parent.parent / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
_UNPACKED = Path(__file__).parent.parent / "build" / "tools" / "usr" / "bin"


def tool(name: str) -> str:
    """The path of prometheus or promtool; skips the test where there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(_UNPACKED))
    if found is None:
        pytest.skip(f"{name} is not here: `make tools` fetches Debian's package prometheus")
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Prometheus:
    """The API of a running server."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of /api/v1."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._base}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Values by labels, without those that Prometheus puts on every series."""
        extra = ("__name__", "instance", "job")
        return {
            tuple(sorted((k, v) for k, v in one["metric"].items() if k not in extra)): float(
                one["value"][1]
            )
            for one in self.get("query", query=expression)["result"]
        }

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._base}/-/ready", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """The first truthy answer of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
    return found


@contextmanager
def prometheus(folder: Path, target: str, *, discovers: bool = False) -> Iterator[Prometheus]:
    """Scrapes `target` five times a second and keeps exemplars.

    `discovers`: it scrapes not `target`, but what the target's /sd names.
    """
    program, port = tool("prometheus"), free_port()
    config = folder / "prometheus.yml"
    found = (
        f"http_sd_configs: [{{url: http://{target}/sd, refresh_interval: 1s}}]"
        if discovers
        else f"static_configs: [{{targets: [{json.dumps(target)}]}}]"
    )
    config.write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 500ms}\n"
        f"rule_files: [{json.dumps(str(RULES))}]\n"
        "scrape_configs:\n"
        f"  - {{job_name: onecast, {found}}}\n"
    )
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        server = Prometheus(port)
        wait_for(lambda: server.ready() or process.poll() is not None, "Prometheus is ready")
        assert process.poll() is None, log.read_text()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
