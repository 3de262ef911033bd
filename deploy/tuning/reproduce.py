"""Reproduces a situation of the tuning guide, turns the knob, and shows both runs side by side.

    .venv/bin/python deploy/tuning/reproduce.py {straggling-rank,swap-thrashing,...} [--keep DIR]

Takes two to four runs of the shipped checkpoint, on two ranks on the CPU, under a real Prometheus
with the shipped rules. With --keep the batches, logs and traces of the runs stay.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves a script's own folder out

from situations import SITUATIONS, carry_out
from situations.table import table


def main() -> int:
    parser = argparse.ArgumentParser(description="Reproduce a situation of the tuning guide.")
    parser.add_argument("situation", choices=SITUATIONS)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave batches, logs and traces")
    options = parser.parse_args()
    try:
        if options.keep is not None:
            folder = options.keep.absolute()  # its programs do not run where this one was started
            folder.mkdir(parents=True)
            print(_reproduce(options.situation, folder))
        else:
            with tempfile.TemporaryDirectory(prefix="onecast-tuning-") as temporary:
                print(_reproduce(options.situation, Path(temporary)))
    except (ValueError, OSError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _reproduce(name: str, folder: Path) -> str:
    situation = SITUATIONS[name]()
    return table(situation, carry_out(situation, folder))


if __name__ == "__main__":
    sys.exit(main())
