"""A run of the demo model under load, watched by a real Prometheus: what the pictures are of.

Owns the batch, the processes and their end. The same load goes over three ways of sending a step
one after the other, so that the boards show a difference: many broadcasts for a step, as before
onecast; one for its frame; and shared memory. Then a server gets more requests than it takes.
"""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRAPE_S = 1.0
CHANNELS = ("two-broadcasts", "process-group", "shared-memory")
_CLIENTS, _CLIENTS_S = 48, 20.0
_ROOT = Path(__file__).parents[2]
_MODEL = _ROOT / "runtime" / "demo" / "checkpoint"
_ENDS_S = 900.0
_ONECAST = (sys.executable, "-P", "-c", "from onecast.runtime.cli import main; main()")
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ONECAST_TRACE_ONE_IN": "50"}
_SYSTEM = "You are a scribe. Answer in the words of the old books, and be brief. " * 3
_ASKED = (
    "Who made the heaven and the earth?",
    "What did the king say unto his servants?",
    "Tell me of the flood.",
    "And it came to pass in those days that",
    "Where did they go when the morning was come?",
)


def prometheus_program() -> str:
    """The path of Prometheus: installed, or unpacked by `make tools`. SystemExit without one."""
    unpacked = str(_ROOT / "build" / "tools" / "usr" / "bin")
    found = shutil.which("prometheus") or shutil.which("prometheus", path=unpacked)
    if found is None:
        raise SystemExit("prometheus is not here: `make tools` fetches Debian's package")
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """Scrapes `target` with exemplars until the block ends; gives its address."""
    port = free_port()
    config = folder / "prometheus.yml"
    config.write_text(
        f"global: {{scrape_interval: {SCRAPE_S:g}s, scrape_timeout: {SCRAPE_S:g}s}}\n"
        "scrape_configs:\n"
        f"  - {{job_name: onecast, static_configs: [{{targets: [{json.dumps(target)}]}}]}}\n"
    )
    options = (
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    )
    with (folder / "prometheus.log").open("wb") as log:
        server = subprocess.Popen([prometheus_program(), *options], stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_ready(f"{address}/-/ready", server)
        while not getter(address)("query", query="up")["result"]:  # it takes seconds to begin
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _wait_until_ready(url: str, server: "subprocess.Popen[bytes]", timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"nothing answers at {url}") from None
            time.sleep(0.1)


def getter(address: str) -> Any:
    """`data` of an answer of Prometheus' API, by path and parameters."""

    def get(path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{address}/api/v1/{path}?{query}", timeout=60) as answer:
            return json.load(answer)["data"]

    return get


def lived(get: Any, began_s: float, ended_s: float, tp: int) -> tuple[float, float]:
    """The first and the last moment at which all ranks are known to have worked."""
    working = f"sum(onecast_up) == {tp} and sum(onecast_sequences{{state='running'}}) > 0"
    times = {"start": str(began_s), "end": str(ended_s), "step": str(SCRAPE_S)}
    (found,) = get("query_range", query=working, **times)["result"]
    return float(found["values"][0][0]), float(found["values"][-1][0])


def write_batch(path: Path, requests: int, seed: int) -> Path:
    """Short and long prompts, some with a common beginning, some asking for several answers."""
    draw = random.Random(seed)
    with path.open("w") as lines:
        for number in range(requests):
            asked = draw.choice(_ASKED)
            prompt = (_SYSTEM if draw.random() < 0.5 else "") + asked * draw.choice((1, 1, 2, 9))
            body = {
                "model": "demo",
                "prompt": prompt,
                "max_tokens": draw.choice((8, 16, 32, 64, 96)),
                "n": draw.choice((1, 1, 1, 2)),
                "temperature": 0.8,
            }
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions"}
            lines.write(json.dumps({**line, "body": body}) + "\n")
    return path


def run(folder: Path, port: int, requests: int, tp: int) -> tuple[float, float]:
    """The load, once per way of sending a step, and the server; when all this began and ended, by
    time.time()."""
    began = time.time()
    for number, channel in enumerate(CHANNELS):
        batch = write_batch(folder / f"{channel}.jsonl", requests, seed=number)
        options = {
            "--model": _MODEL,
            "--input": batch,
            "--output": folder / f"{channel}.out.jsonl",
            "--tp": tp,
            "--channel": channel,
            "--metrics-port": port,
            "--trace": folder / f"{channel}.trace.json",
            "--num-blocks": 80,
            "--num-host-blocks": 160,
            "--max-batch-size": 24,
        }
        subprocess.run(
            [*_ONECAST, "generate", *(f"{name}={value}" for name, value in options.items())],
            env=_ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=_ENDS_S,
            cwd=folder,
        )
    _serve(folder, port, tp)
    return began, time.time()


def _serve(folder: Path, port: int, tp: int) -> None:
    """A server with a short queue, and more clients than it takes, each as fast as it can."""
    options = {
        "--model": _MODEL,
        "--tp": tp,
        "--port": 0,
        "--served-model-name": "demo",
        "--metrics-port": port,
        "--num-blocks": 80,
        "--max-batch-size": 24,
        "--max-queue": 12,
    }
    server = subprocess.Popen(
        [*_ONECAST, "serve", *(f"{name}={value}" for name, value in options.items())],
        env=_ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    assert server.stdout is not None
    try:
        said = server.stdout.readline()
        found = re.search(r" at (http://\S+) ", said)
        if found is None:
            raise SystemExit(f"the server does not serve: {said!r}")
        ends_s = time.monotonic() + _CLIENTS_S
        clients = [
            threading.Thread(target=_ask, args=(f"{found[1]}/v1/completions", ends_s, number))
            for number in range(_CLIENTS)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    finally:
        server.terminate()
        server.wait(60)


def _ask(url: str, ends_s: float, seed: int) -> None:
    draw = random.Random(seed)
    while time.monotonic() < ends_s:
        body = {
            "model": "demo",
            "prompt": draw.choice(_ASKED) * draw.choice((1, 1, 2, 9)),
            "max_tokens": draw.choice((8, 16, 32, 64, 96)),
        }
        try:
            urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60).read()
        except urllib.error.HTTPError as error:
            error.close()
            time.sleep(0.5)  # turned away: it should wait for longer, and does not
