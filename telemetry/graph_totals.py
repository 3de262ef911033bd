"""What replays of CUDA graphs add up to: each issues the collectives of its manifest again.

Owns the adding. A replay is not a call of torch.distributed, so there are counts and bytes here and
no duration of a single collective.
"""

import logging
from collections import Counter, defaultdict

import numpy as np

from .cuda_graphs import Manifest, ManifestReader, graphs_path
from .histograms import DURATIONS, HistogramTable
from .labels import SIZE_CLASSES, CollectiveKey, bus_factor, group_label, size_classes
from .ring import BEGIN, END, SEQUENCE
from .ring_reader import Rows

_logger = logging.getLogger(__name__)


class GraphTotals:
    """Totals since the start. Without `run_dir` only launches are counted."""

    def __init__(self, run_dir: str | None) -> None:
        self.launches: HistogramTable[int] = HistogramTable(DURATIONS)  # by rank
        self.collectives: dict[CollectiveKey, int] = defaultdict(int)
        self.payload_bytes: dict[CollectiveKey, int] = defaultdict(int)
        self.bus_bytes: dict[CollectiveKey, float] = defaultdict(float)
        self._run_dir = run_dir
        self._readers: dict[int, ManifestReader] = {}  # by rank
        self._unknown: Counter[tuple[int, int]] = Counter()  # (rank, manifest): replays

    @property
    def unknown(self) -> int:
        """Replays whose manifest could not be read so far."""
        return self._unknown.total()

    def add(self, rank: int, rows: Rows) -> None:
        """Count GRAPH records."""
        if not len(rows):
            return
        self.launches.add(
            np.full(len(rows), self.launches.row(rank)), rows[:, END] - rows[:, BEGIN]
        )
        for number, count in zip(*np.unique(rows[:, SEQUENCE], return_counts=True), strict=True):
            self._unknown[rank, int(number)] += int(count)

    def resolve(self) -> None:
        """Count what the replays issued, as far as their manifests are there."""
        for (rank, number), replays in list(self._unknown.items()):
            manifest = self._manifest(rank, number)
            if manifest is not None:
                del self._unknown[rank, number]
                self._count(rank, manifest, replays)

    def _manifest(self, rank: int, number: int) -> Manifest | None:
        if self._run_dir is None:
            return None
        reader = self._readers.get(rank)
        if reader is None:
            reader = self._readers[rank] = ManifestReader(graphs_path(self._run_dir, rank))
        try:
            return reader.get(number)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _logger.error("cannot read the CUDA graphs of rank %d: %s", rank, error)
            return None

    def _count(self, rank: int, manifest: Manifest, replays: int) -> None:
        for one in manifest.collectives:
            size = SIZE_CLASSES[int(size_classes(np.array([one.nbytes]))[0])]
            key = CollectiveKey(one.op, group_label(one.group), size, rank)
            self.collectives[key] += replays
            self.payload_bytes[key] += replays * one.nbytes
            self.bus_bytes[key] += replays * one.nbytes * bus_factor(one.op, one.group_size)
