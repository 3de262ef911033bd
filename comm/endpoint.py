"""One rank's end of a channel, however the bytes travel.

Owns the life of an end: open, then broken or closed; the one frame that is not released yet; what
the probe is told. Knows nothing of bytes.
"""

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .channel import Frame
from .errors import BrokenChannel, Closed, CommError
from .probe import Probe

log = logging.getLogger(__name__)

MAX_TIMEOUT_S = 10**9  # 31 years: in nanoseconds it fits 64 bits, with the clock added


class Endpoint:
    """The base of the channels. `src` is a global rank, a member of `group`.

    Raises ValueError for a `src`, group or time-out that cannot be.
    """

    name = ""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        src: int,
        probe: Probe | None,
        timeout_s: float,
        poison: bool,
    ) -> None:
        # Weak: a group belongs to torch.distributed, and must go when it is destroyed there.
        self._group_reference = weakref.ref(check_group(group, src))
        check_timeout(timeout_s)
        self.sequence = 0
        self.broadcasts = 0
        self.src = src
        self.rank = dist.get_rank()
        self.is_source = self.rank == src
        self._probe = probe
        self._timeout_s = timeout_s
        self._poison = poison
        self._frame: Frame | None = None  # the one that is not released yet
        self._error: BaseException | None = None
        self._closed = False
        self._refuses = False  # broken or closed

    @property
    def _group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup | None = self._group_reference()
        if group is None:
            raise CommError("the process group was destroyed before the channel was closed")
        return group

    def _refuse(self) -> NoReturn:
        """Say why this end does not do what it was asked to."""
        if self._error is not None:
            raise BrokenChannel(f"an earlier error left the ranks out of step: {self._error!r}")
        if self._closed:
            raise Closed("the channel is closed")
        does = "publishes" if self.is_source else "receives"
        raise ValueError(f"the source is rank {self.src}: rank {self.rank} {does}")

    def _break(self, error: BaseException) -> None:
        """Nothing is certain about the ranks being in step after `error`."""
        self._error = error
        self._refuses = True

    def _wait_limit_s(self, timeout_s: float | None) -> float:
        if timeout_s is None:
            return self._timeout_s
        if not 0 <= timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"timeout_s is {timeout_s}, it must be from 0 to {MAX_TIMEOUT_S:,}")
        return timeout_s

    def _tell(
        self,
        tell: Callable[[int, int, int, int, int, int, int], None],
        frame: Frame,
        broadcasts: int,
        first_ns: int,
        second_ns: int,
        end_ns: int,
    ) -> None:
        """Tell the probe of a frame; one that fails is logged once and removed."""
        try:
            tell(
                frame.sequence,
                frame.nbytes,
                frame.metadata_bytes,
                broadcasts,
                first_ns,
                second_ns,
                end_ns,
            )
        except Exception:
            log.exception("the probe failed; it is removed")
            self._probe = None


def at_end_of(
    thing: object, function: Callable[..., object], *arguments: object
) -> "weakref.finalize[..., Any]":
    """Call `function` once `thing` is no more, or this process ends: not in one forked from it."""
    return weakref.finalize(thing, _unless_forked, os.getpid(), function, *arguments)


def _unless_forked(pid: int, function: Callable[..., object], *arguments: object) -> None:
    if os.getpid() == pid:
        function(*arguments)


def check_timeout(timeout_s: float) -> None:
    """ValueError for a time that is not above 0, or no clock can count to."""
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(
            f"timeout_s is {timeout_s}, it must be above 0 and at most {MAX_TIMEOUT_S:,}"
        )


def check_group(group: dist.ProcessGroup | None, src: int | None = None) -> dist.ProcessGroup:
    """The group, the world for None; ValueError unless this rank and `src`, if any, are members."""
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised")
    group = group if group is not None else dist.group.WORLD
    if group is None or dist.get_rank(group) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in the group")
    if src is not None and src not in dist.get_process_group_ranks(group):
        ranks = dist.get_process_group_ranks(group)
        raise ValueError(f"src is {src}, a global rank; the group has the ranks {ranks}")
    return group


def meeting_place(group: dist.ProcessGroup) -> torch.device:
    """Where the tensors of the collectives at opening lie."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
