"""The protocols through which is told what torch.distributed cannot see.

Owns a few method signatures; knows nothing of who listens. Without a probe a channel pays for one
`is not None`; a probe that raises is logged once and removed.
"""

from typing import Protocol

import torch
import torch.distributed as dist


class Probe(Protocol):
    """Told about each frame. Times are `time.perf_counter_ns()`; sizes are bytes.

    `metadata_bytes` is all of the frame that is neither tensor content nor padding, its header
    included; `broadcasts` is 1, or 2 for a frame that outgrew the capacity.
    """

    def published(
        self,
        sequence: int,
        frame_bytes: int,
        metadata_bytes: int,
        broadcasts: int,
        encode_start_ns: int,
        publish_start_ns: int,
        end_ns: int,
    ) -> None: ...

    def received(
        self,
        sequence: int,
        frame_bytes: int,
        metadata_bytes: int,
        broadcasts: int,
        wait_start_ns: int,
        decode_start_ns: int,
        end_ns: int,
    ) -> None: ...


class CollectiveProbe(Protocol):
    """Told about each collective of a group that takes another way than the group's backend."""

    def begin(self, op: str, group: dist.ProcessGroup, nbytes: int, dtype: torch.dtype) -> int:
        """It begins; `op` as torch.distributed calls it. Gives what names it from here on."""

    def end(self, ticket: int) -> None:
        """It is over."""

    def fail(self, ticket: int, error: BaseException) -> None:
        """It has failed."""
