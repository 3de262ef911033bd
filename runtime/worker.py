"""One rank of a run: the process that torchrun starts.

Owns its beginning and its end: arguments, the roles of driver and follower, exit status. What
ranks are made of is in `rank.py`, what they do in `generate.py` and `serve.py` (rank 0) and in
`executor.py` (all).

    torchrun --nproc-per-node 2 -m onecast.runtime.worker --model DIR --input FILE --output FILE
    torchrun --nproc-per-node 2 -m onecast.runtime.worker --serve --model DIR
"""

import argparse
import ctypes
import os
import signal
import sys
import traceback
from contextlib import nullcontext

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # What follows takes seconds, and Ctrl-C in them would show where it was: `main` takes it back.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from .config import EngineConfig, RankEnvironment, RunConfig, add_run_options, rank_environment
from .front_end import FrontEnd
from .generate import generate
from .neighbours import Door, Neighbours, NodeLost
from .preflight import check
from .rank import open_rank, process_groups
from .roll_call import Roll, RollCall
from .serve import serve
from .serve_config import ServeConfig, add_serve_options
from .stop_signal import stop_signal
from .summary import RunFigures, print_summary
from .terms import terms_of
from .wiring import RunTelemetry

_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    """Run this rank until the work is done; the exit status is 0 only then."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    argv = sys.argv[1:] if argv is None else argv
    serves = argv[:1] == [*ServeConfig.MODE]
    kind: type[EngineConfig] = ServeConfig if serves else RunConfig
    parser = argparse.ArgumentParser(
        prog="python -m onecast.runtime.worker" + " --serve" * serves,
        description="One tensor-parallel rank of `onecast generate`, or with --serve as the first "
        "option of `onecast serve`, to be started by torchrun.",
    )
    (add_serve_options if serves else add_run_options)(parser)
    options = parser.parse_args(argv[1:] if serves else argv)
    errors = get_error_handler()  # tells the elastic agent why, for its one message
    errors.initialize()
    environment: RankEnvironment | None = None
    try:
        environment = rank_environment()
        if environment.launcher_pid is not None:
            _die_with(environment.launcher_pid)
        run(kind.from_options(options), environment)
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
        # Its launcher says how a run ended or why it starts again, once for all ranks; but it may
        # itself be waiting for a node that is lost.
        count, most = environment.restart_count, environment.max_restarts
        if isinstance(error, NodeLost) and count < most:
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


def run(config: EngineConfig, environment: RankEnvironment) -> None:
    """Set this rank up, drive (rank 0) or follow, take everything down, say what was measured."""
    if config.tp not in (1, environment.world_size):
        started = f"torchrun started {environment.world_size} ranks"
        if environment.launched_by_onecast:  # which refuses that on one node
            started = f"the nodes started {environment.world_size} ranks"
            started += " together; all nodes need the same --tp and --nnodes"
        raise ValueError(f"--tp: {config.tp}, but {started}")
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
        front_end = None
        if isinstance(config, ServeConfig) and environment.rank == 0:
            front_end = FrontEnd.start(config)  # first: it says that the model is being loaded
        door = Door(environment)
        one_node = environment.world_size == environment.local_world_size
        terms = {} if one_node else terms_of(config)
    roll = call.answer(door.address, terms)
    neighbours = Neighbours(roll.addresses, environment.rank)
    try:
        _work(config, environment, roll, front_end)
    except Exception as error:
        lost = None if isinstance(error, ValueError) else neighbours.lost()
        if lost is None:
            raise
        raise NodeLost(f"{lost} ({type(error).__name__}: {error})") from error
    finally:
        door.close()


def _work(
    config: EngineConfig, environment: RankEnvironment, roll: Roll, front_end: FrontEnd | None
) -> None:
    figures: RunFigures | None = None
    with process_groups(config, environment, roll) as (device, model_group, control_group):
        telemetry = RunTelemetry(config, environment, roll.call)
        with (
            telemetry as observer,
            open_rank(config, environment, device, model_group, control_group, observer) as rank,
        ):
            if environment.rank > 0:
                # Of a server all ranks are asked to stop, and rank 0 ends the others when it has.
                pid = environment.launcher_pid
                with stop_signal(pid) if isinstance(config, ServeConfig) else nullcontext():
                    rank.executor.follow(rank.channel)
            elif isinstance(config, ServeConfig):
                assert front_end is not None
                serve(config, rank, front_end)
            else:
                assert isinstance(config, RunConfig)
                figures = generate(config, rank)
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
