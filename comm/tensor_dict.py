"""`broadcast_tensor_dict`: the drop-in for code written against vLLM's function of that name.

Owns one channel per process group and source, opened on first use; a group that is destroyed takes
its channels along. What is received is the caller's to keep, as there: every tensor is a copy.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from .channel import Channel, open_channel

# Filled by use, never at import. A channel holds its group weakly, so these entries die with it.
_channels: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, Channel]] = (
    weakref.WeakKeyDictionary()
)


def broadcast_tensor_dict(
    tensor_dict: Mapping[Any, Any] | None = None,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
) -> dict[Any, Any]:
    """Send `tensor_dict` from global rank `src` to all ranks of `group`; everyone gets it back.

    The source passes the mapping and gets it back as a dict, its values untouched; the others pass
    None. Tensors arrive on the GPU of the rank for an NCCL group, by one broadcast a call, and
    elsewhere in host memory, by what `open_channel` chooses. The first call of a group and source,
    a collective, opens a channel.
    """
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised")
    world = group if group is not None else dist.group.WORLD
    assert world is not None
    channels = _channels.setdefault(world, {})
    channel = channels.get(src)
    if channel is None:
        # Tensors that are on GPUs already would only lose by a way through host memory.
        transport = "process-group" if dist.get_backend(world) == "nccl" else "auto"
        channel = channels[src] = open_channel(world, src=src, transport=transport)
    if dist.get_rank() == src:
        if tensor_dict is None:
            raise ValueError(f"rank {src} is the source: it must pass a mapping")
        channel.publish(tensor_dict).release()
        return dict(tensor_dict)
    with channel.receive() as frame:
        kept: dict[Any, Any] = _copy(frame.mapping)
        return kept


def _copy(value: Any) -> Any:
    """`value` with every tensor cloned; what holds no tensor was made for this frame alone."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) is list:
        return [_copy(item) for item in value]
    if type(value) is tuple:
        return tuple([_copy(item) for item in value])
    return value
