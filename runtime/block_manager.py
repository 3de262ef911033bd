"""Which blocks hold the keys and values of which sequence.

Owns the device pool, the host pool and the block tables of the sequences, and writes down the
moves (`BlockOps`) that make the workers' memory agree. Does not decide who runs, and never sees
the memory itself.

Three kinds of sharing:

- Forked sequences refer to the same device blocks. Only the last, partly filled one is ever written
  again, and whoever writes it while others refer to it gets a copy (copy on write).
- A full block never changes, so its swapped copy stays as good as the block itself. The two
  are remembered as twins while both live: a sibling swapped out later refers to the host
  copy, and one swapped in refers to the device block, without moving anything.
- A partly filled block has no twin: every sequence swaps out a copy of its own.
"""

from collections.abc import Iterable

from .block_ops import BlockOps
from .block_pool import BlockPool
from .request import Sequence


class BlockManager:
    """Block tables over a device pool and a host pool.

    Between `begin_step` calls, `swap_out`, `swap_in` and `reserve` must come in this order, the
    order in which the workers carry out the moves: bookkeeping and memory then pass through the
    same states, and a block freed by one call can be handed out by the next.
    """

    def __init__(self, num_blocks: int, num_host_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.device = BlockPool("device", num_blocks)
        self.host = BlockPool("host", num_host_blocks)
        self.ops = BlockOps()
        self._host_twin: dict[int, int] = {}  # device block -> host block of equal content
        self._device_twin: dict[int, int] = {}  # and back

    def begin_step(self) -> BlockOps:
        """The empty list of moves that the calls from here on fill."""
        self.ops = BlockOps()
        return self.ops

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

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
        table = sequence.block_table
        index = sequence.num_computed // self.block_size
        if index < len(table) and self.device.references[table[index]] > 1:
            source, target = table[index], self.device.allocate()
            self.ops.copy.append((source, target))
            self.device.release(source)
            table[index] = target
        for _ in range(self.blocks_for(sequence.num_tokens) - len(table)):
            table.append(self.device.allocate())

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, with the computed tokens of `parent`, refer to the same blocks."""
        assert not child.block_table and not child.host_block_table
        used = self.blocks_for(parent.num_computed)
        child.block_table = [self.device.share(block) for block in parent.block_table[:used]]
        child.num_computed = parent.num_computed

    def can_swap_out(self, sequence: Sequence) -> bool:
        table = sequence.block_table[: self.blocks_for(sequence.num_computed)]
        return sum(block not in self._host_twin for block in table) <= self.host.num_free

    def swap_out(self, sequence: Sequence) -> None:
        """Move what is computed to host blocks; blocks that siblings refer to stay for them."""
        assert not self.ops.swap_in and not self.ops.copy, "swap-outs come first in a step"
        full = sequence.num_computed // self.block_size
        used = self.blocks_for(sequence.num_computed)
        for index, block in enumerate(sequence.block_table[:used]):
            host_block = self._host_twin.get(block)
            if host_block is None:
                host_block = self.host.allocate()
                self.ops.swap_out.append((block, host_block))
                if index < full:
                    self._host_twin[block] = host_block
                    self._device_twin[host_block] = block
            else:
                self.host.share(host_block)
            sequence.host_block_table.append(host_block)
        self._release_device(sequence)

    def missing_to_swap_in(self, sequence: Sequence) -> int:
        """How many device blocks `swap_in` would take."""
        resident = sum(block in self._device_twin for block in sequence.host_block_table)
        return self.blocks_for(sequence.num_tokens) - resident

    def swap_in(self, sequence: Sequence) -> None:
        """Bring a swapped sequence back, with room for all its known tokens."""
        assert not self.ops.copy, "swap-ins come before copies in a step"
        full = sequence.num_computed // self.block_size
        for index, host_block in enumerate(sequence.host_block_table):
            block = self._device_twin.get(host_block)
            if block is None:
                block = self.device.allocate()
                self.ops.swap_in.append((host_block, block))
                if index < full:
                    self._host_twin[block] = host_block
                    self._device_twin[host_block] = block
            else:
                self.device.share(block)
            sequence.block_table.append(block)
        self._release_host(sequence)
        self.reserve(sequence)

    def free(self, sequence: Sequence) -> None:
        """Give back whatever the sequence holds, on the device and on the host."""
        self._release_device(sequence)
        self._release_host(sequence)

    def _release_device(self, sequence: Sequence) -> None:
        for block in sequence.block_table:
            if self.device.release(block) and block in self._host_twin:
                del self._device_twin[self._host_twin.pop(block)]
        sequence.block_table = []

    def _release_host(self, sequence: Sequence) -> None:
        for block in sequence.host_block_table:
            if self.host.release(block) and block in self._device_twin:
                del self._host_twin[self._device_twin.pop(block)]
        sequence.host_block_table = []
