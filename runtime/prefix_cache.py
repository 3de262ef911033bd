"""Full blocks found again by their content.

Owns the keys of blocks: which tokens, after which others, a block holds the keys and values of. A
key is a digest of the block's tokens and of the key before it, so it stands for all tokens
from the first one on. Does not know which blocks are free or what moves them.

    key 0 = blake2b-128(             tokens 0 .. size - 1, as int64)
    key i = blake2b-128(key i - 1 || tokens i * size .. (i + 1) * size - 1)

The hash is a cryptographic one because users choose the tokens: with one that can be made to
collide, a request could be answered from the context of another.

Without prefix caching no block outlives its users, and keys are running numbers: they only tell
that a device block and a host block are copies of each other.
"""

from array import array
from hashlib import blake2b
from itertools import count
from typing import NamedTuple

from .block_pool import BlockPool, Key
from .request import Sequence


class Hits(NamedTuple):
    """The leading blocks of a sequence that are cached: where the first `num_blocks` ones are."""

    on_device: dict[int, int]  # place in the sequence -> device block
    on_host: dict[int, int]  # place in the sequence -> host block

    @property
    def num_blocks(self) -> int:
        return len(self.on_device) + len(self.on_host)


NO_HITS = Hits({}, {})


def _as_bytes(token_ids: list[int]) -> bytes:
    """Native int64; the unsigned type says the same and refuses placeholders."""
    try:
        return array("Q", token_ids).tobytes()
    except OverflowError:
        raise AssertionError("a block of tokens not known yet") from None


class PrefixCache:
    """Gives full blocks their keys, and finds the blocks that a sequence need not compute."""

    def __init__(
        self, device: BlockPool, host: BlockPool, block_size: int, *, enabled: bool
    ) -> None:
        self.enabled = enabled
        self._device = device
        self._host = host
        self._block_size = block_size
        self._numbers = count()

    def key(self, sequence: Sequence, index: int) -> Key:
        """The key of a full block of known tokens; digests are kept with the sequence."""
        if not self.enabled:
            return next(self._numbers)
        keys = sequence.block_keys
        size = self._block_size
        while len(keys) <= index:
            start = len(keys) * size
            tokens = _as_bytes(sequence.token_ids[start : start + size])
            assert len(tokens) == 8 * size, "a block that is not full"
            parent = keys[-1] if keys else b""
            keys.append(blake2b(parent + tokens, digest_size=16).digest())
        return keys[index]

    def register(self, sequence: Sequence) -> None:
        """Let the full, computed blocks of a sequence on the device be found by others."""
        if not self.enabled:
            return
        table, keys = sequence.block_table, self._device.keys
        if not table:
            return
        first = full = sequence.num_computed // self._block_size
        while first and keys[table[first - 1]] is None:
            first -= 1
        for index in range(first, full):
            self._device.set_key(table[index], self.key(sequence, index))

    def match(self, sequence: Sequence, unreadable: set[int]) -> Hits:
        """Where the leading blocks of a sequence are, but for the block of its last token.

        `unreadable`: host blocks whose content only arrives in this step.
        """
        if not self.enabled:
            return NO_HITS
        hits = Hits({}, {})
        for index in range((sequence.num_tokens - 1) // self._block_size):
            key = self.key(sequence, index)
            block = self._device.find(key)
            if block is not None:
                hits.on_device[index] = block
                continue
            block = self._host.find(key)
            if block is None or block in unreadable:
                break
            hits.on_host[index] = block
        return hits

    def next_block_is_known(self, sequence: Sequence, hits: Hits) -> bool:
        """Whether the block where these hits ended has come into a cache since."""
        index = hits.num_blocks
        if not self.enabled or index >= (sequence.num_tokens - 1) // self._block_size:
            return False
        key = self.key(sequence, index)
        return self._device.find(key) is not None or self._host.find(key) is not None
