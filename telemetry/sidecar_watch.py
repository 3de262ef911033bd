"""One rank's view of its node's sidecar: find it or start it, and start it again when it dies.

Owns who starts it (whoever holds the directory's lock and finds none alive), the thread that sleeps
until the sidecar is gone, and the limit: MAX_IN_A_ROW restarts without a minute of life in between,
then it is given up, and the ranks record on into their rings. Knows neither rings nor reports.

The thread sleeps in the kernel on a pidfd: until the sidecar dies it takes no GIL and no core.
"""

import dataclasses
import logging
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cursors import SidecarBusy
from .errors import TelemetryError
from .report_socket import Question
from .run_directory import locked
from .settings import TelemetrySettings
from .sidecar_process import PortInUse, start_sidecar
from .sidecar_record import SidecarRecord

_logger = logging.getLogger(__name__)
MAX_IN_A_ROW = 5
_LONG_LIFE_NS = 60_000_000_000
_RETRY_S = 0.02


class SidecarWatch:
    """Call `join` once, with the directory's lock held, and `close` at the end."""

    def __init__(
        self,
        run_dir: str,
        local_world_size: int,
        engine_id: str,
        settings: TelemetrySettings,
        *,
        any_port: bool = False,
    ) -> None:
        """`any_port`: a port in use is a warning, and another one is taken."""
        self._run_dir = run_dir
        self._whose = run_dir, local_world_size, engine_id
        self._settings = settings
        self._any_port = any_port
        self._record: SidecarRecord | None = None
        self._process: subprocess.Popen[bytes] | None = None  # if this rank has started it
        self._leaving = False
        self._thread: threading.Thread | None = None

    def join(self) -> None:
        """Find the sidecar or start it.

        Raises ValueError for settings that cannot be, TelemetryError if it fails to start.
        """
        record = SidecarRecord.read(self._run_dir)
        if record is None:
            self._start()
        elif record.alive or record.given_up:
            self._record = record
        elif not self._restart(record):
            return
        self._thread = threading.Thread(target=self._watch, name="onecast sidecar", daemon=True)
        self._thread.start()

    @property
    def record(self) -> SidecarRecord | None:
        """The sidecar as this rank last knew it; None if it is given up, or there never was one."""
        record = self._record
        return None if record is None or record.given_up else record

    @property
    def alive(self) -> bool:
        return self._record is not None and self._record.alive

    def report(self, timeout_s: float) -> dict[str, Any]:
        """Ask for a report; TelemetryError if there is no sidecar, or none answers in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = Question(self._run_dir, "report").answer(deadline)
                if answer is not None:
                    return answer
            except TimeoutError:
                raise TelemetryError(
                    f"{self._name()} did not report within {timeout_s:.1f} s"
                ) from None
            except OSError:
                answer = None  # not listening: it has ended, or is being started again
            if self.record is None or not Path(self._run_dir).exists():
                raise TelemetryError(f"{self._name()} has ended")
            if time.monotonic() > deadline:
                raise TelemetryError(f"{self._name()} has not come back within {timeout_s:.1f} s")
            time.sleep(_RETRY_S)

    def close(self, close_ring: Callable[[], None], wait_s: float | None) -> dict[str, Any] | None:
        """Close the ring, and never start the sidecar again.

        With `wait_s` wait so long for what it says when it has written everything; None, with a
        warning that says why, if it does not. It is never killed: one that is late (another rank
        has not closed) ends by itself.
        """
        try:
            if wait_s is None:
                close_ring()
                return None
            # Asked before: the sidecar answers for certain those who asked while a ring was open.
            question = self._ask_final()
            close_ring()
            return self._final(question, wait_s)
        finally:
            self._leaving = True  # the thread stays: it is the sidecar's parent that must reap it

    def _ask_final(self) -> Question | None:
        try:
            return Question(self._run_dir, "final")
        except OSError:
            return None

    def _final(self, question: Question | None, timeout_s: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + timeout_s
        why = f"{self._name()} did not finish within {timeout_s:.1f} s"
        while time.monotonic() < deadline:
            if question is not None:
                try:
                    answer = question.answer(deadline)
                except TimeoutError:
                    break
                if answer is not None:
                    if self._thread is not None:  # it is about to end; its starter reaps it
                        self._thread.join(max(0.1, deadline - time.monotonic()))
                    return answer
            if self.record is None or not Path(self._run_dir).exists():
                why = f"{self._name()} ended before it could say what it has written"
                break
            time.sleep(_RETRY_S)
            question = self._ask_final()
        _logger.warning("telemetry may be incomplete: %s", why)
        return None

    def _name(self) -> str:
        pid = "" if self._record is None else f" (pid {self._record.pid})"
        return f"the telemetry sidecar{pid}"

    def _start(self, after: SidecarRecord | None = None) -> None:
        """`after`: the record of the one that died, its counts raised."""
        try:
            try:
                started = start_sidecar(*self._whose, self._settings, after)
            except PortInUse as error:
                if not self._any_port:
                    raise
                _logger.warning("%s: metrics are at another port", error)
                self._settings = dataclasses.replace(self._settings, metrics_port=0)
                started = start_sidecar(*self._whose, self._settings, after)
            self._process, self._record = started
        except SidecarBusy:
            # Started by a rank that died before it let the lock go.
            self._record = self._wait_for_record()

    def _wait_for_record(self) -> SidecarRecord:
        deadline = time.monotonic() + self._settings.start_timeout_s
        while time.monotonic() < deadline:
            record = SidecarRecord.read(self._run_dir)
            if record is not None and record.alive:
                return record
            time.sleep(_RETRY_S)
        raise TelemetryError(
            f"another process is the telemetry sidecar of {self._run_dir}, but it has not said "
            f"who within {self._settings.start_timeout_s:.1f} s"
        )

    def _restart(self, dead: SidecarRecord) -> bool:
        """With the lock held. False: it is given up."""
        lived_ns = time.perf_counter_ns() - dead.started_ns
        next_one = dataclasses.replace(
            dead,
            restarts=dead.restarts + 1,
            in_a_row=dead.in_a_row + 1 if lived_ns < _LONG_LIFE_NS else 1,
        )
        reason = "it was ended"
        while next_one.in_a_row <= MAX_IN_A_ROW:
            try:
                self._start(next_one)
            except (OSError, TelemetryError, ValueError) as error:
                reason = str(error)
                next_one = dataclasses.replace(
                    next_one, restarts=next_one.restarts + 1, in_a_row=next_one.in_a_row + 1
                )
                continue
            _logger.warning(
                "the telemetry sidecar (pid %d) died and was started again (%d in a row)",
                dead.pid,
                next_one.in_a_row,
            )
            return True
        self._record = dataclasses.replace(dead, given_up=True)
        self._record.write(self._run_dir)
        _logger.warning(
            "the telemetry sidecar died %d times in a row (the last time: %s) and is given up: "
            "no more metrics and traces; the run goes on, and its ranks record on into %s",
            next_one.in_a_row,
            reason,
            self._run_dir,
        )
        return False

    def _watch(self) -> None:
        while self._record is not None:
            self._sleep_while_it_lives(self._record)
            if self._leaving:
                return
            try:
                with locked(self._run_dir, self._settings.start_timeout_s * MAX_IN_A_ROW):
                    record = SidecarRecord.read(self._run_dir)
                    if record is None or record.given_up:
                        self._record = record
                        return
                    if record.alive:  # another rank was faster
                        self._record = record
                    elif not self._restart(record):
                        return
            except FileNotFoundError:
                return  # it had done its work, and took the directory along
            except (OSError, TelemetryError) as error:
                self._record = None
                _logger.warning("the telemetry sidecar died and is not started again: %s", error)
                return

    def _sleep_while_it_lives(self, record: SidecarRecord) -> None:
        try:
            descriptor = os.pidfd_open(record.pid)
        except ProcessLookupError:
            return
        except OSError as error:  # old kernels and some sandboxes have no pidfd
            _logger.info("should the telemetry sidecar die, this rank will not notice: %s", error)
            self._leaving = True
            return
        try:
            if record.alive:  # else the pid is another process by now
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                poll.poll()
        finally:
            os.close(descriptor)
        if self._process is not None:
            self._process.wait()
            self._process = None
