"""How large the broadcast of a process-group channel is, derived alike on every rank.

Owns a number and the rules by which frame lengths change it. All ranks see the same lengths in the
same order, so they always agree without a word about it.
"""

SMALLEST = 1024  # bytes
WINDOW = 256  # frames; a capacity that so many in a row left half empty shrinks


def rung(nbytes: int) -> int:
    """The capacity for a frame of `nbytes`: 1024 x 2^k x (1, 1.25, 1.5 or 1.75), next above.

    Four rungs an octave waste a fifth of a broadcast at most; a decode batch whose block tables
    grow by a column a step climbs seldom.
    """
    if nbytes <= SMALLEST:
        return SMALLEST
    quarter = 1 << max((nbytes - 1).bit_length() - 3, 0)
    return -(-nbytes // quarter) * quarter


class Capacity:
    """`nbytes` of the next first broadcast."""

    def __init__(self) -> None:
        self.nbytes = SMALLEST
        self._largest = 0
        self._frames = 0

    def saw(self, total: int) -> None:
        """A frame of `total` bytes went by."""
        if total > self._largest:
            self._largest = total
        self._frames += 1
        if total > self.nbytes:
            self.nbytes = rung(total)
        elif self._frames < WINDOW:
            return
        elif rung(self._largest) * 2 <= self.nbytes:
            self.nbytes = rung(self._largest)
        self._largest = 0
        self._frames = 0
