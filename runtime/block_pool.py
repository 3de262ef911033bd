"""A pool of numbered blocks: who refers to each, and which of them can be found by content.

Owns which numbers are free and how many tables name each of the others, the keys of blocks whose
content is known, and the order in which free blocks are taken. Knows neither what keys mean nor
where the blocks lie: the device's pool and the host's are two of these.

A block is free while nobody refers to it. Free blocks are taken in this order:

    blank    nothing in it that anyone could ask for
    ready    cached, and given up: whoever owns the pool has seen to its content
    idle     cached: found by its key, and in use again at once when someone refers to it

A pool that retains nothing has blank ones only.
"""

from collections import OrderedDict, deque

Key = bytes | int  # equal keys: equal content


class BlockPool:
    """Blocks 0 .. num_blocks - 1.

    `retains`: blocks with a key stay cached when they become free. `rests`: a block that was given
    back or found in a step is handed out from the next one on, as moves may still touch it.
    """

    __slots__ = (
        "_blank",
        "_by_key",
        "_idle",
        "_ready",
        "_resting",
        "_step",
        "keys",
        "name",
        "num_blocks",
        "num_evicted",
        "num_free",
        "peak_used",
        "references",
        "rests",
        "retains",
    )

    def __init__(
        self, name: str, num_blocks: int, *, retains: bool = False, rests: bool = False
    ) -> None:
        self.name = name
        self.num_blocks = num_blocks
        self.retains = retains
        self.rests = rests
        self.references = [0] * num_blocks
        self.keys: list[Key | None] = [None] * num_blocks
        self.num_free = num_blocks
        self.num_evicted = 0  # cached blocks whose content was given up, since the beginning
        self.peak_used = 0
        self._step = 0
        # Last freed, first reused: its memory is the likeliest to be in a cache still.
        self._blank = deque(range(num_blocks - 1, -1, -1))
        self._resting: list[int] = []
        # A plain dict is slow at its front: it keeps a hole for every item taken there.
        self._ready: OrderedDict[int, None] = OrderedDict()  # first given up, first reused
        self._idle: OrderedDict[int, int] = OrderedDict()  # least recently used first -> last step
        self._by_key: dict[Key, int] = {}  # of several blocks with one key, the first to have it

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_ready(self) -> int:
        """Blocks that `allocate` can hand out; idle ones are to be given up first."""
        return len(self._blank) + len(self._ready)

    def begin_step(self) -> None:
        self._step += 1
        if self._resting:
            self._blank.extend(self._resting)
            self._resting.clear()

    # -- references ----------------------------------------------------------------------------

    def allocate(self) -> int:
        """A block that was blank or ready, now blank and referred to once."""
        if self._blank:
            block = self._blank.pop()
        else:
            assert self._ready, f"{self.name} pool: all {self.num_blocks} blocks are in use"
            block, _ = self._ready.popitem(last=False)
            self.num_evicted += 1
            self._forget(block)
        self.references[block] = 1
        self._count_used()
        return block

    def share(self, block: int) -> int:
        """One more reference to a block that is in use or cached."""
        if not self.references[block]:
            assert self.keys[block] is not None, (
                f"{self.name} pool: block {block} shared while blank"
            )
            if self._idle.pop(block, None) is None:
                del self._ready[block]
            self._count_used()
        self.references[block] += 1
        return block

    def release(self, block: int, *, last: bool = False) -> None:
        """One reference less; after the last one the block is free.

        A block with a key stays cached, unless another one has the same. `last`: of the blank
        blocks, this one is to be taken after all others.
        """
        left = self.references[block] - 1
        assert left >= 0, f"{self.name} pool: block {block} released while free"
        self.references[block] = left
        if left:
            return
        self.num_free += 1
        key = self.keys[block]
        if key is not None:
            if self.retains and self._by_key.setdefault(key, block) == block:
                self._idle[block] = self._step
                return
            self._forget(block)
        if self.rests:
            self._resting.append(block)
        elif last:
            self._blank.appendleft(block)
        else:
            self._blank.append(block)

    # -- keys ----------------------------------------------------------------------------------

    def find(self, key: Key) -> int | None:
        """A block with this content, in use or cached."""
        return self._by_key.get(key)

    def set_key(self, block: int, key: Key) -> None:
        """From now on `block` has the content that `key` stands for, until it is blank again."""
        self.keys[block] = key
        self._by_key.setdefault(key, block)

    def touch(self, block: int) -> None:
        """A cached block is of use in this step: it will be given up after the others."""
        if self._idle.pop(block, None) is not None:
            self._idle[block] = self._step

    def oldest_idle(self) -> int | None:
        """The least recently used idle block, if it may be handed out in this step."""
        for block, step in self._idle.items():
            return None if self.rests and step == self._step else block
        return None

    def give_up(self, block: int) -> None:
        """An idle block may be handed out from now on; until then it is found by its key."""
        del self._idle[block]
        self._ready[block] = None

    def _forget(self, block: int) -> None:
        key = self.keys[block]
        assert key is not None
        self.keys[block] = None
        if self._by_key.get(key) == block:
            del self._by_key[key]

    def _count_used(self) -> None:
        self.num_free -= 1
        used = self.num_blocks - self.num_free
        if used > self.peak_used:
            self.peak_used = used
