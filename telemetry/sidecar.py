"""The sidecar: one process per node that reads the rings, so that no worker has to.

    python -c 'from onecast.telemetry.sidecar import main; main()' --run-dir D --local-world-size N
        --engine-id ID --settings JSON [--restarts N --in-a-row N --again-at-port P]

Owns its own life: it claims the directory, says who and where it is (`sidecar_record`), serves HTTP
and the ranks' questions, and ends a moment after the last rank has closed its ring or died, once
everything is written. Then it keeps what is worth a look after a bad end, and removes the run
directory. If it is killed, a rank starts the next one, which reads on where it was (`cursors`).

No signal but SIGKILL ends it earlier: what stops the ranks stops it too, a moment later.
"""

import argparse
import dataclasses
import errno
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cursors import Cursors, SidecarBusy
from .errors import TelemetryError
from .flight import sweep
from .http_server import TelemetryServer
from .node import Node
from .report_socket import ReportSocket
from .ring import process_start_time
from .run_directory import locked
from .run_end import keep, leave_nothing
from .settings import TelemetrySettings
from .sidecar_process import PortInUse
from .sidecar_record import SidecarRecord
from .tracing import Tracing

_logger = logging.getLogger(__name__)

# A rank that has not appeared by then, while all others have ended, never will.
_STRAGGLER_S = 5.0
# What died a moment ago is left alone by the first sweep.
_SWEEPS_S = (0.0, 10.0, 60.0)
# A killed process holds its port a moment longer than it is alive.
_DYING_S = 0.5
# Who waited for the final report of a sidecar that was killed finds the next one within this.
_FIRST_S = 0.25


def _make_node(options: argparse.Namespace, settings: TelemetrySettings, cursors: Cursors) -> Node:
    return Node(
        options.run_dir,
        engine_id=options.engine_id,
        local_world_size=options.local_world_size,
        tracing=Tracing(settings, options.engine_id),
        hang_s=settings.hang_s,
        cursors=cursors,
        restarts=options.restarts,
        worker_restarts=settings.worker_restarts,
    )


def _serve(settings: TelemetrySettings, again_at_port: int | None, node: Node) -> TelemetryServer:
    """Raises ValueError if the address cannot be had."""
    host, port = settings.metrics_host, settings.metrics_port
    assert port is not None
    if again_at_port is not None:
        port = 0
        deadline = time.monotonic() + _DYING_S
        while True:
            try:
                return TelemetryServer(host, again_at_port, node, settings.metrics_peers)
            except OSError as error:
                if time.monotonic() > deadline:
                    _logger.warning("port %d is gone (%s): metrics move", again_at_port, error)
                    break
            time.sleep(0.01)
    try:
        return TelemetryServer(host, port, node, settings.metrics_peers)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"metrics port {port} on {host} is already in use") from error
        raise ValueError(f"cannot listen on {host}, metrics port {port}: {error}") from error


def _say(message: dict[str, Any]) -> None:
    """One line to the starter, and no more; that it may be gone is no reason to stop."""
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        return
    finally:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


class Sidecar:
    """Raises ValueError for settings that cannot be, SidecarBusy if there is one already."""

    def __init__(self, options: argparse.Namespace, settings: TelemetrySettings) -> None:
        self._run_dir: str = options.run_dir
        self._settings = settings
        self._cursors = Cursors(options.run_dir, options.local_world_size)
        self._node = _make_node(options, settings, self._cursors)
        self._http: TelemetryServer | None = None
        if settings.metrics_port is not None:
            self._http = _serve(settings, options.again_at_port, self._node)
        self._reports = ReportSocket(options.run_dir, self._node.report)
        pid = os.getpid()
        start_time = process_start_time(pid)
        assert start_time is not None, "this process has no /proc entry"
        self.record = SidecarRecord(
            pid,
            start_time,
            started_ns=time.perf_counter_ns(),
            url=None if self._http is None else self._http.url,
            restarts=options.restarts,
            in_a_row=options.in_a_row,
        )
        self.record.write(options.run_dir)

    def run(self) -> None:
        """Live until the ranks have ended, then leave nothing of the run but what is worth it."""
        threading.Thread(target=self._sweep, name="sweep", daemon=True).start()
        begin_s = time.monotonic()
        ended_since: float | None = None
        while True:
            # Asked before the poll, so that the poll sees all that came before the end.
            ended, complete = self._node.ended, self._node.complete
            self._node.poll()
            ended_since = (ended_since or time.monotonic()) if ended else None
            late = ended_since is not None and time.monotonic() - ended_since > _STRAGGLER_S
            early = time.monotonic() - begin_s < _FIRST_S
            if ended and (complete or late) and not early and self._end():
                return
            time.sleep(self._settings.poll_interval_s)

    def _end(self) -> bool:
        """False if somebody is just joining: then it goes on."""
        try:
            with locked(self._run_dir, 0.0):
                self._node.poll()
                if not self._node.ended:
                    return False
                self._node.finish()
                self._leave()
        except FileNotFoundError:
            self._node.finish()  # somebody took the directory away: write what there is
        except TelemetryError:
            return False
        if self._http is not None:
            self._http.close()
        self._reports.finish(self._node.report())
        return True

    def _leave(self) -> None:
        if self._node.has_told_of_hangs and all(
            reader.closed for reader in self._node.readers.values()
        ):
            keep(self._run_dir, self._settings.flight_dir, "a collective had hung")
        leave_nothing(self._run_dir, self._settings.flight_dir)

    def _sweep(self) -> None:
        """Runs before this one, in the same place, that ended with everything killed at once."""
        place = Path(self._run_dir).parent
        for pause_s in _SWEEPS_S:
            time.sleep(pause_s)
            try:
                for path in sweep(self._settings.flight_dir, place):
                    _logger.warning(
                        "a former run was killed; its last events: onecast flight %s", path
                    )
            except OSError as error:
                _logger.warning("cannot keep what a former run left: %s", error)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="onecast.telemetry.sidecar")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--local-world-size", type=int, required=True)
    parser.add_argument("--engine-id", required=True)
    parser.add_argument("--settings", required=True, help="TelemetrySettings as JSON")
    parser.add_argument("--restarts", type=int, default=0, help="how often it has died so far")
    parser.add_argument("--in-a-row", type=int, default=0, help="of those, shortly before")
    parser.add_argument("--again-at-port", type=int, help="the port of the one that died")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="onecast telemetry: %(message)s", level=logging.WARNING)
    # The exporters log each retry; one line of ours says that spans are being dropped.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        sidecar = Sidecar(options, TelemetrySettings.from_json(options.settings))
    except SidecarBusy as error:
        _say({"error": str(error), "kind": "busy"})
        return 3
    except ValueError as error:
        kind = "port" if isinstance(error, PortInUse) else "settings"
        _say({"error": str(error), "kind": kind})
        return 2
    except (OSError, TelemetryError) as error:
        _say({"error": f"the telemetry sidecar cannot start: {error}", "kind": None})
        return 1
    _say({"ready": dataclasses.asdict(sidecar.record)})
    sidecar.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
