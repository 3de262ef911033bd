"""The element types that frames carry, and their names on the wire.

Owns three tables. Quantised tensors are absent: their values mean nothing without a quantiser, and
torch is retiring them. The sub-byte integers are absent: torch cannot copy them.
"""

from typing import Any

import numpy as np
import torch

_NAMES = """
bool uint8 uint16 uint32 uint64 int8 int16 int32 int64
float16 bfloat16 float32 float64 complex32 complex64 complex128
float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2
""".split()

# dtype -> name, of every dtype that a tensor in a frame can have (in this version of torch)
TENSOR_DTYPES: dict[torch.dtype, str] = {
    getattr(torch, name): name for name in _NAMES if hasattr(torch, name)
}
TENSOR_DTYPES_BY_NAME = {name: dtype for dtype, name in TENSOR_DTYPES.items()}

# name -> dtype, of every dtype there is: as a value, any dtype can travel
DTYPES_BY_NAME: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}

# numpy's native-endian types, as which torch dtype they arrive
FROM_NUMPY: dict["np.dtype[Any]", torch.dtype] = {
    np.dtype(name): getattr(torch, name)
    for name in """bool uint8 uint16 uint32 uint64 int8 int16 int32 int64
                   float16 float32 float64 complex64 complex128""".split()
}
NUMPY_DTYPES = frozenset(FROM_NUMPY.values())
