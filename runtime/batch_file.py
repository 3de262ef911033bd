"""OpenAI batch files: requests come in as lines of JSON, results go out as lines of JSON.

Owns the formats of both lines, reading the input, and which result belongs to which line. Whatever
is wrong with a line concerns that line alone. Knows nothing of what the bodies say; how results
get to the disk is `batch_writer.py`'s.

    in    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {...}}
    out   {"id": "batch_req_<32 hex digits>", "custom_id": "a", "response": ..., "error": ...}

`response` is {"status_code", "request_id", "body"}, with status 400 and OpenAI's error object as
the body where a request was refused; it is null, and `error` is {"code", "message"}, where a line
is no request at all. Results come in the order in which they are finished, not in the input's.

The digits of `id` are a hash of the line's number and bytes. They are the key by which a resumed
run knows a line as answered, whether it has a custom_id or not, and by which it notices that an
answered line was changed since.
"""

import hashlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from .batch_writer import ID_PREFIX, BatchWriter, count_complete
from .body_fields import show
from .openai_body import CHAT_URL, COMPLETIONS_URL

__all__ = [
    "BatchLine",
    "BatchWriter",
    "LineProblem",
    "check_unchanged",
    "count_complete",
    "count_lines",
    "read_batch",
]

MAX_LINE_BYTES = 16 * 2**20  # a prompt of a million token ids has 8 MB

_URLS = (COMPLETIONS_URL, CHAT_URL)
_KEYS = ("custom_id", "method", "url", "body")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class LineProblem:
    """Why a line is no request; the message names the line."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of the input."""

    number: int  # from 1
    key: str  # 32 hex digits
    custom_id: str | None = None  # None where it cannot be told
    url: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    problem: LineProblem | None = None

    def result(self, body: Mapping[str, Any], status_code: int = 200) -> dict[str, Any]:
        """The result line of a request that was answered (200), refused (400) or failed (500)."""
        response = {"status_code": status_code, "request_id": f"req_{self.key}", "body": body}
        return self._result(response, None)

    def problem_result(self) -> dict[str, Any]:
        """The result line of a line that is no request."""
        assert self.problem is not None
        return self._result(None, {"code": self.problem.code, "message": self.problem.message})

    def _result(self, response: Any, error: Any) -> dict[str, Any]:
        return {
            "id": f"{ID_PREFIX}{self.key}",
            "custom_id": self.custom_id,
            "response": response,
            "error": error,
        }


def read_batch(
    path: str | Path, done: Container[str] = (), max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[BatchLine]:
    """The lines of a batch file whose keys are not in `done`, read as they are asked for.

    ValueError, raised at once: there is no such file, or nothing in it. Whatever is wrong with a
    line is that line's `problem`.
    """
    file = _open_input(path)
    return _lines(file, done, max_line_bytes)


def check_unchanged(path: str | Path, done: Mapping[str, str | None]) -> None:
    """ValueError: a result in `done` (key -> custom_id) belongs to no line of the input."""
    missing = dict(done)
    with _open_input(path) as file:
        for _, key, _ in _raw_lines(file, MAX_LINE_BYTES):
            missing.pop(key, None)
    for key, custom_id in missing.items():
        raise ValueError(
            f"{path}: was changed since the run to be resumed: no line gives the result "
            f"{ID_PREFIX}{key} (custom_id {show(custom_id)}) that is there already; "
            f"{len(missing)} of {len(done)} are like that"
        )


def count_lines(path: str | Path) -> int:
    """Lines of the input, however bad; ValueError as in `read_batch`."""
    with _open_input(path) as file:
        return sum(1 for _ in _raw_lines(file, MAX_LINE_BYTES))


def _open_input(path: str | Path) -> BinaryIO:
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot read the batch file: {error.strerror}") from error
    if not file.peek(1):
        file.close()
        raise ValueError(f"{path}: the batch file is empty")
    return file


def _lines(file: BinaryIO, done: Container[str], max_line_bytes: int) -> Iterator[BatchLine]:
    seen: dict[str, int] = {}  # custom_id -> line number
    with file:
        for number, key, raw in _raw_lines(file, max_line_bytes):
            line = _parse(number, key, raw, max_line_bytes)
            if line.custom_id is not None:
                first = seen.setdefault(line.custom_id, number)
                if first != number and line.problem is None:
                    problem = LineProblem(
                        "duplicate_custom_id",
                        f"line {number}: custom_id {show(line.custom_id)} is that of line {first}",
                    )
                    line = BatchLine(number, key, line.custom_id, problem=problem)
            if key not in done:
                yield line


def _raw_lines(file: BinaryIO, max_line_bytes: int) -> Iterator[tuple[int, str, bytes | None]]:
    """(number, key, bytes without the line's end) of every line; None where there are too many."""
    number = 0
    while chunk := file.readline(max_line_bytes + 1):
        number += 1
        digest = hashlib.blake2b(b"%d\0" % number, digest_size=16)
        raw: bytes | None = chunk.removesuffix(b"\n")
        if raw == chunk and len(chunk) > max_line_bytes:
            raw = None
            while chunk and not chunk.endswith(b"\n"):
                digest.update(chunk)
                chunk = file.readline(max_line_bytes + 1)
        # Without its end: an input whose last line gets one is unchanged.
        digest.update(chunk.removesuffix(b"\n"))
        yield number, digest.hexdigest(), raw


def _parse(number: int, key: str, raw: bytes | None, max_line_bytes: int) -> BatchLine:
    custom_id: str | None = None

    def wrong(code: str, why: str) -> BatchLine:
        problem = LineProblem(code, f"line {number}: {why}")
        return BatchLine(number, key, custom_id, problem=problem)

    if raw is None:
        return wrong("line_too_long", f"is longer than {max_line_bytes} bytes")
    if not raw.strip():
        return wrong("empty_line", "is empty")
    if raw.startswith(_BOM):
        return wrong("invalid_json", "begins with a byte order mark: save it as UTF-8 without one")
    try:
        value = msgspec.json.decode(raw)
    except UnicodeDecodeError as error:
        return wrong("invalid_utf8", f"is not UTF-8: {error.reason} (byte {error.start})")
    except (msgspec.DecodeError, RecursionError) as error:
        return wrong("invalid_json", f"is not JSON: {error}")
    if not isinstance(value, dict):
        return wrong("invalid_line", f"{show(value)} is not an object")
    name = value.get("custom_id")
    if name is None:
        return wrong("missing_custom_id", "custom_id is missing")
    if not isinstance(name, str) or not name:
        return wrong("invalid_custom_id", f"custom_id: {show(name)} is not a text, or empty")
    custom_id = name
    for unknown in value.keys() - _KEYS:
        return wrong("unknown_key", f"{show(unknown)} is not one of {', '.join(_KEYS)}")
    if value.get("method") != "POST":
        return wrong("invalid_method", f"method: {show(value.get('method'))} is not POST")
    url = value.get("url")
    if url not in _URLS:
        return wrong("invalid_url", f"url: {show(url)} is not one of {', '.join(_URLS)}")
    body = value.get("body")
    if not isinstance(body, dict):
        return wrong("invalid_body", f"body: {show(body)} is not an object")
    return BatchLine(number, key, custom_id, url, body)
