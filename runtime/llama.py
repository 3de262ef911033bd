"""Llama-family models, tensor-parallel, in plain PyTorch: inference only.

Owns how the weights are divided among ranks and the forward pass. The attention over the cache is
in `attention.py`; reading the files is in `weights.py`.

Of every matrix each rank holds a part (Megatron-LM, arXiv 1909.08053): query, key, value, gate and
up projections by output, so that no communication is needed before the attention and the
activation; output and down projections by input, so that the sum over ranks is the result. The
vocabulary is divided too: ranks look up and score the tokens of their part.

Collectives of one forward pass of N ranks > 1, in this order:

    all_reduce                  embedding
    all_reduce, all_reduce      attention and MLP, every layer
    gather                      logits, to rank 0 of the group
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding, silu

from .attention import AttentionStep
from .kv_cache import CacheSpec, KVCache
from .layers import Rotary, rms_norm, rotate
from .model_config import ModelConfig
from .projection import Projection
from .weights import Weights


@dataclass(frozen=True, slots=True)
class _Layer:
    """This rank's weights of one layer."""

    input_norm: Tensor
    qkv: Projection  # query rows of this rank's heads, then key rows, then value rows
    qk_norm: Tensor | None  # [heads + kv heads, head_dim]
    output: Projection  # its bias on rank 0 only: the sum over ranks must hold it once
    mlp_norm: Tensor
    gate_up: Projection  # gate rows, then up rows
    down: Projection  # its bias on rank 0 only


class LlamaModel:
    """One rank's part of a Llama, Mistral, Qwen2 or Qwen3 model; a `ModelRunner`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        group: dist.ProcessGroup | None,
        all_reduce: Callable[[Tensor], object] | None = None,
        gather: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        """`group`: the ranks that share the model; None: all of it is here.

        `all_reduce` sums a tensor over the group, in place, and `gather` joins what its ranks have
        along the last axis on its rank 0; None: torch.distributed does.
        """
        self.config = config
        self._group = group
        self._all_reduce = all_reduce
        self._gather = gather
        self._rank = 0 if group is None else dist.get_rank(group)
        self._tp = 1 if group is None else dist.get_world_size(group)
        config.check_tensor_parallel(self._tp)
        self._num_heads = config.num_heads // self._tp
        self._num_kv_heads = config.kv_heads_per_rank(self._tp)
        self.cache_spec = CacheSpec(
            config.num_layers, self._num_kv_heads, config.head_dim, weights.dtype
        )
        self.device = weights.device
        self._rotary = Rotary(
            config.rope, config.head_dim, device=weights.device, dtype=weights.dtype
        )
        # Shards of the vocabulary have one size, so that a gather can take them: the last are
        # padded with zeros where the vocabulary does not divide evenly.
        self._shard_size = -(-config.vocab_size // self._tp)
        self._first_token = self._rank * self._shard_size
        self._embedding = self._read_vocabulary(weights, "model.embed_tokens.weight")
        self._layers = [
            self._read_layer(weights, f"model.layers.{number}.")
            for number in range(config.num_layers)
        ]
        self._norm = weights.whole("model.norm.weight")
        tied = config.tie_word_embeddings
        head = self._embedding if tied else self._read_vocabulary(weights, "lm_head.weight")
        self._head = Projection(head, shared=tied)

    def collectives_per_forward(self) -> dict[str, int]:
        """How often `forward` calls each collective, as torch.distributed names them."""
        if self._tp == 1:
            return {}
        return {"all_reduce": 1 + 2 * self.config.num_layers, "gather": 1}

    @torch.inference_mode()
    def forward(self, inputs: Mapping[str, Any], kv_cache: KVCache) -> Tensor | None:
        """Run one step; see `ModelRunner.forward`."""
        config, device = self.config, self.device
        attention = AttentionStep(inputs, kv_cache, sliding_window=config.sliding_window)
        angles = self._rotary.angles(inputs["positions"].to(device))
        hidden = self._embed(inputs["input_ids"].to(device))
        for number, layer in enumerate(self._layers):
            normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
            hidden += self._attend(number, layer, normed, angles, attention)
            normed = rms_norm(hidden, layer.mlp_norm, config.rms_norm_eps)
            gate, up = layer.gate_up(normed).chunk(2, -1)
            hidden += self._sum(layer.down(silu(gate).mul_(up)))
        hidden = hidden.index_select(0, inputs["logits_indices"].to(device))
        hidden = rms_norm(hidden, self._norm, config.rms_norm_eps)
        return self._gather_logits(self._head(hidden))

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self._tp == 1:
            return embedding(token_ids, self._embedding)
        local = token_ids - self._first_token
        elsewhere = (local < 0) | (local >= self._shard_size)
        hidden = embedding(local.masked_fill_(elsewhere, 0), self._embedding)
        return self._sum(hidden.masked_fill_(elsewhere[:, None], 0))

    def _attend(
        self,
        number: int,
        layer: _Layer,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        attention: AttentionStep,
    ) -> Tensor:
        num_rotated = self._num_heads + self._num_kv_heads
        qkv = layer.qkv(hidden)
        qkv = qkv.view(hidden.shape[0], -1, self.config.head_dim)
        query_key, value = qkv[:, :num_rotated], qkv[:, num_rotated:]
        if layer.qk_norm is not None:
            query_key = rms_norm(query_key, layer.qk_norm, self.config.rms_norm_eps)
        query_key = rotate(query_key, *angles)
        query, key = query_key[:, : self._num_heads], query_key[:, self._num_heads :]
        attended = attention.attend(number, query, key, value)
        return self._sum(layer.output(attended))

    def _sum(self, partial: Tensor) -> Tensor:
        """The sum over the ranks of the group, in place."""
        if self._tp > 1:
            if self._all_reduce is not None:
                self._all_reduce(partial)
            else:
                dist.all_reduce(partial, group=self._group)
        return partial

    def _gather_logits(self, logits: Tensor) -> Tensor | None:
        """Float32 logits `[R, vocab_size]` on rank 0 of the group, None elsewhere."""
        if self._tp == 1:
            return logits.float()
        if self._gather is not None:
            joined = self._gather(logits)
        elif self._rank != 0:
            dist.gather(logits, group=self._group, group_dst=0)
            return None
        else:
            parts = [torch.empty_like(logits) for _ in range(self._tp)]
            dist.gather(logits, parts, group=self._group, group_dst=0)
            joined = torch.cat(parts, -1)
        return None if joined is None else joined[:, : self.config.vocab_size].float()

    def _read_vocabulary(self, weights: Weights, name: str) -> Tensor:
        """This rank's rows of an embedding, zeros beyond the vocabulary."""
        size = self.config.vocab_size
        start, stop = (min(self._first_token + n, size) for n in (0, self._shard_size))
        return weights.rows(name, start, stop, pad_to=self._shard_size)

    def _read_layer(self, weights: Weights, prefix: str) -> _Layer:
        config, first = self.config, self._rank == 0
        head_dim, heads, kv_heads = config.head_dim, self._num_heads, self._num_kv_heads
        query = (self._rank * heads * head_dim, (self._rank + 1) * heads * head_dim)
        # Fewer key/value heads than ranks: neighbours hold the same one.
        kv_start = self._rank * config.num_kv_heads // self._tp
        key_value = (kv_start * head_dim, (kv_start + kv_heads) * head_dim)
        inner = config.intermediate_size // self._tp
        intermediate = (self._rank * inner, (self._rank + 1) * inner)
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."

        def merged(kind: str, *parts: tuple[str, tuple[int, int]]) -> Tensor:
            return torch.cat([weights.rows(f"{name}.{kind}", *rows) for name, rows in parts])

        qkv = (
            (f"{attention}q_proj", query),
            (f"{attention}k_proj", key_value),
            (f"{attention}v_proj", key_value),
        )
        gate_up = ((f"{mlp}gate_proj", intermediate), (f"{mlp}up_proj", intermediate))
        qk_norm = None
        if config.qk_norm:
            qk_norm = torch.cat(
                (
                    weights.whole(f"{attention}q_norm.weight").expand(heads, -1),
                    weights.whole(f"{attention}k_norm.weight").expand(kv_heads, -1),
                )
            )
        return _Layer(
            input_norm=weights.whole(f"{prefix}input_layernorm.weight"),
            qkv=Projection(
                merged("weight", *qkv), merged("bias", *qkv) if config.qkv_bias else None
            ),
            qk_norm=qk_norm,
            output=Projection(
                weights.columns(f"{attention}o_proj.weight", *query),
                weights.whole(f"{attention}o_proj.bias") if config.output_bias and first else None,
            ),
            mlp_norm=weights.whole(f"{prefix}post_attention_layernorm.weight"),
            gate_up=Projection(
                merged("weight", *gate_up), merged("bias", *gate_up) if config.mlp_bias else None
            ),
            down=Projection(
                weights.columns(f"{mlp}down_proj.weight", *intermediate),
                weights.whole(f"{mlp}down_proj.bias") if config.mlp_bias and first else None,
            ),
        )
