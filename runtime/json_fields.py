"""Reading the values of a JSON object, with errors that name file, key and value.

Owns the checks of presence, type and sign. Knows nothing of what the values mean. Every error is a
ValueError of one line; null counts as absent.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Fields:
    """The values of one JSON object, read with errors that name file, key and value."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self._prefix = prefix

    @classmethod
    def read(cls, path: Path) -> "Fields":
        """The object that the file holds; ValueError where there is no file or no object."""
        return cls(path, _read_object(path))

    def within(self, key: str) -> "Fields":
        """The object under `key`; empty where there is none."""
        return Fields(self.path, self.section(key), f"{self._prefix}{key}.")

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    def section(self, key: str) -> Mapping[str, Any]:
        section = self.values.get(key) or {}
        if not isinstance(section, dict):
            raise self.error(f"{self._prefix}{key} is {section!r}, not an object")
        return section

    def count(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{self._prefix}{key} is {value!r}, not a whole number of at least 1")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < math.inf
        ):
            raise self.error(f"{self._prefix}{key} is {value!r}, not a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{self._prefix}{key} is {value!r}, not true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise self.error(f"{self._prefix}{key} is {value!r}, not a token id or a list of them")
        return tuple(ids)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{self._prefix}{key} is missing")
        return value


def _read_object(path: Path) -> Mapping[str, Any]:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is not a regular file")  # a FIFO would never end
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, not an object")
    return values
