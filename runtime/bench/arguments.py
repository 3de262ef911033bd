"""Arguments that several commands take, as argparse wants them: refused before anything runs.

Owns the checks. Imports the standard library alone.
"""

import argparse
import tempfile
from pathlib import Path


def new_file(text: str) -> Path:
    """A file that can be made, or written anew."""
    path = Path(text)
    if not text or path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no file can be made at {text!r}")
    try:
        if path.exists():
            path.open("ab").close()
        else:
            _make_file_in(path.parent)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"no file can be made at {text!r}: {error.strerror}"
        ) from None
    return path


def made_folder(text: str) -> Path:
    """A folder in which files can be made, made now if it was not there."""
    if not text:
        raise argparse.ArgumentTypeError("no folder can be made at ''")
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"no folder can be made at {text!r}: {error.strerror}"
        ) from None
    try:
        _make_file_in(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"no file can be made in {text!r}: {error.strerror}"
        ) from None
    return path


def _make_file_in(folder: Path) -> None:
    """OSError where that cannot be; it is gone again. Permissions alone would not tell."""
    tempfile.NamedTemporaryFile(dir=folder, prefix=".onecast-").close()


def at_least_one(text: str) -> int:
    """A whole number."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number
