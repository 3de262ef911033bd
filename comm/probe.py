"""The protocol through which a channel tells what torch.distributed cannot see.

Owns two method signatures; knows nothing of who listens. A channel without a probe pays for one
`is not None`; a probe that raises is logged once and removed.
"""

from typing import Protocol


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
