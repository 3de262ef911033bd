"""What a rank brings to a collective of shared memory, as one number for the others to compare.

Owns its bits, and its words for people.

    bit 0-6   dtype, 0: one that no frame carries      bit 8     to be gathered, not to be summed
    bit 7     not strided                              bit 9-63  bytes
"""

import torch

from .dtypes import TENSOR_DTYPES

NOT_STRIDED, GATHERED, _BYTES_SHIFT = 1 << 7, 1 << 8, 9
_CODES = {dtype: code for code, dtype in enumerate(TENSOR_DTYPES, start=1)}

assert len(_CODES) < NOT_STRIDED


def pack_brought(nbytes: int, dtype: torch.dtype, flags: int = 0) -> int:
    return nbytes << _BYTES_SHIFT | flags | _CODES.get(dtype, 0)


def describe_brought(brought: int) -> str:
    names = {code: TENSOR_DTYPES[dtype] for dtype, code in _CODES.items()}
    name = names.get(brought & NOT_STRIDED - 1, "another dtype")
    sparse = ", not strided" if brought & NOT_STRIDED else ""
    gathered = " to be gathered" if brought & GATHERED else ""
    return f"{brought >> _BYTES_SHIFT:,} bytes of {name}{sparse}{gathered}"
