"""Which blocks hold the keys and values of which sequence.

Owns the device pool, the host pool and the block tables of the sequences, and writes down the
moves (`BlockOps`) that make the workers' memory agree. Does not decide who runs, and never sees
the memory itself.

Three kinds of sharing:

- Forked sequences refer to the same device blocks. Only the last, partly filled one is ever written
  again, and whoever writes it while others refer to it gets a copy (copy on write).
- A full block never changes. It has a key (`prefix_cache.py`), and what has the same key has the
  same content: a sequence swapped out refers to a host copy that is there already, one swapped in
  to a device block, without moving anything. With prefix caching the keys come from the content
  and the blocks outlive their users, so that new sequences find them too.
- A partly filled block has no key: every sequence swaps out a copy of its own.

Why what is found by a key is never stale: a block with a key is full, a sequence writes only behind
its computed tokens, and a block that is handed out anew loses its key. A sequence never finds the
block of its last token, so it never has to write a block that it found.
"""

from collections.abc import Iterable

from .block_ops import BlockOps
from .block_pool import BlockPool
from .prefix_cache import Hits, PrefixCache
from .request import Sequence


class BlockManager:
    """Block tables over a device pool and a host pool.

    The workers carry out all swap-outs of a step before anything else. So what is swapped out after
    other moves were planned must be older than this step: `swap_out`, `swap_in` and `reserve` come
    in this order, and whatever takes cached blocks for something else takes those that nobody
    refers to, which hold what earlier steps left. What is filled on the host in a step is read from
    the next one on, what is read there is filled again from the next one on.
    """

    def __init__(
        self, num_blocks: int, num_host_blocks: int, block_size: int, *, prefix_caching: bool = True
    ) -> None:
        self.block_size = block_size
        self.device = BlockPool("device", num_blocks, retains=prefix_caching)
        self.host = BlockPool("host", num_host_blocks, retains=prefix_caching, rests=True)
        self.prefixes = PrefixCache(self.device, self.host, block_size, enabled=prefix_caching)
        self.ops = BlockOps()
        self._filled_host: set[int] = set()  # in this step
        self._filled_device: set[int] = set()

    def begin_step(self) -> BlockOps:
        """The empty list of moves that the calls from here on fill."""
        self.ops = BlockOps()
        self._filled_host.clear()
        self._filled_device.clear()
        self.device.begin_step()
        self.host.begin_step()
        return self.ops

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- growing -------------------------------------------------------------------------------

    def missing(self, sequences: Iterable[Sequence]) -> tuple[int, list[Sequence]]:
        """How many blocks `reserve` would take for all of them, and for which it would take any.

        Every sequence has tokens to compute, and so writes behind its computed ones.
        """
        size, references = self.block_size, self.device.references
        needed = 0
        lacking = []
        writers: dict[int, int] = {}  # shared block -> how many of the sequences write into it
        for sequence in sequences:
            table = sequence.block_table
            index = sequence.num_computed // size
            more = (len(sequence.token_ids) + size - 1) // size - len(table)
            if index < len(table) and references[table[index]] > 1:
                writers[table[index]] = writers.get(table[index], 0) + 1
            elif more <= 0:
                continue
            needed += more
            lacking.append(sequence)
        for block, count in writers.items():
            needed += min(count, references[block] - 1)  # the last one left writes in place
        return needed, lacking

    def reserve(self, sequence: Sequence) -> None:
        """Blocks of its own for every known token that is not in the cache yet.

        Gives a new sequence its first blocks and a running one its next, and replaces a shared
        block that is about to be written by a copy.
        """
        self.prefixes.register(sequence)
        table = sequence.block_table
        index = sequence.num_computed // self.block_size
        if index < len(table) and self.device.references[table[index]] > 1:
            source, target = table[index], self._take()
            self.ops.copy.append((source, target))
            self._filled_device.add(target)
            self.device.release(source)
            table[index] = target
        lacking = -(-len(sequence.token_ids) // self.block_size) - len(table)
        for _ in range(lacking):
            table.append(self._take())

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, with the computed tokens of `parent`, refer to the same blocks."""
        assert not child.block_table and not child.host_block_table
        self.prefixes.register(parent)
        used = self.blocks_for(parent.num_computed)
        child.block_table = [self.device.share(block) for block in parent.block_table[:used]]
        child.num_computed = parent.num_computed
        child.block_keys = parent.block_keys[: parent.num_computed // self.block_size]

    def free(self, sequence: Sequence) -> None:
        """Give back whatever the sequence holds, on the device and on the host."""
        self.prefixes.register(sequence)
        self._release_device(sequence)
        self._release_host(sequence)

    def register(self, sequence: Sequence) -> None:
        """Let others find the full, computed blocks of a sequence; see `PrefixCache.register`."""
        self.prefixes.register(sequence)

    # -- prefix hits ---------------------------------------------------------------------------

    def match(self, sequence: Sequence) -> Hits:
        """The leading blocks that a sequence without blocks would find; see `PrefixCache.match`."""
        return self.prefixes.match(sequence, self._filled_host)

    def missing_to_admit(self, sequence: Sequence, hits: Hits) -> int:
        """How many free device blocks `admit` would take, those that were found included."""
        references = self.device.references
        in_use = sum(references[block] > 0 for block in hits.on_device.values())
        return self.blocks_for(sequence.num_tokens) - in_use

    def admit(self, sequence: Sequence, hits: Hits) -> None:
        """Blocks for all known tokens of a new sequence; what was found counts as computed."""
        assert not sequence.block_table and not sequence.num_computed
        for block in hits.on_device.values():  # all before anything is taken: none of them is lost
            self.device.share(block)
        for block in hits.on_host.values():
            self.host.touch(block)
        for index in range(hits.num_blocks):
            if index in hits.on_device:
                block = hits.on_device[index]
            else:
                block = self._move_in(hits.on_host[index])
            sequence.block_table.append(block)
        sequence.num_computed = hits.num_blocks * self.block_size
        self.reserve(sequence)

    # -- swapping ------------------------------------------------------------------------------

    def can_swap_out(self, sequence: Sequence) -> bool:
        table = sequence.block_table[: self.blocks_for(sequence.num_computed)]
        wanted = len(table)
        for block in table:
            key = self.device.keys[block]
            copy = None if key is None else self.host.find(key)
            wanted -= copy is not None and self.host.references[copy] > 0
        return wanted <= self.host.num_free

    def swap_out(self, sequence: Sequence) -> None:
        """Move what is computed to host blocks; blocks that siblings refer to stay for them."""
        assert not self._filled_device, "swap-outs come first in a step"
        self.prefixes.register(sequence)
        full = sequence.num_computed // self.block_size
        used = self.blocks_for(sequence.num_computed)
        table = sequence.block_table[:used]
        copies: list[int | None] = []
        for index, block in enumerate(table):  # all before anything is taken: none of them is lost
            key = self.device.keys[block]
            if key is None and index < full:
                key = self.prefixes.key(sequence, index)
                self.device.set_key(block, key)
            copy = None if key is None else self.host.find(key)
            copies.append(copy if copy is None else self.host.share(copy))
        for block, copy in zip(table, copies, strict=True):
            sequence.host_block_table.append(self._move_out(block) if copy is None else copy)
        self._release_device(sequence, last=True)

    def missing_to_swap_in(self, sequence: Sequence) -> int:
        """How many free device blocks `swap_in` would take, those that were found included."""
        missing = self.blocks_for(sequence.num_tokens)
        for host_block in sequence.host_block_table:
            block = self._device_copy(host_block)
            missing -= block is not None and self.device.references[block] > 0
        return missing

    def swap_in(self, sequence: Sequence) -> None:
        """Bring a swapped sequence back, with room for all its known tokens."""
        assert not self.ops.copy, "swap-ins come before copies in a step"
        copies = [self._device_copy(host_block) for host_block in sequence.host_block_table]
        for copy in copies:  # all before anything is taken: none of them is lost
            if copy is not None:
                self.device.share(copy)
        for host_block, copy in zip(sequence.host_block_table, copies, strict=True):
            sequence.block_table.append(self._move_in(host_block) if copy is None else copy)
        self._release_host(sequence)
        self.reserve(sequence)

    # -- write-back ----------------------------------------------------------------------------

    def write_back_ahead(self, wanted: int, most: int) -> None:
        """Have `wanted` blocks that later steps can take without a move, giving up `most` at most.

        Blocks written back now are read while this step's forward runs; written back in the
        step that takes them, they would hold it up.
        """
        wanted = min(wanted, self.device.num_ready + most)
        while self.device.num_ready < wanted and self._host_has_room() and self._give_up():
            pass

    def _take(self) -> int:
        """A free device block, blank; a cached one where there is no other."""
        if not self.device.num_ready:
            self._give_up()
        return self.device.allocate()

    def _give_up(self) -> bool:
        """Let the least recently used cached block be handed out, with a host copy if possible."""
        block = self.device.oldest_idle()
        if block is None:
            return False
        # Nobody refers to it, so no move of this step fills it: its content is of earlier steps.
        assert block not in self._filled_device, f"device block {block} has no content yet"
        key = self.device.keys[block]
        assert key is not None
        copy = self.host.find(key)
        if copy is not None:
            self.host.touch(copy)
        elif self._host_has_room():
            self.host.release(self._move_out(block))
        self.device.give_up(block)
        return True

    # -- moves ---------------------------------------------------------------------------------

    def _move_out(self, block: int) -> int:
        """A new host block that this step fills with the content of `block`."""
        if self._host_has_room() and not self.host.num_ready:
            oldest = self.host.oldest_idle()
            assert oldest is not None
            self.host.give_up(oldest)
        host_block = self.host.allocate()
        self.ops.swap_out.append((block, host_block))
        self._filled_host.add(host_block)
        key = self.device.keys[block]
        if key is not None:
            self.host.set_key(host_block, key)
        return host_block

    def _move_in(self, host_block: int) -> int:
        """A new device block that this step fills with the content of `host_block`."""
        block = self._take()
        self.ops.swap_in.append((host_block, block))
        self._filled_device.add(block)
        key = self.host.keys[host_block]
        if key is not None:
            self.device.set_key(block, key)
        return block

    def _host_has_room(self) -> bool:
        return self.host.num_ready > 0 or self.host.oldest_idle() is not None

    def _device_copy(self, host_block: int) -> int | None:
        key = self.host.keys[host_block]
        return None if key is None else self.device.find(key)

    def _release_device(self, sequence: Sequence, *, last: bool = False) -> None:
        for block in reversed(sequence.block_table):  # the front of a prefix is of use the longest
            self.device.release(block, last=last)
        sequence.block_table = []

    def _release_host(self, sequence: Sequence) -> None:
        for block in reversed(sequence.host_block_table):
            self.host.release(block)
        sequence.host_block_table = []
