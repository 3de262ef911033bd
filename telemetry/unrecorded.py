"""A ring that keeps nothing, for a program that goes on where nothing can be recorded.

Owns the rule that one warning per node is enough, and the file that says it was given.
"""

import logging
import os
from pathlib import Path
from typing import cast

from .ring import RingWriter

_logger = logging.getLogger(__name__)
_MARK = "unrecorded"


class _NullRing:
    """`RingWriter`'s methods, doing nothing."""

    head = 0

    def begin(self, meta: int, sequence: int, nbytes: int) -> int:
        return 0

    def end(self, ticket: int, status: int = 0) -> None: ...
    def fail(self, ticket: int, error: BaseException) -> None: ...
    def record(
        self, begin_ns: int, end_ns: int, meta: int, sequence: int, nbytes: int, aux: int
    ) -> None: ...
    def record_in_step(
        self, step: int, begin_ns: int, end_ns: int, meta: int, sequence: int, nbytes: int, aux: int
    ) -> None: ...
    def set_step(self, step: int) -> None: ...
    def set_nbytes(self, ticket: int, nbytes: int) -> None: ...
    def discard_step(self, ticket: int) -> None: ...
    def intern(self, name: str) -> int:
        return 0

    def set_value(self, index: int, value: int) -> None: ...
    def set_coverage(self, group: int, unrecorded: int) -> None: ...
    def close(self) -> None: ...


def null_ring() -> RingWriter:
    return cast(RingWriter, _NullRing())


def tell_once(run_dir: str | None, rank: int, local_rank: int, why: object) -> None:
    """One warning for the node; its other ranks only note it.

    Where nobody records, the directory is gone, and the first rank of the node speaks for all;
    where others do, the first that cannot leaves its mark there.
    """
    level = logging.WARNING if local_rank == 0 else logging.INFO
    if run_dir is not None:
        try:
            os.close(os.open(Path(run_dir, _MARK), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            level = logging.WARNING
        except FileExistsError:
            level = logging.INFO
        except OSError as error:
            _logger.debug("cannot note that rank %d is not recorded: %s", rank, error)
    _logger.log(level, "the run goes on without telemetry of rank %d: %s", rank, why)
