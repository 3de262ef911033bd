"""Starts the ranks of a run on this host, waits for them, and says in one message how it ended.

Owns what can be checked before any process starts, the use of torch's elastic launcher, and the
sentence that names a lost rank. Knows nothing of what ranks do.
"""

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import uuid

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .batch_file import count_complete, count_lines
from .config import RUN_DIR_VARIABLE, RunConfig, several_ranks_per_gpu
from .model_config import ModelConfig
from .tokenizer import Tokenizer
from .weights import check_checkpoint
from .wiring import make_run_directory, remove_run_directory

INTERRUPTED = 130


def check(config: RunConfig) -> None:
    """Refuse a run that cannot work, before any process starts.

    ValueError names the value and the limit: model directory, checkpoint, tokenizer, input,
    output, number of GPUs, metrics port.
    """
    model = ModelConfig.from_dir(config.model)
    model.check_tensor_parallel(config.tp)
    check_checkpoint(config.model, model)
    Tokenizer(config.model)
    config.context_limit(model.max_position_embeddings)
    count_lines(config.input)
    _check_gpus(config)
    if not config.no_telemetry:
        _check_port(config.metrics_host, config.metrics_port)


def launch(config: RunConfig) -> int:
    """Run `config.tp` ranks to their end; returns the exit status and prints why if it is not 0."""
    check(config)
    run_directory = make_run_directory()
    log_directory = tempfile.mkdtemp(prefix="onecast-")
    os.environ[RUN_DIR_VARIABLE] = run_directory
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
        print(f"onecast: {_describe(error)}{_progress(config)}", file=sys.stderr)
        return 1
    except SignalException as stopped:
        name = signal.Signals(stopped.sigval).name
        print(f"onecast: stopped by {name}{_progress(config)}", file=sys.stderr)
        return 128 + stopped.sigval
    finally:
        del os.environ[RUN_DIR_VARIABLE]
        remove_run_directory(run_directory)
        shutil.rmtree(log_directory)


def _describe(error: ChildFailedError) -> str:
    """The root cause in one sentence."""
    rank, failure = min(error.failures.items(), key=_suspicion)
    if failure.exitcode < 0:
        return f"rank {rank} (pid {failure.pid}) was killed by {failure.signal_name()}"
    return _message(rank, failure)


def _suspicion(item: tuple[int, ProcessFailure]) -> tuple[int, int, int]:
    """Killed before failed before ended by SIGTERM: its peers only noticed a killed rank's death,
    and it was the agent that ended those which were still there."""
    rank, failure = item
    if failure.exitcode == -signal.SIGTERM:
        return 2, failure.timestamp, rank
    return int(failure.exitcode >= 0), failure.timestamp, rank


def _message(rank: int, failure: ProcessFailure) -> str:
    # What the worker's error handler wrote, or the agent's own words where it wrote nothing.
    text = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    kind, separator, reason = text.partition(": ")
    if separator and kind == "ValueError":
        return reason  # bad input: the same on every rank
    return f"rank {rank} (pid {failure.pid}) failed: {text}"


def _progress(config: RunConfig) -> str:
    if not config.output.exists():
        return ""
    complete, lines = count_complete(config.output), count_lines(config.input)
    return (
        f"; {complete} of {lines} results are complete in {config.output}, the same command with "
        "--resume finishes the rest"
    )


def _check_gpus(config: RunConfig) -> None:
    if config.device != "cuda":
        return
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError("--device cuda: this machine has no GPU that torch can use")
    if count < config.tp and not several_ranks_per_gpu():
        raise ValueError(f"--tp: {config.tp} ranks need {config.tp} GPUs; this machine has {count}")


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"--metrics-port: cannot listen on {host}:{port}: {error.strerror}"
            ) from None
