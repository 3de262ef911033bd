"""A pool of numbered blocks with reference counts.

Owns which numbers are free and how many tables name each of the others. Knows neither what the
blocks hold nor where they lie: the device's pool and the host's are two of these.
"""


class BlockPool:
    """Blocks 0 .. num_blocks - 1; a block is free while nobody refers to it."""

    __slots__ = ("_free", "name", "num_blocks", "peak_used", "references")

    def __init__(self, name: str, num_blocks: int) -> None:
        self.name = name
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.peak_used = 0
        # Last freed, first reused: its memory is the likeliest to be in a cache still.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self) -> int:
        """A free block, now referred to once."""
        assert self._free, f"{self.name} pool: all {self.num_blocks} blocks are in use"
        block = self._free.pop()
        self.references[block] = 1
        self.peak_used = max(self.peak_used, self.num_used)
        return block

    def share(self, block: int) -> int:
        """One more reference to a block in use."""
        assert self.references[block] > 0, f"{self.name} pool: block {block} shared while free"
        self.references[block] += 1
        return block

    def release(self, block: int) -> bool:
        """One reference less; True when it was the last one and the block is free now."""
        left = self.references[block] - 1
        assert left >= 0, f"{self.name} pool: block {block} released while free"
        self.references[block] = left
        if left:
            return False
        self._free.append(block)
        return True
