"""The block moves of one step, and the rules that make them safe to carry out.

Owns the three lists of pairs and their check. Knows nothing of sequences or memory.

Every worker carries out a step in this order, each kind completely before the next:

    1. swap_out   device block -> host block      reads what earlier steps left
    2. swap_in    host block   -> device block    may land where a swap-out read
    3. copy       device block -> device block    may land where a swap-out read
    4. forward    writes keys and values

Within a kind the pairs may be carried out in any order or at once. Hence:

    a. A block is a target at most once in a step (one list or two).
    b. No host block is both filled by a swap-out and read by a swap-in: planned in one order it
       would be spoilt, in the other it would be read too early. A host block that a swap-in reads
       is filled from the next step on, one that a swap-out fills is read from the next step on.
    c. No block is both read and filled by copies (no chains), nor read by a copy and filled by a
       swap-in, so that swaps may run on a stream of their own.

A cached block that is taken for something else is written back by a swap-out that is planned after
swap-ins and copies, and yet carried out before them. Such a swap-out must read what earlier
steps left:

    d. No swap-out reads a block that an earlier planned move of the step fills. It may well be
       filled by a move planned later: that is what the block is taken for.

Pairs do not tell who was planned first, so d is the block manager's to assert; a, b and c are
checked here, whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

Pair = tuple[int, int]


@dataclass(slots=True)
class BlockOps:
    """(source, destination) pairs of one step; blocks of the pools that the kind names."""

    swap_out: list[Pair] = field(default_factory=list)  # (device block, host block)
    swap_in: list[Pair] = field(default_factory=list)  # (host block, device block)
    copy: list[Pair] = field(default_factory=list)  # (device block, device block)

    def validate(self, num_blocks: int, num_host_blocks: int) -> None:
        """AssertionError, naming rule and pairs, where a rule of this page is broken."""
        if not (self.swap_out or self.swap_in or self.copy):
            return
        _check_range("swap_out", self.swap_out, num_blocks, num_host_blocks)
        _check_range("swap_in", self.swap_in, num_host_blocks, num_blocks)
        _check_range("copy", self.copy, num_blocks, num_blocks)

        filled_host: dict[int, str] = {}
        _check_targets("swap_out", self.swap_out, filled_host)
        _check_sources("swap_in", self.swap_in, filled_host)

        filled_device: dict[int, str] = {}
        _check_targets("swap_in", self.swap_in, filled_device)
        _check_targets("copy", self.copy, filled_device)
        _check_sources("copy", self.copy, filled_device)


def _check_range(kind: str, pairs: Iterable[Pair], num_sources: int, num_targets: int) -> None:
    for source, target in pairs:
        assert 0 <= source < num_sources and 0 <= target < num_targets, (
            f"out of range: {kind} ({source}, {target}) with"
            f" {num_sources} source blocks, {num_targets} target blocks"
        )


def _check_targets(kind: str, pairs: Iterable[Pair], filled: dict[int, str]) -> None:
    for source, target in pairs:
        pair = f"{kind} ({source}, {target})"
        assert target not in filled, (
            f"filled twice: {pair} fills the block that {filled[target]} fills"
        )
        filled[target] = pair


def _check_sources(kind: str, pairs: Iterable[Pair], filled: dict[int, str]) -> None:
    for source, target in pairs:
        assert source not in filled, (
            f"chain: {kind} ({source}, {target}) reads the block that {filled.get(source)} fills"
        )
