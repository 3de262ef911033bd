"""Collectives inside CUDA graphs: what each graph was captured with, and every replay of it.

Owns the patches of torch.cuda.CUDAGraph and the manifests. A collective that is captured does not
run; a replay runs all of them without one call of torch.distributed. So the interception hands
what it sees during a capture to a `CaptureLog`, which writes it down when the capture ends, and
each replay becomes one GRAPH record in the ring that names the manifest by its number.

    <run_dir>/rank-<rank>.graphs, line n (from 0) is manifest n:

    {"name": "graph 0", "collectives": [{"op": "all_reduce", "group": "tp\\t3", "group_size": 2,
                                         "dtype": "bfloat16", "bytes": 16384}, ...]}\\n

A line is there, whole, before the first record that names it. Refuses to know what becomes of
manifests and records. torch is imported by `instrument`, not by this module: the sidecar reads
manifests with it.
"""

import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .ring import GRAPH, pack_meta

_logger = logging.getLogger(__name__)


class GraphRecorder(Protocol):
    """Where replays go; `RingWriter` is one."""

    @property
    def record(self) -> Callable[[int, int, int, int, int, int], None]: ...


class CapturedCollective(NamedTuple):
    op: str
    group: str
    group_size: int
    dtype: str
    nbytes: int


class Manifest(NamedTuple):
    name: str
    collectives: tuple[CapturedCollective, ...]


def graphs_path(run_dir: str, rank: int) -> Path:
    return Path(run_dir, f"rank-{rank}.graphs")


class ManifestReader:
    """The manifests of one rank, read on as the file grows. One reader, one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._manifests: list[Manifest] = []
        self._read = 0  # bytes

    def get(self, number: int) -> Manifest | None:
        """Manifest `number`; None if the file does not have it (yet, or any more)."""
        if number >= len(self._manifests):
            self._read_on()
        return self._manifests[number] if 0 <= number < len(self._manifests) else None

    def _read_on(self) -> None:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            self._manifests.append(
                Manifest(
                    entry["name"],
                    tuple(
                        CapturedCollective(
                            one["op"], one["group"], one["group_size"], one["dtype"], one["bytes"]
                        )
                        for one in entry["collectives"]
                    ),
                )
            )


class _Capture:
    """One in progress."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.thread = threading.get_ident()
        self.collectives: list[CapturedCollective] = []


class CaptureLog:
    """Patches CUDAGraph for one rank's ring. Safe for several threads.

    `open` is how many captures are in progress in this process, whatever their thread. Whoever
    asks CUDA how far an event is must hold `lock` and find `open` to be 0: such a question
    invalidates a capture in progress.
    """

    def __init__(self, path: Path, recorder: GraphRecorder) -> None:
        """`path`: `graphs_path` of the rank that `recorder` records."""
        self.path = path
        self.open = 0
        self.lock = threading.Lock()
        self.unknown_replays = 0  # of graphs captured before `instrument`
        self._record = recorder.record
        self._meta = pack_meta(GRAPH)
        self._captures: list[_Capture] = []
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._written = 0  # manifests
        self._nbytes = 0
        self._file: int | None = None
        self._patches: list[tuple[str, Any, Any]] = []
        self._class: Any = None
        self._is_capturing: Callable[[], bool] = lambda: False
        self._live = [False]

    # ---- what the interception asks and tells

    def capturing(self) -> bool:
        """Whether what is issued now, on this thread, goes into a graph instead of to the GPU."""
        return self.open > 0 and self._is_capturing()

    def captured(self, op: str, group: str, group_size: int, dtype: str, nbytes: int) -> None:
        """A collective was issued while `capturing`; `group` is the name entry of its group."""
        capture = self._capture_of_this_thread()
        if capture is not None:
            capture.collectives.append(CapturedCollective(op, group, group_size, dtype, nbytes))

    def _capture_of_this_thread(self) -> _Capture | None:
        """The one this thread opened; autograd's threads issue into one that another opened."""
        own = threading.get_ident()
        captures = list(self._captures)
        return next(
            (capture for capture in reversed(captures) if capture.thread == own),
            captures[-1] if captures else None,
        )

    # ---- the patches

    def instrument(self, graph_class: Any = None, is_capturing: Any = None) -> None:
        """Patch `torch.cuda.CUDAGraph`, if torch has CUDA, or `graph_class`.

        ValueError if this log already does.
        """
        if self._patches:
            raise ValueError("this CaptureLog is already active: uninstrument() first")
        if graph_class is None:
            import torch

            if torch.version.cuda is None:  # is_available() would start the driver
                return
            graph_class, is_capturing = torch.cuda.CUDAGraph, torch.cuda.is_current_stream_capturing
        self._class, self._is_capturing = graph_class, is_capturing
        self._live = [True]
        for name, make in (
            ("capture_begin", self._capture_begin),
            ("capture_end", self._capture_end),
            ("replay", self._replay),
        ):
            entry = graph_class.__dict__.get(name)  # None: inherited
            original = getattr(graph_class, name)
            replacement: Any = make(original, self._live)
            replacement.__name__ = name
            replacement.__qualname__ = f"{graph_class.__qualname__}.{name}"
            replacement.__doc__ = original.__doc__
            setattr(graph_class, name, replacement)
            self._patches.append((name, entry, replacement))

    def uninstrument(self) -> None:
        """Leave the class as it was found. A patch that lies on top stays; ours then does nothing
        beneath it."""
        self._live[0] = False
        for name, entry, replacement in reversed(self._patches):
            if self._class.__dict__.get(name) is not replacement:
                continue
            if entry is None:
                delattr(self._class, name)
            else:
                setattr(self._class, name, entry)
        self._patches.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _capture_begin(self, original: Any, live: list[bool]) -> Callable[..., None]:
        def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
            if not live[0]:
                original(graph, *args, **kwargs)
                return
            capture = _Capture(graph)
            with self.lock:  # whoever asks after events has finished, or will not begin
                self.open += 1
                self._captures.append(capture)
            try:
                original(graph, *args, **kwargs)
            except BaseException:
                self._close(capture)
                raise

        return capture_begin

    def _capture_end(self, original: Any, live: list[bool]) -> Callable[..., None]:
        def capture_end(graph: Any, *args: Any, **kwargs: Any) -> None:
            capture = next((one for one in list(self._captures) if one.graph is graph), None)
            try:
                original(graph, *args, **kwargs)
            finally:
                if capture is not None:
                    self._close(capture)
            if capture is not None and live[0]:
                self._write(capture)

        return capture_end

    def _replay(self, original: Any, live: list[bool]) -> Callable[..., None]:
        record, numbers, meta, now = self._record, self._numbers, self._meta, time.perf_counter_ns

        def replay(graph: Any, *args: Any, **kwargs: Any) -> None:
            number = numbers.get(graph) if live[0] else None
            if number is None:
                self.unknown_replays += live[0]
                original(graph, *args, **kwargs)
                return
            begin_ns = now()
            original(graph, *args, **kwargs)
            record(begin_ns, now(), meta, number, 0, 0)

        return replay

    def _close(self, capture: _Capture) -> None:
        with self.lock:
            self.open -= 1
            self._captures.remove(capture)

    def _write(self, capture: _Capture) -> None:
        """Append the manifest; a graph that is captured anew gets a new one."""
        self._numbers.pop(capture.graph, None)
        with self.lock:
            number = self._written
            entry = {
                "name": f"graph {number}",
                "collectives": [
                    {
                        "op": one.op,
                        "group": one.group,
                        "group_size": one.group_size,
                        "dtype": one.dtype,
                        "bytes": one.nbytes,
                    }
                    for one in capture.collectives
                ],
            }
            line = json.dumps(entry).encode() + b"\n"
            try:
                if self._file is None:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
                    self._file = os.open(self.path, flags, 0o600)
                if os.write(self._file, line) != len(line):
                    os.ftruncate(self._file, self._nbytes)
                    raise OSError(f"{self.path} took only a part of a manifest")
            except OSError as error:
                # Its replays are not recorded; the program must not fail for it.
                _logger.warning("the collectives of a CUDA graph will be missing: %s", error)
                return
            self._written += 1
            self._nbytes += len(line)
        self._numbers[capture.graph] = number
