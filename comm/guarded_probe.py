"""A collective probe that cannot disturb what it is told of.

Owns what becomes of a probe that raises: it is logged once, and told nothing more.
"""

import logging

import torch
import torch.distributed as dist

from .probe import CollectiveProbe

log = logging.getLogger(__name__)

NO_TICKET = 0


class GuardedProbe:
    """Hands on to `probe`, until that fails."""

    def __init__(self, probe: CollectiveProbe) -> None:
        self._probe: CollectiveProbe | None = probe

    def begin(self, op: str, group: dist.ProcessGroup, nbytes: int, dtype: torch.dtype) -> int:
        """See `CollectiveProbe`; NO_TICKET where nobody listens any more."""
        if self._probe is not None:
            try:
                return self._probe.begin(op, group, nbytes, dtype)
            except Exception:
                self._remove()
        return NO_TICKET

    def end(self, ticket: int) -> None:
        if self._probe is not None:
            try:
                self._probe.end(ticket)
            except Exception:
                self._remove()

    def fail(self, ticket: int, error: BaseException) -> None:
        if self._probe is not None and ticket != NO_TICKET:
            try:
                self._probe.fail(ticket, error)
            except Exception:
                self._remove()

    def _remove(self) -> None:
        log.exception("the probe failed; it is removed")
        self._probe = None
