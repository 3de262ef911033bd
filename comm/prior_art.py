"""The protocol that a frame replaces, written from its description, to be measured against.

Two broadcasts bring the pickled metadata, its size and then its bytes; one broadcast per tensor
follows. For comparison only: nothing in onecast uses it, and this module alone unpickles what
another rank has sent.
"""

import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class _TensorMetadata(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size


def two_broadcasts(
    mapping: Mapping[str, Any] | None, src: int = 0, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """`mapping` from global rank `src` to all ranks of `group`; tensors in host memory, top level.

    A mapping with k tensors that are not empty takes 2 + k broadcasts.
    """
    if dist.get_rank() == src:
        if mapping is None:
            raise ValueError(f"rank {src} is the source: it must pass a mapping")
        metadata = [
            (key, _TensorMetadata(value.dtype, value.shape))
            if isinstance(value, torch.Tensor)
            else (key, value)
            for key, value in mapping.items()
        ]
        pickled = torch.frombuffer(bytearray(pickle.dumps(metadata)), dtype=torch.uint8)
        dist.broadcast(torch.tensor([pickled.numel()]), src=src, group=group)
        dist.broadcast(pickled, src=src, group=group)
        for value in mapping.values():
            if isinstance(value, torch.Tensor) and value.numel():
                dist.broadcast(value.contiguous(), src=src, group=group)
        return dict(mapping)
    size = torch.empty(1, dtype=torch.int64)
    dist.broadcast(size, src=src, group=group)
    pickled = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(pickled, src=src, group=group)
    received: dict[str, Any] = {}
    for key, value in pickle.loads(pickled.numpy().tobytes()):
        if isinstance(value, _TensorMetadata):
            tensor = torch.empty(value.shape, dtype=value.dtype)
            if tensor.numel():
                dist.broadcast(tensor, src=src, group=group)
            received[key] = tensor
        else:
            received[key] = value
    return received
