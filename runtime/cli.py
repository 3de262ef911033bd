"""The `onecast` command: reads the command line and hands over.

Owns the subcommands and the exit status of bad usage (2); each subcommand's work is elsewhere.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from .config import EngineConfig, RunConfig, add_run_options
from .nodes import Nodes, add_node_options, nodes_of
from .serve_config import ServeConfig, add_serve_options

BENCHES = ("comm", "telemetry", "blocks", "step", "e2e", "nodes")

# For any torch.distributed program: command, its module in onecast.telemetry, what it does.
_TELEMETRY = {
    "telemetry": ("run_command", "run any program with every collective of its ranks measured"),
    "top": ("top_command", "watch a run in the terminal"),
    "flight": ("flight_command", "what each rank did last, and where ranks disagree"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="onecast",
        description="Tensor-parallel LLM inference: one broadcast a step, every one measured.",
    )
    parser.add_argument("--version", action="version", version=f"onecast {version('onecast')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        help="answer an OpenAI batch file",
        description="Answer an OpenAI batch file (JSONL) with a Hugging Face model directory.",
    )
    add_run_options(generate)
    add_node_options(generate)
    serve = commands.add_parser(
        "serve",
        help="answer OpenAI requests over HTTP",
        description="Serve a Hugging Face model directory by OpenAI's HTTP API.",
    )
    add_serve_options(serve)
    add_node_options(serve)
    demo = commands.add_parser(
        "demo",
        help="answer the shipped batch with the shipped checkpoint",
        description="`generate` with the shipped checkpoint and prompts, and so few KV-cache "
        "blocks that swapping really happens.",
    )
    add_run_options(demo, **_demo_defaults())
    bench = commands.add_parser("bench", help="measure what onecast claims", add_help=False)
    bench.add_argument("what", choices=BENCHES, nargs="?", metavar="BENCH", help=", ".join(BENCHES))
    commands.add_parser(
        "gpu-check", help="run all tests and benchmarks that need a GPU", add_help=False
    )
    for name, (_, text) in _TELEMETRY.items():
        commands.add_parser(name, help=text, add_help=False)
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _TELEMETRY:
        return _telemetry(argv[0], argv[1:])
    options, rest = parser.parse_known_args(argv)
    if options.command == "bench" and options.what is None:
        bench.print_help()
        return 0 if {"-h", "--help"} & {*rest} else 2
    if options.command == "bench":
        try:
            with _stopped_by_signals():
                return _bench(options.what, rest)
        except KeyboardInterrupt as stop:
            number = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
            print(f"onecast: bench {options.what} was stopped by {number.name}", file=sys.stderr)
            return 128 + number
    if options.command == "gpu-check":
        from . import gpu_check

        return gpu_check.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "demo":
            options.overwrite = options.overwrite or not options.resume
            if options.no_telemetry and options.trace == _demo_defaults()["trace"]:
                options.trace = None
        launch = _import_launch()
        kind: type[EngineConfig] = ServeConfig if options.command == "serve" else RunConfig
        return launch(kind.from_options(options), nodes_of(options))
    except (ValueError, OSError) as error:
        print(f"onecast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the launcher handles signals itself
        print("onecast: stopped by SIGINT before any rank was started", file=sys.stderr)
        return 130


def _import_launch() -> Callable[[EngineConfig, Nodes], int]:
    """Only now: it loads torch, which takes seconds, and --help needs none of it."""
    # Of a connection that fails torch writes a stack trace of C++ too, forty lines before the one
    # of ours. It reads this once; ranks get what the user has set.
    with _variable("TORCH_CPP_LOG_LEVEL", "FATAL"):
        from .launch import launch
    return launch


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """In here the environment has it, unless it has another value of it already."""
    given = name in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


def _demo_defaults() -> dict[str, object]:
    shipped = Path(__file__).parent / "demo"
    out = Path("out")
    return {
        "model": shipped / "checkpoint",
        "input": shipped / "prompts.jsonl",
        "output": out / "completions.jsonl",
        "trace": out / "trace.json",
        "tp": 2,
        "num_blocks": 64,
        "num_host_blocks": 256,
        "show": 6,
    }


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop what runs in here as Ctrl-C does: it leaves no files behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL  # nohup ignores SIGHUP
    ]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _bench(what: str, argv: list[str]) -> int:
    bench = import_module(f"onecast.runtime.bench.{what}")
    from onecast.comm.testing import RankFailed  # here: it imports torch, as all benchmarks do

    try:
        return int(bench.main(argv))
    except RankFailed as failure:
        reason, *traceback = failure.details.split("\n--- rank ")[0].strip().splitlines()
        if traceback:
            print(reason, *traceback, sep="\n", file=sys.stderr)
            reason = traceback[-1]
        print(f"onecast: bench {what}: rank {failure.rank} failed: {reason}", file=sys.stderr)
        return 1


def _telemetry(name: str, argv: Sequence[str]) -> int:
    """A command of telemetry: its module adds the arguments and runs it."""
    if name == "telemetry":
        if argv[:1] != ["run"]:
            print("usage: onecast telemetry run [OPTIONS] -- PROGRAM ...", file=sys.stderr)
            return 0 if argv[:1] in (["-h"], ["--help"]) else 2
        name, argv = "telemetry run", argv[1:]
    module_name, text = _TELEMETRY[name.partition(" ")[0]]
    module = import_module(f"onecast.telemetry.{module_name}")
    parser = argparse.ArgumentParser(prog=f"onecast {name}", description=text)
    module.add_arguments(parser)
    options = parser.parse_args(argv)
    try:
        return int(module.run(options))
    except (ValueError, OSError) as error:
        print(f"onecast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
