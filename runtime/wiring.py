"""Wires telemetry into a run: the only module of the runtime that imports it.

Owns which settings of a run become telemetry settings, and the end of the shared-memory directory
that the ranks of a node meet in. Everything else sees the `Observer` protocol.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecast.telemetry import (
    Session,
    TelemetrySettings,
    name_run_dir,
    start_session,
)
from onecast.telemetry.run_end import leave_if_last

from .config import EngineConfig, RankEnvironment
from .observer import NullObserver, Observer
from .preflight import check_port

_SIDECAR_END_S = 15.0  # a slow OTLP endpoint is given up before
_NAME_CHARS = 64  # of the run's name, in what trace ids come from

name_run_directory = name_run_dir


def remove_run_directory(path: str, hurry: Callable[[], bool] = lambda: False) -> None:
    """Wait until the sidecar has written everything and removed `path`; else end both.

    `hurry` says that there is no time for it any more.
    """
    deadline = time.monotonic() + _SIDECAR_END_S
    while Path(path).exists() and _sidecars(path) and time.monotonic() < deadline and not hurry():
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


def trace_path(path: Path, node: int) -> Path:
    """Each node writes its own ranks' spans: nodes may share the folder, and must not the file."""
    return path if node == 0 else path.with_name(f"{path.stem}.node{node}{path.suffix}")


def telemetry_settings(config: EngineConfig, node: int = 0) -> TelemetrySettings:
    """What the environment says (`onecast.telemetry.environment`), and the options on top.

    ValueError names the variable, or the setting, that cannot be.
    """
    options = {
        "metrics_host": config.metrics_host,
        "metrics_port": config.metrics_port,
        "trace_file": None if config.trace is None else str(trace_path(config.trace, node)),
    }
    given = {name: value for name, value in options.items() if value is not None}
    return TelemetrySettings.from_env(None, **given)


class RunTelemetry:
    """Records every collective inside its `with`; whoever comes first starts the node's sidecar.

    Enter on every rank of the default group. ValueError: the metrics port is in use. Where nothing
    can be recorded, a warning says why and the run goes on. `metrics_url` is None then, and without
    telemetry; `report`, there after the exit, also on other ranks than the first of a node.

    `attempt` is of these ranks alone, and the same on all: a run whose ranks are started again, or
    another under the same name, has traces of its own.
    """

    def __init__(self, config: EngineConfig, environment: RankEnvironment, attempt: str) -> None:
        self._config = config
        self._environment = environment
        self._engine_id = _engine_id(environment.run_id, attempt)
        self._session: Session | None = None
        self.metrics_url: str | None = None
        self.report: dict[str, Any] | None = None

    def __enter__(self) -> Observer:
        config, environment = self._config, self._environment
        if config.no_telemetry:
            return NullObserver()
        settings = telemetry_settings(config, environment.node)
        again = environment.restart_count > 0
        if again and settings.metrics_port:
            _await_port(settings.metrics_host, settings.metrics_port)
        self._session = start_session(
            rank=environment.rank,
            local_rank=environment.local_rank,
            world_size=environment.world_size,
            local_world_size=environment.local_world_size,
            engine_id=self._engine_id,
            # The launcher names it but does not make it: killed at that moment, it would leave it
            # behind. Under torchrun alone, and when the sidecar of an earlier attempt may still be
            # there, ranks agree on one.
            run_dir=None if again else environment.run_dir,
            node=environment.node,
            settings=settings,
        )
        self.metrics_url = self._session.metrics_url
        return self._session

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._session is not None:
            # After an error other ranks may never leave: do not make them wait for us.
            self.report = self._session.close(wait=kind is None)


def _engine_id(run_id: str, attempt: str) -> str:
    name = run_id[:_NAME_CHARS] if run_id not in ("", "none") else "onecast"
    return f"{name}-{attempt}"


def _await_port(host: str, port: int) -> None:
    """The sidecar of the attempt before may need a moment to let go; in vain, the new one says so.

    It ends by itself once its ranks have.
    """
    deadline = time.monotonic() + _SIDECAR_END_S
    while time.monotonic() < deadline:
        try:
            return check_port(host, port)
        except ValueError:
            time.sleep(0.05)
