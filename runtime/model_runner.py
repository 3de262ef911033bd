"""The seam between the worker loop and a model.

Owns the protocol a model fulfils and the loading of the models that come with onecast. Bring your
own by fulfilling the protocol; two things are all the loop asks for:

    class Uniform:
        '''Finds every token equally likely, and keeps nothing in the cache but zeros.'''

        cache_spec = CacheSpec(num_layers=1, num_kv_heads=1, head_dim=1, dtype=torch.float32)

        def forward(self, inputs, kv_cache):
            return torch.zeros(len(inputs["logits_indices"]), 100)
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .kv_cache import CacheSpec, KVCache
from .model_config import DTYPES, ModelConfig

__all__ = ["CacheSpec", "ModelRunner", "load_model"]


class ModelRunner(Protocol):
    """One rank's part of a model."""

    @property
    def cache_spec(self) -> CacheSpec:
        """What this rank keeps per token."""
        ...

    def forward(self, inputs: Mapping[str, Any], kv_cache: KVCache) -> Tensor | None:
        """Run one step.

        `inputs`: tensors, T tokens of B sequences, those that decode (one new token) first

            input_ids        int64 [T]
            positions        int64 [T]
            slot_mapping     int64 [T]       block * block_size + offset of each token in the cache
            query_start_loc  int32 [B + 1]   tokens of sequence b: [qsl[b], qsl[b + 1])
            seq_lens         int32 [B]       tokens in the cache after this step
            block_tables     int32 [B, W]    rows padded with 0
            logits_indices   int64 [R]       tokens whose logits are wanted

        Returns float32 logits `[R, vocab_size]` on rank 0 of the model's group, None elsewhere.
        """
        ...


def load_model(
    model_dir: str | Path,
    *,
    group: dist.ProcessGroup | None,
    device: torch.device | str,
    dtype: torch.dtype | str = "auto",
    all_reduce: Callable[[Tensor], object] | None = None,
    gather: Callable[[Tensor], Tensor | None] | None = None,
) -> ModelRunner:
    """Load this rank's part of a Hugging Face checkpoint of the Llama family.

    `group` holds the tensor-parallel ranks; None runs the whole model here. `dtype` "auto" is
    float32 on the CPU and the checkpoint's elsewhere. `all_reduce` sums a tensor over the group, in
    place, and `gather` joins tensors on its first rank, as `onecast.comm.AllReduce` does; None:
    torch.distributed does. Raises ValueError for a checkpoint or a number of ranks that does not
    work.
    """
    from .llama import LlamaModel  # a model of one's own needs none of it
    from .weights import Weights

    config = ModelConfig.from_dir(model_dir)
    config.check_tensor_parallel(1 if group is None else dist.get_world_size(group))
    device = torch.device(device)
    with Weights(
        model_dir, config, device=device, dtype=compute_dtype(dtype, config, device)
    ) as weights:
        return LlamaModel(config, weights, group=group, all_reduce=all_reduce, gather=gather)


def compute_dtype(
    dtype: torch.dtype | str, config: ModelConfig, device: torch.device
) -> torch.dtype | None:
    """The dtype to compute in; None where neither caller nor config.json says."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        if config.dtype is None:
            return None
        dtype = config.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found
