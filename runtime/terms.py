"""What all nodes of a run must have alike, as text by option, and the sentence where they do not.

Owns which settings those are, and by what a checkpoint is told from another. Each node is started
by a command of its own: with another block size, or another checkpoint of the same shapes, its
ranks would work without an error, and on wrong tokens. Knows nothing of how ranks tell one another
(`roll_call`).
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from .config import EngineConfig

# A node may have its own: where things are there, how it waits, and what it shows.
_OWN = {
    *("model", "spin", "timeout_s", "join_timeout_s"),
    *("no_telemetry", "metrics_host", "metrics_port", "trace"),
}
_SAMPLES = 32  # of each file of weights, beside its beginning, which names its tensors
_SAMPLE_BYTES = 4096


def terms_of(config: EngineConfig) -> dict[str, str]:
    """By option; what begins without dashes is none. Reads a few pages of each file of weights."""
    told = {
        "--" + field.name.replace("_", "-"): _told(getattr(config, field.name))
        for field in dataclasses.fields(EngineConfig)
        if field.name not in _OWN
    }
    command = "serve" if config.MODE else "generate"
    return {
        "onecast": version("onecast"),
        "command": command,
        "--model": f"checkpoint {_mark(config.model)}",
        **told,
    }


def disagreement(terms: Sequence[Mapping[str, str]], nodes: Sequence[int]) -> str | None:
    """What ranks do not have alike, by node; both arguments are by rank. None: nothing."""
    said = []
    for name in terms[0]:
        on_nodes: dict[str, set[int]] = {}
        for of_rank, node in zip(terms, nodes, strict=True):
            on_nodes.setdefault(of_rank.get(name, "unknown"), set()).add(node)
        if len(on_nodes) > 1:
            each = (f"{value} on {_name(numbers)}" for value, numbers in on_nodes.items())
            said.append(f"{name}: {', '.join(each)}")
    return f"{'; '.join(said)}; all nodes need the same" if said else None


def _told(value: object) -> str:
    if value is None or value is False:
        return "not given"
    return "given" if value is True else str(value)


def _name(nodes: set[int]) -> str:
    *most, last = map(str, sorted(nodes))
    return f"nodes {', '.join(most)} and {last}" if most else f"node {last}"


def _mark(model: Path) -> str:
    """The same for the same checkpoint, wherever it lies; another after fine-tuning."""
    digest = hashlib.sha256()
    for path in (model / "config.json", *sorted(model.glob("*.safetensors"))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES + 1):
                begin = size * index // (_SAMPLES + 1)
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, begin))
    return digest.hexdigest()[:8]
