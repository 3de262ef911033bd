"""Arguments that several commands take, as argparse wants them: refused before anything runs.

Owns the checks. Imports the standard library alone.
"""

import argparse
from pathlib import Path


def new_file(text: str) -> Path:
    """A file that can be made, or written anew."""
    path = Path(text)
    if not text or path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no file can be made at {text!r}")
    return path


def made_folder(text: str) -> Path:
    """A folder, made now if it was not there."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"no folder can be made at {text!r}: {error.strerror}"
        ) from None
    return path


def at_least_one(text: str) -> int:
    """A whole number."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number
