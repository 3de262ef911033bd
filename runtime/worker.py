"""One rank of a run: the process that torchrun starts.

Owns its beginning and its end: arguments, the roles of driver and follower, exit status. What
ranks are made of is in `rank.py`, what they do in `generate.py` (rank 0) and `executor.py` (all).

    torchrun --nproc-per-node 2 -m onecast.runtime.worker --model DIR --input FILE --output FILE
"""

import argparse
import ctypes
import os
import signal
import sys
import traceback

from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from .config import RankEnvironment, RunConfig, add_run_options, rank_environment, run_config
from .generate import generate
from .neighbours import Door, Neighbours, NodeLost
from .preflight import check
from .rank import open_rank, process_groups
from .roll_call import Roll, RollCall
from .summary import RunFigures, print_summary
from .wiring import RunTelemetry

_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    """Run this rank until the work is done; the exit status is 0 only then."""
    parser = argparse.ArgumentParser(
        prog="python -m onecast.runtime.worker",
        description="One tensor-parallel rank of `onecast generate`, to be started by torchrun.",
    )
    add_run_options(parser)
    options = parser.parse_args(argv)
    errors = get_error_handler()  # tells the elastic agent why, for its one message
    errors.initialize()
    environment: RankEnvironment | None = None
    try:
        environment = rank_environment()
        if environment.launcher_pid is not None:
            _die_with(environment.launcher_pid)
        run(run_config(options), environment)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        errors.record_exception(error)
        _explain(error, environment)
        return 1
    return 0


def _explain(error: Exception, environment: RankEnvironment | None) -> None:
    if environment is None:
        print(f"onecast: {error}", file=sys.stderr)
    elif environment.launched_by_onecast:
        # Its launcher says how a run ended, once for all ranks, and is silent about a restart.
        count, most = environment.restart_count, environment.max_restarts
        if count < most:
            text = f"rank {environment.rank}: {type(error).__name__}: {error}"
            print(f"onecast: {text}; restart {count + 1} of {most}", file=sys.stderr)
    elif isinstance(error, ValueError):
        # Bad input is the same on every rank: one of a node says it, in one line.
        if environment.local_rank == 0:
            print(f"onecast: {error}", file=sys.stderr)
    elif isinstance(error, NodeLost):
        print(f"onecast: rank {environment.rank}: {error}", file=sys.stderr)
    else:
        traceback.print_exc()


def run(config: RunConfig, environment: RankEnvironment) -> None:
    """Set this rank up, drive (rank 0) or follow, take everything down, say what was measured."""
    if config.tp not in (1, environment.world_size):
        raise ValueError(f"--tp: {config.tp}, but torchrun started {environment.world_size} ranks")
    if environment.restart_count:
        config = config.resumed()
    call = RollCall(environment, timeout_s=config.join_timeout_s)
    with call.refuses():
        if not environment.launched_by_onecast:  # else the launcher has done it
            check(
                config,
                environment.world_size,
                environment.local_world_size,
                with_files=environment.node == 0,
            )
        door = Door(environment)
    roll = call.answer(door.address)
    neighbours = Neighbours(roll.addresses, environment.rank)
    try:
        _work(config, environment, roll)
    except Exception as error:
        lost = None if isinstance(error, ValueError) else neighbours.lost()
        if lost is None:
            raise
        raise NodeLost(f"{lost} ({type(error).__name__}: {error})") from error
    finally:
        door.close()


def _work(config: RunConfig, environment: RankEnvironment, roll: Roll) -> None:
    figures: RunFigures | None = None
    with process_groups(config, environment, roll) as (device, model_group, control_group):
        telemetry = RunTelemetry(config, environment, roll.call)
        with (
            telemetry as observer,
            open_rank(config, environment, device, model_group, control_group, observer) as rank,
        ):
            if environment.rank == 0:
                figures = generate(config, rank)
            else:
                rank.executor.follow(rank.channel)
    if figures is not None:
        figures.metrics_url = telemetry.metrics_url
        figures.report = telemetry.report
        print_summary(figures, Console())


def _die_with(launcher_pid: int) -> None:
    """Ask the kernel to end this process when the launcher dies, even by SIGKILL."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher_pid:  # it died before the kernel was asked
        sys.exit(1)


if __name__ == "__main__":
    status = main()
    if status:
        # Process groups whose peers are gone abort or hang in their destructors, and would hide
        # the reason that has just been given.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
