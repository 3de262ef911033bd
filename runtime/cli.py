"""The `onecast` command: reads the command line and hands over.

Owns the subcommands and the exit status of bad usage (2); each subcommand's work is elsewhere.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .config import add_run_options, run_config

BENCHES = ("comm",)


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
    options, rest = parser.parse_known_args(argv)
    if options.command == "bench" and options.what is None:
        bench.print_help()
        return 0 if {"-h", "--help"} & {*rest} else 2
    if options.command == "bench":
        return _bench(options.what, rest)
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
        from .launch import launch  # torch: not needed to answer --help

        return launch(run_config(options))
    except (ValueError, OSError) as error:
        print(f"onecast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the launcher handles signals itself
        print("onecast: stopped by SIGINT before any rank was started", file=sys.stderr)
        return 130


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


def _bench(what: str, argv: list[str]) -> int:
    assert what in BENCHES
    from .bench import comm

    return comm.main(argv)
