"""Starts the ranks of a run on this host, waits for them, and says in one message how it ended.

Owns the use of torch's elastic launcher, and the end of it: nothing of a run stays, however often
it is asked to stop. Where nodes meet is in `nodes.py`, what is checked before in `preflight.py`,
who broke a run in `failure.py`. Knows nothing of what ranks do.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import ClassVar

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api as launcher_api
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .batch_file import count_complete, count_lines
from .config import LAUNCHER_PID_VARIABLE, RUN_DIR_VARIABLE, EngineConfig, RunConfig
from .failure import root_cause
from .nodes import Nodes
from .preflight import check, check_port
from .serve_config import ServeConfig
from .stop_signal import catches_stop_signal
from .wiring import name_run_directory, remove_run_directory, telemetry_settings

_WORKER = "onecast.runtime.worker"
_FAREWELL_S = 30.0  # for the other nodes' launchers to be done too; ranks of a run end together
_DRAIN_MARGIN_S = 15.0  # for answers on their way to clients, and for ranks to close
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(config: EngineConfig, nodes: Nodes | None = None) -> int:
    """Run this node's share of `config.tp` ranks to their end; by default that is all of them.

    Returns the exit status and prints why if it is not 0.
    """
    nodes = nodes or Nodes()
    local_ranks = nodes.ranks_per_node(config.tp)
    check(config, tp=config.tp, local_ranks=local_ranks, with_files=nodes.may_have_rank_0)
    if not config.no_telemetry:
        settings = telemetry_settings(config)
        if settings.metrics_port is not None:
            check_port(settings.metrics_host, settings.metrics_port)
            if isinstance(config, ServeConfig) and config.port == settings.metrics_port > 0:
                raise ValueError(f"--port, --metrics-port: both are {config.port}")
    if isinstance(config, ServeConfig) and nodes.may_have_rank_0:
        check_port(config.host, config.port, prefix="")
    run_directory = name_run_directory()
    log_directory = tempfile.mkdtemp(prefix="onecast-")
    os.environ[RUN_DIR_VARIABLE] = run_directory
    os.environ[LAUNCHER_PID_VARIABLE] = str(os.getpid())
    # As torchrun does, but a share of the cores instead of one: CPU ranks compute.
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_ranks)))
    # The agent's own report of a failure is a page long; ours is one sentence.
    _silence("torch.distributed.elastic")
    launcher = elastic_launch(
        LaunchConfig(
            nproc_per_node=local_ranks,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=log_directory),
            signals_to_handle="SIGQUIT",  # the others are `_handle_signals`'
            **nodes.rendezvous(config.join_timeout_s),
        ),
        sys.executable,
    )
    try:
        with _our_agent():
            return _run(config, nodes, launcher)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with _impatience() as hurry:
            _end_ranks()
            del os.environ[RUN_DIR_VARIABLE], os.environ[LAUNCHER_PID_VARIABLE]
            remove_run_directory(run_directory, hurry)
            shutil.rmtree(log_directory, ignore_errors=True)
        # All that is left is to end, and no further signal must change how: Python gives handlers
        # up before it has ended, but what is ignored stays so.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _silence(name: str) -> None:
    """A logger and those below it, of which each has a level of its own."""
    for known in list(logging.root.manager.loggerDict):
        if known == name or known.startswith(f"{name}."):
            logging.getLogger(known).setLevel(logging.CRITICAL)


class _Agent(LocalElasticAgent):
    """Says why it starts its ranks again: they may all be gone before one of them could."""

    asked_to_stop: ClassVar[bool] = False  # then nothing is started again
    _why: RunResult | None = None

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._why = super()._monitor_workers(worker_group)
        if self.asked_to_stop:
            self._remaining_restarts = 0
        return self._why

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if self._why is not None and self._why.failures:
            most = worker_group.spec.max_restarts
            count = most - self._remaining_restarts
            cause, _ = root_cause(self._why.failures)
            if "NodeLost: " not in cause:  # which the ranks have said
                print(f"onecast: {cause}; restart {count} of {most}", file=sys.stderr, flush=True)
        super()._restart_workers(worker_group)


@contextmanager
def _our_agent() -> Iterator[None]:
    """In here a launcher whose ranks are done waits `_FAREWELL_S` for those of the other nodes.

    By itself it waits five minutes for one that will not come, as its ranks failed at their very
    end, and `elastic_launch` passes no other time, and no other agent, on.
    """
    agent = launcher_api.LocalElasticAgent  # type: ignore[attr-defined]
    launcher_api.LocalElasticAgent = partial(  # type: ignore[attr-defined, assignment]
        _Agent, exit_barrier_timeout=_FAREWELL_S
    )
    try:
        yield
    finally:
        launcher_api.LocalElasticAgent = agent  # type: ignore[attr-defined]


def _handle_signals(drain_timeout_s: float | None) -> None:
    """SIGINT, SIGTERM and SIGHUP end a run: the first of them if `drain_timeout_s` is None.

    Else the first asks ranks that serve to come to an end, which the elastic launcher sees them do;
    a second one ends them, as does the first where some do not serve yet, and so do
    `drain_timeout_s` and a little more. To end ranks the elastic launcher asks them and waits: a
    further signal kills them, and breaks nothing.
    """
    asked: list[int] = []
    ends = False
    _Agent.asked_to_stop = False

    def arrived(number: int, frame: FrameType | None) -> None:
        nonlocal ends
        ranks = _ranks()
        if ends:
            _end_ranks()
        elif drain_timeout_s is None or asked or not _all_serve(ranks):
            ends = True
            name = signal.Signals(asked[0] if number == signal.SIGALRM else number)
            raise SignalException(f"Process {os.getpid()} got signal: {name}", sigval=name)
        else:
            asked.append(number)
            _Agent.asked_to_stop = True
            signal.setitimer(signal.ITIMER_REAL, drain_timeout_s + _DRAIN_MARGIN_S)
            for rank in ranks:
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(rank, signal.SIGTERM)

    for number in (*_SIGNALS, signal.SIGALRM):
        signal.signal(number, arrived)


def _run(config: EngineConfig, nodes: Nodes, launcher: elastic_launch) -> int:
    try:
        _handle_signals(config.drain_timeout_s if isinstance(config, ServeConfig) else None)
        launcher("-P", "-m", _WORKER, *config.to_argv())
        return 0
    except ChildFailedError as error:
        cause, resumable = root_cause(error.failures)
        print(f"onecast: {cause}{_progress(config) if resumable else ''}", file=sys.stderr)
        return 1 if resumable else 2
    except SignalException as stopped:
        name = signal.Signals(stopped.sigval).name
        print(f"onecast: stopped by {name}{_progress(config)}", file=sys.stderr)
        return 128 + stopped.sigval
    except (RendezvousError, DistError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        where = f" at {nodes.rdzv_endpoint}" if nodes.rdzv_endpoint else ""
        limit = f"--join-timeout-s {config.join_timeout_s:g}"
        print(
            f"onecast: the {nodes.nnodes} nodes did not meet{where} ({limit}): "
            f"{why.rstrip('.')}{_progress(config)}",
            file=sys.stderr,
        )
        return 1


@contextmanager
def _impatience() -> Iterator[Callable[[], bool]]:
    """Signals shorten what is done in here, and break nothing; gives whether one has come."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in _SIGNALS:
        signal.signal(number, note)
    yield lambda: bool(asked)


def _end_ranks() -> None:
    """Those that are still there: a second signal ends the elastic launcher while it ends them."""
    for rank in _ranks():
        with suppress(ProcessLookupError):  # it has ended
            os.kill(rank, signal.SIGKILL)


def _all_serve(ranks: list[int]) -> bool:
    return bool(ranks) and all(map(catches_stop_signal, ranks))


def _ranks() -> list[int]:
    """The processes of the ranks that are there."""
    found = []
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for child in children.read_text().split() if children.exists() else ():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if _WORKER.encode() in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                found.append(int(child))
    return found


def _progress(config: EngineConfig) -> str:
    if not isinstance(config, RunConfig) or not config.output.exists():
        return ""
    complete, lines = count_complete(config.output), count_lines(config.input)
    instead = " instead of --overwrite" if config.overwrite else ""
    return (
        f"; {complete} of {lines} results are complete in {config.output}, the same command with "
        f"--resume{instead} finishes the rest"
    )
