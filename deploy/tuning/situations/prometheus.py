"""A real Prometheus on loopback, with the shipped rules, that scrapes runs while they last.

Owns the server's process and the questions it is asked. Knows nothing of what the series mean.
"""

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RULES = Path(__file__).parents[2] / "prometheus" / "rules.yml"
UNPACKED = Path(__file__).parents[3] / "build" / "tools" / "usr" / "bin"  # by `make tools`
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
EVALUATED_EVERY_S = 0.5


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def program() -> str:
    """The path of `prometheus`; ValueError where there is none."""
    found = shutil.which("prometheus") or shutil.which("prometheus", path=str(UNPACKED))
    if found is None:
        raise ValueError("prometheus is not here: `make tools` fetches Debian's package of it")
    return found


class Prometheus:
    """What a running server answers. Every series has the label `case` of its target."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._base}/-/ready", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False

    def last_seen(self, case: str) -> float | None:
        """When the run of this case was last scraped, in seconds since 1970; None: never."""
        found = self._ask(f'onecast_up{{case="{case}"}}[1h]', None)
        return max((float(one["values"][-1][0]) for one in found), default=None)

    def value(self, expression: str, case: str, at: float) -> float | None:
        """The largest value of `expression`, in which CASE stands for the case; None: no data."""
        found = self._ask(expression.replace("CASE", f'case="{case}"'), at)
        values = [float(one["value"][1]) for one in found]
        return max((value for value in values if not math.isnan(value)), default=None)

    def alert(self, name: str, case: str, at: float) -> tuple[str, float] | None:
        """Its state, `pending` while its `for` runs or `firing`, and for how many seconds of the
        run it was in it; None where nothing was wrong.
        """
        found = self._ask(f'count_over_time(ALERTS{{alertname="{name}", case="{case}"}}[1h])', at)
        states = {(one["metric"]["alertstate"], float(one["value"][1])) for one in found}
        # "firing" sorts before "pending"; of several ranks, the one that was in it longest.
        state, times = min(states, key=lambda one: (one[0], -one[1]), default=("", 0.0))
        return (state, times * EVALUATED_EVERY_S) if state else None

    def _ask(self, expression: str, at: float | None) -> list[dict[str, Any]]:
        asked = {"query": expression} | ({} if at is None else {"time": f"{at:.3f}"})
        query = urllib.parse.urlencode(asked)
        with urllib.request.urlopen(f"{self._base}/api/v1/query?{query}", timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, int]) -> Iterator[Prometheus]:
    """Scrapes 127.0.0.1 at the port of each case three times a second.

    ValueError where there is no Prometheus, or none that starts.
    """
    config = {
        "global": {
            "scrape_interval": "300ms",
            "scrape_timeout": "300ms",
            "evaluation_interval": f"{EVALUATED_EVERY_S * 1000:.0f}ms",
        },
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "onecast",
                "static_configs": [
                    {"targets": [f"127.0.0.1:{port}"], "labels": {"case": case}}
                    for case, port in targets.items()
                ],
            }
        ],
    }
    port, path, log = free_port(), folder / "prometheus.yml", folder / "prometheus.log"
    path.write_text(json.dumps(config))  # JSON is YAML
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                program(),
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        server, deadline = Prometheus(port), time.monotonic() + START_TIMEOUT_S
        while not server.ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"Prometheus did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
