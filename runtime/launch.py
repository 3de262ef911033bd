"""Starts the ranks of a run on this host, waits for them, and says in one message how it ended.

Owns the use of torch's elastic launcher. What is checked before is in `preflight.py`, who broke a
run in `failure.py`. Knows nothing of what ranks do.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .batch_file import count_complete, count_lines
from .config import LAUNCHER_PID_VARIABLE, RUN_DIR_VARIABLE, RunConfig
from .failure import root_cause
from .preflight import check, check_port
from .wiring import name_run_directory, remove_run_directory, telemetry_settings


def launch(config: RunConfig) -> int:
    """Run `config.tp` ranks to their end; returns the exit status and prints why if it is not 0."""
    check(config, tp=config.tp, local_ranks=config.tp)
    if not config.no_telemetry:
        settings = telemetry_settings(config)
        if settings.metrics_port is not None:
            check_port(settings.metrics_host, settings.metrics_port)
    run_directory = name_run_directory()
    log_directory = tempfile.mkdtemp(prefix="onecast-")
    os.environ[RUN_DIR_VARIABLE] = run_directory
    os.environ[LAUNCHER_PID_VARIABLE] = str(os.getpid())
    # As torchrun does, but a share of the cores instead of one: CPU ranks compute.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // config.tp)))
    # The agent's own report of a failure is a page long; ours is one sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    launcher = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=config.tp,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=log_directory),
        ),
        sys.executable,
    )
    try:
        launcher("-P", "-m", "onecast.runtime.worker", *config.to_argv())
        return 0
    except ChildFailedError as error:
        cause, resumable = root_cause(error.failures)
        print(f"onecast: {cause}{_progress(config) if resumable else ''}", file=sys.stderr)
        return 1 if resumable else 2
    except SignalException as stopped:
        name = signal.Signals(stopped.sigval).name
        print(f"onecast: stopped by {name}{_progress(config)}", file=sys.stderr)
        return 128 + stopped.sigval
    finally:
        del os.environ[RUN_DIR_VARIABLE], os.environ[LAUNCHER_PID_VARIABLE]
        remove_run_directory(run_directory)
        shutil.rmtree(log_directory)


def _progress(config: RunConfig) -> str:
    if not config.output.exists():
        return ""
    complete, lines = count_complete(config.output), count_lines(config.input)
    instead = " instead of --overwrite" if config.overwrite else ""
    return (
        f"; {complete} of {lines} results are complete in {config.output}, the same command with "
        f"--resume{instead} finishes the rest"
    )
