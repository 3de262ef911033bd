"""Who is the sidecar of a run directory: `sidecar.json`.

Owns the file's fields, its reading, its writing by rename, and whether the process it names is
alive. The sidecar writes it when it listens; whoever holds the directory's lock may mark it given
up.

    pid         4711
    start_time  as in /proc/<pid>/stat: together with pid it names one process for good
    started_ns  perf_counter_ns: CLOCK_MONOTONIC, the same for all processes of the host
    url         "http://127.0.0.1:9464/metrics", or null
    restarts    how often the sidecar of this run was started again
    in_a_row    of those, the last ones with less than a minute in between
    given_up    nobody starts it again
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from .ring import process_start_time

_NAME = "sidecar.json"


@dataclass(frozen=True, slots=True)
class SidecarRecord:
    pid: int
    start_time: int
    started_ns: int
    url: str | None
    restarts: int = 0
    in_a_row: int = 0
    given_up: bool = False

    @classmethod
    def read(cls, run_dir: str) -> Self | None:
        """None: no sidecar has listened in this directory yet (or there is no directory)."""
        try:
            text = Path(run_dir, _NAME).read_text()
        except FileNotFoundError:
            return None
        return cls(**json.loads(text))

    def write(self, run_dir: str) -> None:
        """Whole or not at all. Raises OSError."""
        path = Path(run_dir, _NAME)
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            unfinished.write_text(json.dumps(dataclasses.asdict(self)))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @property
    def alive(self) -> bool:
        return process_start_time(self.pid) == self.start_time

    @property
    def port(self) -> int | None:
        return None if self.url is None else urlsplit(self.url).port
