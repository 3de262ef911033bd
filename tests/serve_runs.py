"""Runs `onecast serve` as a user does, and asks it by plain HTTP. A helper of the tests."""

import http.client
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cli_runs import DEMO, finish, rank_processes, start

for _library in ("starlette", "uvicorn"):
    pytest.importorskip(_library, reason=f"{_library}, which `onecast serve` needs, is missing")

_LINE = re.compile(r"onecast: serving (\S+) at (http://\S+) \(\d+ ranks?\)")


@dataclass
class Serving:
    """A server that takes requests."""

    process: subprocess.Popen[str]
    url: str

    @property
    def ranks(self) -> dict[int, int]:
        return rank_processes(self.process.pid)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Ask it to end: exit status, what else it said on standard output, standard error."""
        os.kill(self.process.pid, number)
        return finish(self.process)


def wait_until_serving(process: subprocess.Popen[str]) -> str:
    """Its address, from the line that says it takes requests."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := _LINE.match(line):
            return match[2]
    raise AssertionError(f"it never served: {finish(process)}")


@contextmanager
def serving(
    *args: object, tp: int = 2, model: Path = DEMO, env: dict[str, str] | None = None
) -> Iterator[Serving]:
    """`onecast serve`; what still runs at the end is ended in order."""
    process = start(
        "serve",
        f"--model={model}",
        f"--tp={tp}",
        "--port=0",
        "--served-model-name=demo",
        "--num-blocks=256",
        *args,
        env=env,
    )
    try:
        yield Serving(process, wait_until_serving(process))
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            finish(process)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]  # names in lower case
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """Of a stream: its objects, without the end mark, which must be there."""
        lines = [line.removeprefix("data: ") for line in self.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]", lines[-3:]
        return [json.loads(line) for line in lines[:-1]]


def connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    assert parts.hostname is not None
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)


def ask(url: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None) -> Answer:
    """GET without a body, else POST; bytes go as they are."""
    connection = connect(url)
    try:
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if raw is None else "POST", path, raw, headers or {})
        response = connection.getresponse()
        text = response.read().decode()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, text)
    finally:
        connection.close()


def completion_body(prompt: str = "In the beginning", **more: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
