"""The demo's network as it is trained: a Llama of 2.9 million parameters in plain PyTorch.

Owns the sizes, the `config.json` that states them, and a forward pass over whole windows, fast on
a CPU. Knows nothing of caches, ranks or serving: that is the runtime's own Llama, which reads
what this one learned.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 2048, 256, 4, 8, 4, 512
CONTEXT = 512
ROPE_THETA, NORM_EPS = 10000.0, 1e-5

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": NORM_EPS,
    "rope_theta": ROPE_THETA,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "float16",
}


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (HIDDEN,), self.weight.to(x.dtype), NORM_EPS)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Attention of [batch, heads, length, size], a block of queries at a time.

    For heads this small, on a CPU, over twice as fast as F.scaled_dot_product_attention.
    """
    mask = torch.full((block, block), -math.inf, dtype=q.dtype).triu(1)
    q = q * q.shape[-1] ** -0.5
    parts = []
    for start in range(0, q.shape[2], block):
        stop = min(start + block, q.shape[2])
        scores = q[:, :, start:stop] @ k[:, :, :stop].transpose(-1, -2)
        seen = F.pad(mask[: stop - start, : stop - start], (start, 0))
        parts.append((scores + seen).softmax(-1).to(v.dtype) @ v[:, :, :stop])
    return torch.cat(parts, dim=2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k_proj = nn.Linear(HIDDEN, HIDDEN // HEADS * KV_HEADS, bias=False)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN // HEADS * KV_HEADS, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, length, -1, HIDDEN // HEADS).transpose(1, 2)

        def rotated(h: Tensor) -> Tensor:
            first, second = h.chunk(2, dim=-1)  # the halves rotate against each other
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

        q, k, v = rotated(heads(self.q_proj(x))), rotated(heads(self.k_proj(x))), self.v_proj(x)
        k, v = (h.repeat_interleave(HEADS // KV_HEADS, dim=1) for h in (k, heads(v)))
        out = causal_attention(q, k, v)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, HIDDEN))
        return projected


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return projected


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Llama(nn.Module):
    """The network, its parameters under the names of LlamaForCausalLM, less the prefix `model.`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RMSNorm()
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if deep else 0.02)
        size = HIDDEN // HEADS
        frequencies = ROPE_THETA ** (-torch.arange(0, size, 2) / size)
        self.angles = torch.outer(torch.arange(CONTEXT), frequencies)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy of the next token; windows: int64 [batch, at most CONTEXT + 1]."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.embed_tokens(windows[:, :-1]).bfloat16()
            angles = self.angles[: x.shape[1]]
            cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
            for layer in self.layers:
                x = layer(x, cos, sin)
            logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
