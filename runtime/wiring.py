"""Wires telemetry into a run: the only module of the runtime that imports it.

Owns which settings of a run become telemetry settings, and the shared-memory directory that the
ranks of a node agree on. Everything else sees the `Observer` protocol.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from onecast.telemetry import (
    Session,
    TelemetrySettings,
    agree_on_run_dir,
    name_run_dir,
    remove_run_dir,
    start_session,
)

from .config import RankEnvironment, RunConfig
from .observer import NullObserver, Observer

_SIDECAR_END_S = 15.0  # a slow OTLP endpoint is given up before

name_run_directory = name_run_dir


def remove_run_directory(path: str) -> None:
    """Wait until the sidecar has written everything and removed `path`; else end both."""
    deadline = time.monotonic() + _SIDECAR_END_S
    # Without a ring in it the directory was never used: the run ended before telemetry began.
    while any(Path(path).glob("rank-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    if Path(path).exists():
        _kill_sidecar(path)
        remove_run_dir(path)


def _kill_sidecar(run_dir: str) -> None:
    """A sidecar that is stopped or stuck must not outlive its run."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if run_dir.encode() in arguments:
            os.kill(int(entry.name), signal.SIGKILL)


class RunTelemetry:
    """Records every collective inside its `with`; the first local rank starts the node's sidecar.

    Enter on every rank of the default group. ValueError: the metrics port is in use.
    `metrics_url` and `report` are None where there is nothing to ask: on other ranks than the
    first of a node, and without telemetry. `report` is there after the exit.
    """

    def __init__(self, config: RunConfig, environment: RankEnvironment) -> None:
        self._config = config
        self._environment = environment
        self._session: Session | None = None
        self.metrics_url: str | None = None
        self.report: dict[str, Any] | None = None

    def __enter__(self) -> Observer:
        config, environment = self._config, self._environment
        if config.no_telemetry:
            return NullObserver()
        self._session = start_session(
            rank=environment.rank,
            local_rank=environment.local_rank,
            world_size=environment.world_size,
            local_world_size=environment.local_world_size,
            engine_id=environment.run_id,
            # Not the launcher makes it: killed at that moment, it would leave it behind.
            run_dir=agree_on_run_dir(
                environment.local_rank, node=environment.node, path=environment.run_dir
            ),
            settings=TelemetrySettings.from_env(
                metrics_host=config.metrics_host,
                metrics_port=config.metrics_port,
                trace_file=None if config.trace is None else str(config.trace),
            ),
        )
        self.metrics_url = self._session.metrics_url
        return self._session

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._session is not None:
            # After an error other ranks may never leave: do not make them wait for us.
            self.report = self._session.close(wait=kind is None)
