"""Where `onecast top` gets `/live.json` from: the sidecars of this user, or a URL.

Owns how running sidecars are found, which URLs are taken, and what is said when there is no
answer or not ours. Asks the address itself: it knows no proxies, and follows no one elsewhere.
"""

import os
import stat
import time
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from . import run_directory
from .errors import TelemetryError
from .flight_words import printable
from .live import MAX_BYTES
from .sidecar_record import SidecarRecord
from .top_view import LiveView, read_view

_PATHS = ("", "/", "/metrics", "/live.json")
_MOST_BYTES = 8 * MAX_BYTES  # of an answer
_CHUNK = 1 << 16
_FORM = "let it be http://HOST:PORT"


class NoAnswer(TelemetryError):
    """Nobody answers there, or not now; it may be worth another try."""


class NotOurs(TelemetryError):
    """Somebody answers, but nothing that `onecast top` can show."""


def running_sidecars() -> list[tuple[str, SidecarRecord]]:
    """Run directory and record of each living sidecar of this user that serves HTTP; the oldest
    first."""
    found = []
    for path in Path(run_directory._parent()).glob("onecast-*"):
        record = _record_of(path)
        if record is not None and record.url is not None and record.alive:
            found.append((str(path), record))
    return sorted(found, key=lambda one: one[1].started_ns)


def _record_of(path: Path) -> SidecarRecord | None:
    try:
        directory = os.lstat(path)
        # What others put there could send us anywhere.
        if not stat.S_ISDIR(directory.st_mode) or directory.st_uid != os.getuid():
            return None
        return SidecarRecord.read(str(path))
    except (OSError, ValueError, TypeError):
        return None  # gone by now, or of another version: no sidecar that we could show


class LiveSource:
    """`/live.json` of one server.

    `url`: http://HOST:PORT, with or without /metrics. Raises ValueError for any other.
    """

    def __init__(self, url: str, timeout_s: float = 5.0) -> None:
        shown = printable(url)
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{shown!r} is no URL ({printable(str(error))}): {_FORM}") from None
        if parts.scheme != "http":
            raise ValueError(f"{shown!r} does not begin with http://: {_FORM}")
        plain = not parts.query and not parts.fragment and parts.username is None
        if not parts.hostname or parts.path not in _PATHS or not plain or url != shown:
            raise ValueError(f"{shown!r} is not the URL of a sidecar: {_FORM}")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self.url = f"http://{host}" + ("" if port is None else f":{port}")
        self._timeout_s = timeout_s
        self._host, self._port = parts.hostname, port or 80

    def read(self) -> LiveView:
        """Raises NoAnswer and NotOurs; their messages are one line and name the URL."""
        try:
            status, body = self._get()
        except (OSError, HTTPException, ValueError) as error:  # ValueError: no name for DNS
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise NoAnswer(f"no answer from {self.url}: {_line(why)}") from None
        if status == 503:
            raise NoAnswer(f"{self.url} is busy")
        if status != 200:
            raise NotOurs(f"{self.url} has no live view (status {status}): is it a sidecar?")
        try:
            return read_view(body)
        except ValueError as error:
            raise NotOurs(f"{self.url} answers no live view: {_line(str(error))}") from None

    def _get(self) -> tuple[int, bytes]:
        """Over a connection of its own: the server keeps none that is idle."""
        deadline = time.monotonic() + self._timeout_s
        with closing(HTTPConnection(self._host, self._port, timeout=self._timeout_s)) as connection:
            connection.request("GET", "/live.json", headers={"Connection": "close"})
            answer = connection.getresponse()
            body = b""
            while chunk := answer.read1(_CHUNK):
                body += chunk
                if len(body) > _MOST_BYTES:
                    return answer.status, b""  # nothing that we could show
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not the whole of it within {self._timeout_s:g} s")
            return answer.status, body


def _line(text: str) -> str:
    return printable(" ".join(text.split()))[:200]
