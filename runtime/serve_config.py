"""The settings of `onecast serve`: those of any engine, and what the HTTP side needs.

Owns the options that only a server has, and their limits. Knows nothing of HTTP or of torch.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .config import EngineConfig, OptionAdder, add_engine_options

_LONGEST_DRAIN_S = 24 * 3600
_MOST_QUEUED = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(EngineConfig):
    """What one `onecast serve` does."""

    MODE: ClassVar[tuple[str, ...]] = ("--serve",)

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    served_model_name: str | None = None  # None: the name of the model's directory
    max_queue: int = 256  # sequences that may wait beside the `max_batch_size` that run
    drain_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)  # a class with slots has no super() here
        self.check_range({"port": 0, "max_queue": 0, "drain_timeout_s": 0}, {})
        self.check_range(
            {},
            {"port": 65535, "max_queue": _MOST_QUEUED, "drain_timeout_s": _LONGEST_DRAIN_S},
        )
        if not self.host:
            raise ValueError("--host: is empty; 0.0.0.0 is every address of this machine")
        try:
            self.model_name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"--served-model-name: {self.model_name!a} is not UTF-8; JSON has nothing else"
            ) from None

    @property
    def model_name(self) -> str:
        """What requests call the model, and `/v1/models` lists."""
        # As it was given: a link names a model better than what it leads to.
        return self.served_model_name or Path(os.path.abspath(self.model)).name

    @property
    def max_unfinished(self) -> int:
        """Sequences, running and waiting, beyond which requests are turned away."""
        return self.max_batch_size + self.max_queue


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of `ServeConfig`."""
    add = OptionAdder(parser, ServeConfig)
    add.option("host", "address to serve the API on (%(default)s)", metavar="HOST")
    add.option("port", "port to serve the API on; 0: any free one (%(default)s)", type=int)
    add.option(
        "served_model_name",
        "the model's name in the API (default: its directory's)",
        metavar="NAME",
    )
    add.option(
        "max_queue",
        "sequences that may wait beside those of a step; then requests get 429 (%(default)s)",
        type=int,
        metavar="N",
    )
    add.option(
        "drain_timeout_s",
        "after SIGTERM or Ctrl-C, seconds in which running requests may end (%(default)s)",
        type=float,
    )
    add_engine_options(add)
