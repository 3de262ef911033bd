"""Five situations that tuning meets, each with a run that is in it and one that is out of it."""

from .broadcast_too_large import broadcast_too_large
from .desync_hang import desync_hang
from .situation import Outcome, Situation, carry_out
from .straggling_rank import straggling_rank
from .swap_thrashing import swap_thrashing
from .too_small_chunks import too_small_chunks

__all__ = ["SITUATIONS", "Outcome", "Situation", "carry_out"]

SITUATIONS = {
    "straggling-rank": straggling_rank,
    "broadcast-too-large": broadcast_too_large,
    "swap-thrashing": swap_thrashing,
    "too-small-chunks": too_small_chunks,
    "desync-hang": desync_hang,
}
