"""One Triton kernel that copies scattered rows of bytes, between device memory and page-locked
host memory or within the device.

Owns how such a copy is split over programs. Knows nothing of streams or steps. Imports triton: to
be imported where it is needed, by callers that can do without.

    source row --+                                             +-- destination row
                 |   pairs[i] = (source row, destination row)  |
    [ tile 0 | tile 1 | ... | tile T-1 ]    ==>    [ tile 0 | tile 1 | ... | tile T-1 ]

The n * T tiles of a call are taken in turn by a bounded number of programs: few where the other
side is the host, whose link a handful of multiprocessors fill, so that what runs beside keeps the
rest; many within the device. A GPU reads and writes page-locked host memory at its own address
(Triton takes the tensor as it is, triton-lang/triton#1197), so both directions are one kernel.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from .block_mover import Pairs
from .pair_uploads import PairUploads

TILE_BYTES = 16384  # 64 of each thread: four accesses of 16 bytes under way at once
NUM_WARPS = 8
HOST_PROGRAMS = 32  # 512 KiB under way: several times what a link holds in the time of a round trip
PROGRAMS_PER_MULTIPROCESSOR = 8  # within the device: all that fit, nothing runs beside

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


# Whatever changes from call to call is kept out of what a kernel is compiled for.
@triton.jit(do_not_specialize=["num_tiles"])  # type: ignore[untyped-decorator]
def _move_rows(  # type: ignore[no-untyped-def]
    source,
    destination,
    pairs,
    num_tiles,
    WORDS: tl.constexpr,  # of a row
    TILES: tl.constexpr,  # of a row
    TILE: tl.constexpr,  # words of a tile
):
    within = tl.arange(0, TILE)
    tile = tl.program_id(0)
    # Not `for`: the interpreter of Triton 3.6 takes no range of what a program only knows itself.
    while tile < num_tiles:
        pair = pairs + 2 * (tile // TILES)
        # int64, as the pairs are: a pool may have more than 2 ** 31 words.
        from_row = source + tl.load(pair) * WORDS
        to_row = destination + tl.load(pair + 1) * WORDS
        words = (tile % TILES) * TILE + within
        # Each byte is read and written once: it should not push out what the forward will need.
        if WORDS % TILE == 0:
            moved = tl.load(from_row + words, eviction_policy="evict_first")
            tl.store(to_row + words, moved, eviction_policy="evict_first")
        else:
            inside = words < WORDS
            moved = tl.load(from_row + words, mask=inside, eviction_policy="evict_first")
            tl.store(to_row + words, moved, mask=inside, eviction_policy="evict_first")
        tile += tl.num_programs(0)


def as_words(rows: Tensor) -> Tensor:
    """`rows`, uint8 [n, bytes of a row], as the widest words that divide a row: [n, words]."""
    row_bytes = rows.shape[1]
    size = next(size for size in _WORDS if row_bytes % size == 0)
    return rows.view(_WORDS[size])


def move_rows(source: Tensor, destination: Tensor, pairs: Tensor, programs: int) -> None:
    """Copy row `pairs[i, 0]` of `source` to row `pairs[i, 1]` of `destination`, for all i.

    On the current stream, in any order: no row is a destination twice or both source and
    destination. `source` and `destination` are of one dtype and [n, words] each (`as_words`), in
    the device's memory or page-locked; they may be the same. `pairs` is int64 [n, 2] in the
    device's memory.
    """
    words = source.shape[1]
    assert words == destination.shape[1] and source.dtype == destination.dtype
    tile = min(TILE_BYTES // source.element_size(), triton.next_power_of_2(words))
    tiles = triton.cdiv(words, tile)
    num_tiles = len(pairs) * tiles
    if num_tiles:
        grid = (min(programs, num_tiles),)
        _move_rows[grid](
            source, destination, pairs, num_tiles, words, tiles, tile, num_warps=NUM_WARPS
        )


class RowKernel:
    """The kernel over the rows of two pools, uint8 [n, bytes of a row], called with pairs of rows.

    On the current stream and device, which is that of `device_rows`; `host_rows` is page-locked,
    or never swapped with.
    """

    def __init__(self, device_rows: Tensor, host_rows: Tensor) -> None:
        self._device_rows, self._host_rows = as_words(device_rows), as_words(host_rows)
        self._uploads = PairUploads(device_rows.device)
        multiprocessors = torch.cuda.get_device_properties(device_rows.device).multi_processor_count
        self._programs_of_swap = min(HOST_PROGRAMS, multiprocessors)
        self._programs_of_copy = multiprocessors * PROGRAMS_PER_MULTIPROCESSOR

    def swap_out(self, pairs: Pairs) -> None:
        """Copy rows from the device to the host."""
        given = self._uploads.upload(pairs)
        move_rows(self._device_rows, self._host_rows, given, self._programs_of_swap)

    def swap_in(self, pairs: Pairs) -> None:
        """Copy rows from the host to the device."""
        given = self._uploads.upload(pairs)
        move_rows(self._host_rows, self._device_rows, given, self._programs_of_swap)

    def copy(self, pairs: Pairs) -> None:
        """Copy rows within the device."""
        given = self._uploads.upload(pairs)
        move_rows(self._device_rows, self._device_rows, given, self._programs_of_copy)
