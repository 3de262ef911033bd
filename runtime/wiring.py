"""Wires telemetry into a run: the only module of the runtime that imports it.

Owns which settings of a run become telemetry settings, and the end of the shared-memory directory
that the ranks of a node meet in. Everything else sees the `Observer` protocol.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from onecast.telemetry import (
    Session,
    TelemetrySettings,
    name_run_dir,
    start_session,
)
from onecast.telemetry.run_end import leave_if_last

from .config import RankEnvironment, RunConfig
from .observer import NullObserver, Observer

_SIDECAR_END_S = 15.0  # a slow OTLP endpoint is given up before

name_run_directory = name_run_dir


def remove_run_directory(path: str) -> None:
    """Wait until the sidecar has written everything and removed `path`; else end both."""
    deadline = time.monotonic() + _SIDECAR_END_S
    while Path(path).exists() and _sidecars(path) and time.monotonic() < deadline:
        time.sleep(0.05)
    if Path(path).exists():
        for pid in _sidecars(path):  # one that is stopped or stuck must not outlive its run
            os.kill(pid, signal.SIGKILL)
        leave_if_last(path, TelemetrySettings.from_env().flight_dir)


def _sidecars(run_dir: str) -> list[int]:
    """Also of one that has not come so far as to say who it is."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if run_dir.encode() in arguments:
            found.append(int(entry.name))
    return found


def telemetry_settings(config: RunConfig) -> TelemetrySettings:
    """What the environment says (`onecast.telemetry.environment`), and the options on top.

    ValueError names the variable, or the setting, that cannot be.
    """
    options = {
        "metrics_host": config.metrics_host,
        "metrics_port": config.metrics_port,
        "trace_file": None if config.trace is None else str(config.trace),
    }
    given = {name: value for name, value in options.items() if value is not None}
    return TelemetrySettings.from_env(None, **given)


class RunTelemetry:
    """Records every collective inside its `with`; whoever comes first starts the node's sidecar.

    Enter on every rank of the default group. ValueError: the metrics port is in use. Where nothing
    can be recorded, a warning says why and the run goes on. `metrics_url` is None then, and without
    telemetry; `report`, there after the exit, also on other ranks than the first of a node.
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
            # The launcher names it but does not make it: killed at that moment, it would leave it
            # behind. Under torchrun alone ranks agree on one.
            run_dir=environment.run_dir,
            node=environment.node,
            settings=telemetry_settings(config),
        )
        self.metrics_url = self._session.metrics_url
        return self._session

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._session is not None:
            # After an error other ranks may never leave: do not make them wait for us.
            self.report = self._session.close(wait=kind is None)
