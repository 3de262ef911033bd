"""One rank's telemetry, from start to close: its ring, the interception, and the node's sidecar.

Owns what the runtime holds in its hands: `step`, `phase`, `probe`, `set_value`. Refuses to know
the runtime; works in any torch.distributed program. Nothing here reads what was recorded.
"""

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from .intercept import CollectiveInstrumentor
from .probe import RingProbe
from .ring import DISCARDED, OK, PHASE, STEP_KIND, RingWriter, pack_meta
from .run_directory import agree_on_run_dir, make_run_dir, remove_run_dir, ring_path
from .settings import TelemetrySettings
from .sidecar_process import SidecarProcess
from .values import VALUE_INDEX, VALUES

_logger = logging.getLogger(__name__)


class _Phase:
    """A reusable context: one object per name, so that entering it allocates nothing."""

    __slots__ = ("_begin", "_end", "_fail", "_meta", "_tickets")

    def __init__(self, ring: RingWriter, name: str) -> None:
        self._begin: Callable[[int, int, int], int] = ring.begin
        self._end: Callable[..., None] = ring.end
        self._fail = ring.fail
        self._meta = pack_meta(PHASE, ring.intern(name))
        self._tickets: list[int] = []  # a stack: a phase may hold another of its name

    def __enter__(self) -> None:
        self._tickets.append(self._begin(self._meta, 0, 0))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ticket = self._tickets.pop()
        if error is None:
            self._end(ticket)
        else:
            self._fail(ticket, error)


class _Step:
    """The reusable context of a step; steps do not nest."""

    __slots__ = ("_instrumentor", "_meta", "_ring", "_status", "_ticket", "batch_size", "step")

    def __init__(self, ring: RingWriter, instrumentor: CollectiveInstrumentor) -> None:
        self._ring = ring
        self._instrumentor = instrumentor
        self._meta = pack_meta(STEP_KIND)
        self._ticket = -1
        self._status = OK
        self.step = -1
        self.batch_size = 0

    def __enter__(self) -> Self:
        self._status = OK
        self._ring.set_step(self.step)
        self._ticket = self._ring.begin(self._meta, self.step, self.batch_size)
        return self

    def set_batch_size(self, num_sequences: int) -> None:
        """For a rank that learns it only inside the step."""
        self._ring.set_nbytes(self._ticket, num_sequences)

    def discard(self) -> None:
        """No step after all (the wait for one ended with the run): no trace, no duration."""
        self._ring.discard_step(self._ticket)
        self._status = DISCARDED

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._ring.end(self._ticket, self._status)
        else:
            self._ring.fail(self._ticket, error)
        self._ring.set_step(-1)
        self._instrumentor.sample_coverage()


class Session:
    """What `start_session` returns. Use it from one thread; collectives may come from any."""

    def __init__(
        self,
        ring: RingWriter,
        sidecar: SidecarProcess | None,
        run_dir: str,
        settings: TelemetrySettings,
    ) -> None:
        self.run_dir = run_dir
        self.probe = RingProbe(ring)
        self._settings = settings
        self._ring = ring
        self._sidecar = sidecar
        self._phases: dict[str, _Phase] = {}
        self._instrumentor = CollectiveInstrumentor()
        self._instrumentor.instrument(ring)
        self._step = _Step(ring, self._instrumentor)
        self._closed = False
        self._last_report: dict[str, Any] | None = None

    @property
    def metrics_url(self) -> str | None:
        """Where Prometheus reads; None on all but local rank 0, and where HTTP is off."""
        return self._sidecar.metrics_url if self._sidecar is not None else None

    def step(self, step: int, batch_size: int = 0) -> _Step:
        """`with session.step(n, size):` all that is recorded inside carries step n (>= 0)."""
        scope = self._step
        scope.step = step
        scope.batch_size = batch_size
        return scope

    def phase(self, name: str) -> _Phase:
        """`with session.phase("model.forward"):` a part of a step; name it with a constant."""
        scope = self._phases.get(name)
        if scope is None:
            scope = self._phases[name] = _Phase(self._ring, name)
        return scope

    def channel_probe(self, channel: str) -> RingProbe:
        """A probe of its own label, for programs with more than one channel."""
        return RingProbe(self._ring, channel)

    def set_value(self, name: str, value: int) -> None:
        """Publish a number; `values.VALUES` lists the names. Totals are given as running sums."""
        index = VALUE_INDEX.get(name)
        if index is None:
            names = ", ".join(known.name for known in VALUES)
            raise ValueError(f"{name!r} is no telemetry value; the names are {names}")
        self._ring.set_value(index, value)

    def report(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """What the sidecar has counted so far, this node's ranks together.

        {"collectives": [{"op", "group", "rank", "count", "p50_s", "p99_s", "bytes"}, ...],
        "phases": [{"phase", "rank", "count", "p50_s", "p99_s"}, ...], "steps": n, "trace_file":
        path or None, "dropped": n, ...}. After close(): the last report. Raises TelemetryError
        where there is no sidecar to ask (only local rank 0 has it) or it does not answer in time.
        """
        if self._last_report is not None:
            return self._last_report
        return _require(self._sidecar).report(timeout_s)

    def close(self, *, wait: bool = True) -> dict[str, Any] | None:
        """Stop recording. Local rank 0 waits, within limits, until the sidecar has written all.

        Returns the final report there, and None elsewhere, if the sidecar is gone, or without
        `wait`: after an error, when other ranks may never close, the sidecar ends with the last
        of them by itself.
        """
        if self._closed:
            return self._last_report
        self._closed = True
        self._instrumentor.sample_coverage()
        self._instrumentor.uninstrument()
        self._ring.close()
        if self._sidecar is not None:
            if wait:
                self._last_report = self._sidecar.join(self._settings.close_timeout_s)
            else:
                self._sidecar.abandon()
            if self._sidecar.dead:  # it removes the directory itself, if it lives to do so
                remove_run_dir(self.run_dir)
        return self._last_report

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _require(sidecar: SidecarProcess | None) -> SidecarProcess:
    from .errors import TelemetryError

    if sidecar is None:
        raise TelemetryError("only local rank 0 has the sidecar: ask for the report there")
    return sidecar


def start_session(
    *,
    rank: int,
    local_rank: int,
    world_size: int,
    local_world_size: int,
    engine_id: str,
    settings: TelemetrySettings,
    run_dir: str | None = None,
) -> Session:
    """Start recording in this process; on local rank 0 also the node's sidecar.

    Without `run_dir` the ranks agree on one, by a collective call of the default group; where
    there is none, call `make_run_dir()` once per node and tell the other ranks. Raises ValueError
    for settings that cannot be (a metrics port in use among them), TelemetryError if the ring or
    the sidecar cannot be had.
    """
    if not 0 <= local_rank < local_world_size <= world_size or not 0 <= rank < world_size:
        raise ValueError(
            f"rank {rank} of {world_size}, local rank {local_rank} of {local_world_size}: "
            "ranks count from 0 and stay below their world size"
        )
    if run_dir is None:
        run_dir = make_run_dir() if local_world_size == 1 else agree_on_run_dir(local_rank)
    sidecar = None
    try:
        ring = RingWriter(
            ring_path(run_dir, rank),
            capacity=settings.ring_records,
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            local_world_size=local_world_size,
            engine_id=engine_id,
        )
        if local_rank == 0:
            sidecar = SidecarProcess(run_dir, local_world_size, engine_id, settings)
    except BaseException:
        if local_rank == 0:
            remove_run_dir(run_dir)
        raise
    return Session(ring, sidecar, run_dir, settings)
