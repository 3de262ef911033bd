"""What a step sends over a network by rank and node count: the model that `nodes` is held against.

Owns the formulas; plain Python, nothing is sent. They follow Gloo's algorithms (broadcast.cc,
allreduce.cc, gather.cc and transport/tcp/pair.cc of its source), as torch uses them on the CPU:

    broadcast    a binomial tree from the source: the ranks less one messages in all, the source
                 sends one for each time the ranks can be halved
    all-reduce   a ring, each rank to the one before it: 2 (ranks - 1) / ranks of the tensor from
                 each rank, in at least 4 (ranks - 1) messages
    gather       one message from each rank to the one that gathers

Each message has a header and is announced by its sender, and each receiver says that it is ready:
three times 48 bytes. A process-group channel broadcasts among all ranks, a two-level channel among
the first ranks of the nodes alone; shared memory sends nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

HEADER = 48  # bytes: `Op::preamble` of gloo/transport/tcp/pair.h
_SEGMENT = 1 << 20  # bytes: the most that a ring sends in one message
_PER_CHUNK = 2  # the fewest messages for each rank's share


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks on nodes, alike on each; ranks of a node are neighbours."""

    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def node_of(self, rank: int) -> int:
        return rank // self.per_node

    def leaders(self) -> list[int]:
        return [node * self.per_node for node in range(self.nodes)]


class Traffic:
    """Messages with a payload, and all bytes, from each rank to each other."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        ranks = range(layout.ranks)
        self.messages = [[0.0 for _ in ranks] for _ in ranks]
        self.bytes = [[0.0 for _ in ranks] for _ in ranks]

    def send(self, source: int, destination: int, payload: float, count: float = 1) -> None:
        """`count` messages of `payload` bytes together."""
        self.messages[source][destination] += count
        self.bytes[source][destination] += payload + 2 * HEADER * count
        self.bytes[destination][source] += HEADER * count

    def by_rank(self) -> list[float]:
        """Bytes that each rank sends."""
        return [sum(row) for row in self.bytes]

    def total(self) -> float:
        return sum(self.by_rank())

    def num_messages(self) -> float:
        return sum(map(sum, self.messages))

    def between_nodes(self) -> float:
        """Bytes that leave a node."""
        node_of = self.layout.node_of
        return sum(
            nbytes
            for source, row in enumerate(self.bytes)
            for destination, nbytes in enumerate(row)
            if node_of(source) != node_of(destination)
        )


def broadcast(layout: Layout, ranks: Sequence[int], nbytes: int) -> Traffic:
    """From the first of `ranks` to the others; the tree of gloo/broadcast.cc."""
    traffic = Traffic(layout)
    reach = 1  # who has it: the first so many
    while reach < len(ranks):
        for at in range(min(reach, len(ranks) - reach)):
            traffic.send(ranks[at], ranks[at + reach], nbytes)
        reach *= 2
    return traffic


def frame(layout: Layout, transport: str, nbytes: int) -> Traffic:
    """A step of `nbytes`, the capacity that is broadcast, over "two-level" or "process-group"."""
    if transport == "two-level":
        return broadcast(layout, layout.leaders(), nbytes)
    return broadcast(layout, range(layout.ranks), nbytes)


def all_reduce(layout: Layout, nbytes: int) -> Traffic:
    """A sum of `nbytes` over all ranks; the ring of gloo/allreduce.cc."""
    traffic, ranks = Traffic(layout), layout.ranks
    if ranks == 1:
        return traffic
    segments = max(-(-nbytes // _SEGMENT), _PER_CHUNK * ranks)
    per_rank = -(-segments // ranks)
    for rank in range(ranks):
        share = 2 * (ranks - 1) / ranks
        traffic.send(rank, (rank - 1) % ranks, share * nbytes, 2 * (ranks - 1) * per_rank)
    return traffic


def gather(layout: Layout, nbytes: int) -> Traffic:
    """`nbytes` of each rank, to rank 0; gloo/gather.cc."""
    traffic = Traffic(layout)
    for rank in range(1, layout.ranks):
        traffic.send(rank, 0, nbytes)
    return traffic


def depth(count: int) -> int:
    """Messages one after the other until all of `count` ranks of a broadcast have it."""
    return (count - 1).bit_length()
