"""Writes the dashboards that Grafana reads from the code in `boards`.

    .venv/bin/python deploy/grafana/generate.py [--check]

With --check nothing is written: exit status 1 and the names of the files that are not what the code
says.
"""

import argparse
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
WRITTEN = FOLDER / "dashboards"

sys.path.insert(0, str(FOLDER))  # PYTHONSAFEPATH leaves a script's own folder out

from boards import BOARDS, as_json  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the Grafana dashboards.")
    parser.add_argument("--check", action="store_true", help="only compare, exit 1 if they differ")
    options = parser.parse_args()
    wanted = {WRITTEN / f"{name}.json": as_json(build()) for name, build in BOARDS.items()}
    if options.check:
        changed = [path for path, text in wanted.items() if not _is(path, text)]
        stale = sorted(set(WRITTEN.glob("*.json")) - wanted.keys())
        for path in (*changed, *stale):
            print(f"{path}: not what the code in {FOLDER / 'boards'} says", file=sys.stderr)
        return 1 if changed or stale else 0
    WRITTEN.mkdir(exist_ok=True)
    for path, text in wanted.items():
        path.write_text(text)
        print(f"{path}: {len(text)} bytes")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
