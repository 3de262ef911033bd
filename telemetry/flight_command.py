"""`onecast flight`: what each rank did last, and where they disagree.

Owns the command's options, its JSON form and its exit status: 0, or 2 if there is nothing to read.
"""

import argparse
import json
import os
import sys
from typing import Any

from .errors import TelemetryError
from .flight import FlightRun, kept_runs, read_runs
from .flight_events import Event, last_events
from .flight_table import print_run
from .flight_trace import write_trace
from .settings import TelemetrySettings

_DEFAULT_EVENTS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `onecast flight`."""
    parser.add_argument(
        "run_dir",
        nargs="*",
        metavar="RUN_DIR",
        help="a run directory (/dev/shm/onecast-*), live or of dead processes, or a kept copy; "
        "several are the nodes of one run; without one, the kept runs are listed",
    )
    parser.add_argument(
        "-n", "--events", type=_positive, default=_DEFAULT_EVENTS, metavar="N",
        help=f"how many of its last events each rank shows ({_DEFAULT_EVENTS})",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument(
        "--perfetto", metavar="FILE", help="write all that the rings hold for ui.perfetto.dev"
    )


def run(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    try:
        if not options.run_dir:
            return _list(options.json)
        found = read_runs(options.run_dir)
        events = last_events(found, options.events)
        if options.perfetto is not None:
            write_trace(found, options.perfetto)
        if options.json:
            print(json.dumps(as_dict(found, events)))
        else:
            print_run(found, events)
            if options.perfetto is not None:
                print(f"\nwritten for ui.perfetto.dev: {options.perfetto}")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (TelemetryError, OSError) as error:
        print(f"onecast flight: {error}", file=sys.stderr)
        return 2
    return 0


def as_dict(found: FlightRun, events: list[Event]) -> dict[str, Any]:
    """What `--json` prints. Times are nanoseconds since 1970."""
    disagreement = found.disagreement()
    return {
        "run": found.path,
        "kind": found.kind,
        "reason": found.reason or None,
        "engine_id": found.engine_id,
        "world_size": found.world_size,
        "now_ns": found.now_ns,
        "problems": found.problems,
        "ranks": {
            str(rank): {
                "pid": one.image.pid,
                "state": one.state,
                "step": one.image.step if one.image.step >= 0 else None,
                "was": one.was_in,
                "records": one.image.head,
                "records_left": len(one.image.rows),
            }
            for rank, one in found.ranks.items()
        },
        "disagreement": None if disagreement is None else disagreement.to_dict(),
        "hangs": [hang.to_dict() for hang in found.hangs()],
        "events": [event.to_dict() for event in events],
    }


def _list(as_json: bool) -> int:
    flight_dir = TelemetrySettings.from_env().flight_dir
    paths = [str(path) for path in kept_runs(flight_dir)]
    if as_json:
        print(json.dumps({"flight_dir": flight_dir, "kept": paths}))
    elif not paths:
        print(f"no run has been kept in {flight_dir}")
    else:
        print("\n".join(paths))
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
