"""A model that does nothing, so that what is left of a step is the loop around it.

Owns its logits: one token is the most likely wherever it is asked. Fulfils `ModelRunner`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from onecast.runtime.kv_cache import KVCache
from onecast.runtime.model_runner import CacheSpec

TOKEN = 5  # the one it answers


class NullModel:
    """Logits float32 `[num_rows, vocab_size]` from memory made once; `max_rows` bounds the rows."""

    # 1 KiB a block of 16 tokens: moving one costs little more than saying so.
    cache_spec = CacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32)

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._logits = torch.zeros(max_rows, vocab_size)
        self._logits[:, TOKEN] = 1.0

    def forward(self, inputs: Mapping[str, Any], kv_cache: KVCache) -> Tensor:
        return self._logits[: inputs["logits_indices"].shape[0]]
