"""What the scheduler counts: cumulative counters and momentary gauges, plain numbers both."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Since the scheduler began."""

    swapped_out: int = 0  # blocks moved to host memory, cached ones that were reused included
    swapped_in: int = 0  # blocks moved back
    copied: int = 0  # blocks copied on write
    preemptions: int = 0  # sequences taken off the device, by swapping or for recomputation
    recomputes: int = 0  # of these, the ones whose blocks were dropped: no room on the host
    prompt_tokens: int = 0  # prompt positions computed; recomputation counts them again
    generated_tokens: int = 0
    prefix_queried_tokens: int = 0  # tokens of admitted sequences, anew after a recomputation
    prefix_hit_tokens: int = 0  # of these, the ones found in cached blocks
    peak_device_blocks: int = 0  # most device blocks in use at once


@dataclass(frozen=True, slots=True)
class Gauges:
    """At this moment; waiting and swapped are numbers of sequences, as running is.

    Blocks that are only cached count as free.
    """

    used_blocks: int
    free_blocks: int
    used_host_blocks: int
    free_host_blocks: int
    waiting: int  # includes the choices that wait for their request's prompt
    running: int
    swapped: int
