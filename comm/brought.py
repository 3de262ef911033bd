"""What a rank brings to a collective of shared memory, as one number for the others to compare.

Owns its bits, and its words for people.

    bit 0-6   dtype, 0: one that no frame carries      bit 8     to be gathered, not to be summed
    bit 7     not strided                              bit 9-63  bytes; if to be gathered, rows
                                                                 (28 bits) over columns (27)

Of rows and columns beyond their bits the rest is not compared.
"""

import torch

from .dtypes import TENSOR_DTYPES

NOT_STRIDED, GATHERED, _BYTES_SHIFT = 1 << 7, 1 << 8, 9
_COLUMN_BITS, _ROW_BITS = 27, 28
_CODES = {dtype: code for code, dtype in enumerate(TENSOR_DTYPES, start=1)}

assert len(_CODES) < NOT_STRIDED


def pack_brought(nbytes: int, dtype: torch.dtype, flags: int = 0) -> int:
    return nbytes << _BYTES_SHIFT | flags | _CODES.get(dtype, 0)


def pack_gathered(tensor: torch.Tensor, flags: int = 0) -> int:
    """Of a tensor `[..., columns]`, of any layout."""
    columns = tensor.shape[-1]
    rows = tensor.numel() // columns if columns else 0
    shape = rows % (1 << _ROW_BITS) << _COLUMN_BITS | columns % (1 << _COLUMN_BITS)
    return pack_brought(shape, tensor.dtype, flags | GATHERED)


def describe_brought(brought: int) -> str:
    names = {code: TENSOR_DTYPES[dtype] for dtype, code in _CODES.items()}
    name = names.get(brought & NOT_STRIDED - 1, "another dtype")
    sparse = ", not strided" if brought & NOT_STRIDED else ""
    size = brought >> _BYTES_SHIFT
    if brought & GATHERED:
        rows, columns = size >> _COLUMN_BITS, size % (1 << _COLUMN_BITS)
        return f"{rows:,} rows of {columns:,} {name}{sparse} to be gathered"
    return f"{size:,} bytes of {name}{sparse}"
