"""One rank's telemetry, from start to close: its ring, the interception, and the node's sidecar.

Owns what the runtime holds in its hands: `step`, `phase`, `probe`, `collectives`, `requests`,
`set_value`, `record`. Refuses to know the runtime; works in any torch.distributed program. Nothing
here reads what was recorded. How a rank comes into the run directory is in `joining`.
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .current import automatic_session, closed, opened
from .errors import TelemetryError
from .explicit import ExplicitCollectives
from .gpu_recording import open_gpu_recording
from .intercept import CollectiveInstrumentor, Recorder
from .joining import join
from .probe import RingProbe
from .requests import RequestRecorder
from .ring import RingWriter
from .run_directory import agree_on_run_dir, make_run_dir
from .run_end import leave_if_last
from .scopes import PhaseScope, StepScope
from .settings import TelemetrySettings
from .sidecar_watch import SidecarWatch
from .unrecorded import null_ring, tell_once
from .values import VALUE_INDEX, VALUES

_logger = logging.getLogger(__name__)

_GPU_TIMEOUT_S = 2.0  # for what still runs there when the session is closed
_COVERAGE_S = 0.1  # between two looks at what went by unrecorded; close takes the last one


class Session:
    """What `start_session` returns. Use it from one thread; collectives may come from any.

    In a forked child it records nothing, and `close` closes nothing: it is the parent's.
    """

    def __init__(
        self,
        ring: RingWriter,
        watch: SidecarWatch | None,
        run_dir: str | None,
        settings: TelemetrySettings,
        local_rank: int,
        recorder: Callable[[RingWriter], Recorder] | None = None,
    ) -> None:
        """`watch` None: nothing is recorded, and `ring` is one that keeps nothing."""
        self.run_dir = run_dir
        self.probe = RingProbe(ring)
        self.requests = RequestRecorder(ring)
        # What ends the steps of others: called once, by the first `step` or by `close`.
        self.own_step: Callable[[], None] | None = None
        self._settings = settings
        self._ring = ring
        self._watch = watch
        self._local_rank = local_rank
        self._phases: dict[str, PhaseScope] = {}
        self._explicit = ExplicitCollectives(ring)
        self._instrumentor = CollectiveInstrumentor()
        self._gpu = None if watch is None else open_gpu_recording(ring)
        self._step = StepScope(ring, self._after_step())
        self._pid = os.getpid()
        self._closed = False
        self._last_report: dict[str, Any] | None = None
        if watch is not None:
            self._instrumentor.instrument(
                ring if recorder is None else recorder(ring),
                None if self._gpu is None else self._gpu.timer,
                None if self._gpu is None else self._gpu.captures,
            )
            opened(self)
        # A probe for `onecast.comm.open_all_reduce`; None where nothing is recorded.
        self.collectives = self._instrumentor.other_ways()

    def _after_step(self) -> Callable[[], None]:
        sample = partial(self._instrumentor.sample_coverage, _COVERAGE_S)
        if self._gpu is None:
            return sample
        resolve = self._gpu.resolve

        def sample_and_resolve() -> None:
            sample()
            resolve()

        return sample_and_resolve

    @property
    def recording(self) -> bool:
        """Whether what happens in this process is written down."""
        return self._watch is not None and not self._closed and os.getpid() == self._pid

    @property
    def metrics_url(self) -> str | None:
        """Where Prometheus reads this node; None where HTTP is off, or there is no sidecar."""
        record = None if self._watch is None else self._watch.record
        return None if record is None else record.url

    @property
    def num_records(self) -> int:
        """How many records this rank has begun."""
        return self._ring.head

    def step(self, step: int, batch_size: int = 0) -> StepScope:
        """`with session.step(n, size):` all that is recorded inside carries step n (>= 0)."""
        self._end_steps_of_others()
        scope = self._step
        scope.step = step
        scope.batch_size = batch_size
        return scope

    def _end_steps_of_others(self) -> None:
        if self.own_step is not None:
            end_them, self.own_step = self.own_step, None
            end_them()

    def phase(self, name: str) -> PhaseScope:
        """`with session.phase("model.forward"):` a part of a step; name it with a constant."""
        scope = self._phases.get(name)
        if scope is None:
            scope = self._phases[name] = PhaseScope(self._ring, name)
        return scope

    def record(
        self,
        op: str,
        begin_ns: int,
        end_ns: int | None = None,
        nbytes: int = 0,
        *,
        group: str = "own",
        group_size: int = 1,
        dtype: str = "uint8",
    ) -> None:
        """A collective that bypassed torch.distributed; a microsecond.

        Times are perf_counter_ns, the end by default now. Ranks of `group`, a name of the whole
        run, must record alike and in the same order, as they must with any collective ("send" and
        "recv" excepted); `nbytes` is the payload, `dtype` named as torch does.
        """
        self._explicit.record(
            op, begin_ns, end_ns, nbytes, group=group, group_size=group_size, dtype=dtype
        )

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

    def sample_coverage(self) -> None:
        """Publish how many collectives went by unrecorded; each step's end does it by itself."""
        self._instrumentor.sample_coverage()

    def report(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """What the sidecar has counted so far, this node's ranks together.

        {"collectives": [{"op", "group", "rank", "count", "p50_s", "p99_s", "bytes"}, ...],
        "phases": [{"phase", "rank", "count", "p50_s", "p99_s"}, ...], "steps": n, "trace_file":
        path or None, "dropped": n, ...}. After close(): the last report. Raises TelemetryError
        where there is no sidecar to ask or it does not answer in time.
        """
        if self._last_report is not None:
            return self._last_report
        if self._watch is None:
            raise TelemetryError("nothing is recorded: there is no telemetry sidecar to ask")
        return self._watch.report(timeout_s)

    def close(self, *, wait: bool = True) -> dict[str, Any] | None:
        """Stop recording. Local rank 0 waits, within limits, until the sidecar has written all.

        Returns the final report there, and None elsewhere, if the sidecar is gone, or without
        `wait`: after an error, when other ranks may never close, the sidecar ends with the last
        of them by itself.
        """
        if self._closed:
            return self._last_report
        self._end_steps_of_others()
        self._closed = True
        closed(self)
        if os.getpid() != self._pid:
            return None  # what is patched writes to nobody here; its locks may be held for ever
        if self._watch is not None:
            self._instrumentor.uninstrument()
            if self._gpu is not None:
                self._gpu.close(_GPU_TIMEOUT_S if wait else 0)
            wait_s = self._settings.close_timeout_s if wait and self._local_rank == 0 else None
            self._last_report = self._watch.close(self._ring.close, wait_s)
            if self.run_dir is not None and not self._watch.alive:
                leave_if_last(self.run_dir, self._settings.flight_dir)
        return self._last_report

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def start_session(
    *,
    rank: int,
    local_rank: int,
    world_size: int,
    local_world_size: int,
    engine_id: str,
    settings: TelemetrySettings,
    run_dir: str | None = None,
    node: object = None,
    recorder: Callable[[RingWriter], Recorder] | None = None,
    any_port: bool = False,
) -> Session:
    """Start recording in this process; the first rank of a node that comes starts its sidecar.

    Without `run_dir` the ranks agree on one, by a collective call of the default group; `node`
    tells their nodes apart (None: by host name). Where there is no group, give all ranks of a node
    the same new path (`name_run_dir`), or what `shared_run_dir` makes of a key they have in common.

    Raises ValueError for settings that cannot be (a metrics port in use among them; with `any_port`
    it is a warning, and another port is taken). Where there is no room for a ring, or the
    sidecar does not start, the program is more important: one warning says so, and the session
    records nothing (`Session.recording`).

    `recorder` makes what the interception records to, and hands on to the ring it is given.

    In a program that is recorded without its doing (`opentelemetry-instrument`, `onecast telemetry
    run`) this is the session that does so, with the settings of the environment.
    """
    if not 0 <= local_rank < local_world_size <= world_size or not 0 <= rank < world_size:
        raise ValueError(
            f"rank {rank} of {world_size}, local rank {local_rank} of {local_world_size}: "
            "ranks count from 0 and stay below their world size"
        )
    if (already := automatic_session()) is not None:
        _logger.warning("this program is recorded already: settings come from the environment")
        return already
    try:
        if run_dir is None:
            alone = local_world_size == 1
            run_dir = make_run_dir() if alone else agree_on_run_dir(local_rank, node=node)
        watch = SidecarWatch(run_dir, local_world_size, engine_id, settings, any_port=any_port)

        def make_ring(path: Path) -> RingWriter:
            return RingWriter(
                path,
                capacity=settings.ring_records,
                rank=rank,
                local_rank=local_rank,
                world_size=world_size,
                local_world_size=local_world_size,
                engine_id=engine_id,
            )

        ring = join(run_dir, rank, settings, make_ring, watch)
    except (OSError, TelemetryError) as error:
        tell_once(run_dir, rank, local_rank, error)
        return Session(null_ring(), None, None, settings, local_rank)
    return Session(ring, watch, run_dir, settings, local_rank, recorder)
