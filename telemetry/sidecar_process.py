"""The sidecar as its starter sees it: a child with two pipes.

Owns starting it, asking it and waiting for it. Knows nothing of what it computes.

    child -> parent, one JSON object a line:  {"ready": true, "port": 9464}  or
                                              {"error": text, "kind": "ValueError"}
                                              {"report": {...}}    one per request
                                              {"final": {...}}     the last line
    parent -> child, one word a line:         report
"""

import json
import logging
import os
import select
import subprocess
import sys
import time
from typing import Any

from .errors import TelemetryError
from .settings import TelemetrySettings

_logger = logging.getLogger(__name__)


class SidecarProcess:
    """Starts the sidecar and waits until it is ready.

    Raises ValueError if the settings cannot be (port in use), TelemetryError if it fails to start.
    """

    def __init__(
        self, run_dir: str, local_world_size: int, engine_id: str, settings: TelemetrySettings
    ) -> None:
        self.metrics_url: str | None = None
        self._buffer = b""
        command = [
            sys.executable, "-P", "-m", "onecast.telemetry.sidecar",
            "--run-dir", run_dir,
            "--local-world-size", str(local_world_size),
            "--engine-id", engine_id,
            "--settings", settings.to_json(),
        ]  # fmt: skip
        # A session of its own: Ctrl-C at the terminal ends the ranks, and the sidecar writes
        # down what they did, and then ends because they have.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        try:
            answer = self._read_line(settings.start_timeout_s, "start")
            if "error" in answer:
                kind = ValueError if answer.get("kind") == "ValueError" else TelemetryError
                raise kind(answer["error"])
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._close_pipes()
            raise
        if answer["port"] is not None:
            host = settings.metrics_host
            host = f"[{host}]" if ":" in host else host
            self.metrics_url = f"http://{host}:{answer['port']}/metrics"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def dead(self) -> bool:
        return self._process.poll() is not None

    def report(self, timeout_s: float) -> dict[str, Any]:
        """Ask for a report; TelemetryError if the sidecar is gone or silent."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"report\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise TelemetryError(f"the telemetry sidecar (pid {self.pid}) has ended") from error
        answer = self._read_line(timeout_s, "report")
        report = answer.get("report", answer.get("final"))
        assert isinstance(report, dict)
        return report

    def join(self, timeout_s: float) -> dict[str, Any] | None:
        """Wait until it has written everything and left; its final report, or None.

        It is never killed: one that is late (another rank has not closed) ends by itself.
        """
        deadline = time.monotonic() + timeout_s
        final: dict[str, Any] | None = None
        try:
            while final is None:
                remaining = max(0.0, deadline - time.monotonic())
                final = self._read_line(remaining, "finish").get("final")
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except (TelemetryError, subprocess.TimeoutExpired) as error:
            _logger.warning("telemetry may be incomplete: %s", error)
        finally:
            self._close_pipes()
        return final

    def abandon(self) -> None:
        """Let it finish by itself, unobserved."""
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # it was gone before it read our last word

    def _read_line(self, timeout_s: float, purpose: str) -> dict[str, Any]:
        """The next line; TelemetryError names what was waited for."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            remaining = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([descriptor], [], [], remaining)
            if not ready:
                raise TelemetryError(
                    f"the telemetry sidecar (pid {self.pid}) did not {purpose} "
                    f"within {timeout_s:.1f} s"
                )
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise TelemetryError(
                    f"the telemetry sidecar (pid {self.pid}) ended with status "
                    f"{self._process.wait(5)} before it could {purpose}"
                )
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer
