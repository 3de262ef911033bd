"""`onecast telemetry run [OPTIONS] -- torchrun ...`: for a program that knows nothing of us.

Owns the options and how they travel: as the variables that every process of the program reads,
and a directory at the front of PYTHONPATH, whose `sitecustomize` waits for ranks. Then the program
takes this process's place, so its exit status, its signals and its terminal are its own.
"""

import argparse
import os
import shutil
import signal
import sys
from collections.abc import MutableMapping
from pathlib import Path
from urllib.parse import urlsplit

from .settings import TelemetrySettings

AUTOLOAD = str(Path(__file__).parent / "autoload")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run a program and record every collective of torch.distributed in it. Where an option "
        "is not given, its variable holds (OTEL_*, ONECAST_*)."
    )
    parser.add_argument("--port", type=int, help="serve metrics here (default: any free port)")
    parser.add_argument("--host", help="address to serve metrics on (default: 127.0.0.1)")
    parser.add_argument(
        "--trace", metavar="FILE", help="write traces for Jaeger's or Perfetto's page"
    )
    parser.add_argument("--otlp", metavar="URL", help="send traces to this OTLP endpoint")
    parser.add_argument("--otlp-protocol", choices=("grpc", "http/protobuf"))
    parser.add_argument(
        "--one-in", type=int, metavar="N", help="keep one step in N as a trace (1: all, 0: none)"
    )
    parser.add_argument(
        "--hang", type=float, metavar="SECONDS", help="tell of collectives in flight this long"
    )
    parser.add_argument(
        "--step", metavar="RULE", help="what ends a step: optimizer, collectives:N or none"
    )
    parser.add_argument(
        "--ddp-hook",
        action="store_true",
        help="see the gradients of DistributedDataParallel too, through a communication hook",
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM [ARGUMENT ...]")


# What settings call that which has another name here.
_OPTIONS = {"metrics_port": "port", "trace_one_in": "one_in", "hang_s": "hang", "auto_step": "step"}


def run(options: argparse.Namespace) -> int:
    """Become the program. Returns only where it cannot be started: 127 not found, 126 not runnable.

    ValueError if the settings cannot be.
    """
    program = list(options.program)
    if program[:1] == ["--"]:
        del program[0]
    if not program:
        raise ValueError(
            "onecast telemetry run: no program was given, as in `-- torchrun train.py`"
        )
    environ = dict(os.environ)
    pass_on(options, environ)
    try:
        TelemetrySettings.from_env(environ)  # a mistake is told now, not by every rank
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if getattr(options, _OPTIONS.get(name, ""), None) is None:
            raise
        raise ValueError(f"--{_OPTIONS[name].replace('_', '-')} {rest}") from None
    executable = shutil.which(program[0])
    if executable is None:
        print(f"onecast: {program[0]}: command not found", file=sys.stderr)
        return 127
    sys.stdout.flush()
    sys.stderr.flush()
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and exec would hand that on
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execve(executable, program, environ)
    except OSError as error:
        print(f"onecast: {executable}: {error.strerror}", file=sys.stderr)
        return 126


def pass_on(options: argparse.Namespace, environ: MutableMapping[str, str]) -> None:
    """Write the options into the variables that ranks read, and our directory into PYTHONPATH."""

    def put(variable: str, value: object) -> None:
        if value is not None:
            environ[variable] = str(value)

    put("OTEL_EXPORTER_PROMETHEUS_PORT", options.port)
    put("OTEL_EXPORTER_PROMETHEUS_HOST", options.host)
    if options.trace is not None:
        environ["ONECAST_TRACE_FILE"] = os.path.abspath(options.trace)
    put("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", options.otlp_protocol)
    if options.otlp is not None:
        protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get(
            "OTEL_EXPORTER_OTLP_PROTOCOL"
        )
        bare = protocol != "grpc" and urlsplit(options.otlp).path in ("", "/")
        environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = (
            options.otlp.rstrip("/") + "/v1/traces" if bare else options.otlp
        )
        environ["OTEL_TRACES_EXPORTER"] = "otlp"
    put("ONECAST_TRACE_ONE_IN", options.one_in)
    put("ONECAST_HANG_S", options.hang)
    put("ONECAST_STEP", options.step)
    if options.ddp_hook:
        environ["ONECAST_DDP_HOOK"] = "1"
    others = environ.get("PYTHONPATH")
    if others is None or AUTOLOAD not in others.split(os.pathsep):
        environ["PYTHONPATH"] = AUTOLOAD + os.pathsep + others if others else AUTOLOAD
