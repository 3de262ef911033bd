"""What the trace file says: how long spans of a name took, and on which rank.

Owns the reading of `data`, the part of the file that Jaeger's upload page reads.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path


class Spans:
    """Durations in seconds, by span name and rank (None: the engine's own)."""

    def __init__(self, durations: dict[tuple[str, int | None], list[float]]) -> None:
        self._durations = durations

    @classmethod
    def read(cls, path: Path) -> "Spans":
        durations: dict[tuple[str, int | None], list[float]] = defaultdict(list)
        for trace in json.loads(path.read_text(encoding="ascii"))["data"]:
            ranks = {
                name: next(
                    (t["value"] for t in process["tags"] if t["key"] == "onecast.rank"), None
                )
                for name, process in trace["processes"].items()
            }
            for span in trace["spans"]:
                key = span["operationName"], ranks[span["processID"]]
                durations[key].append(span["duration"] / 1e6)
        return cls(dict(durations))

    def names(self) -> set[str]:
        return {name for name, _ in self._durations}

    def count(self, name: str, rank: int | None = None) -> int:
        return len(self._durations.get((name, rank), ()))

    def median_s(self, name: str, rank: int | None = None) -> float | None:
        """None where no step has such a span."""
        found = self._durations.get((name, rank))
        return statistics.median(found) if found else None

    def longest_s(self, name: str, rank: int | None = None) -> float | None:
        return max(self._durations.get((name, rank), ()), default=None)
