"""The pieces of a Llama layer that need neither weights' names nor other ranks.

Owns root-mean-square normalisation and rotary position embedding, both computed as transformers
computes them, so that tokens agree.
"""

import math

import torch
from torch import Tensor

from .model_config import RopeConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension in float32, return to x's dtype, then scale."""
    if x.is_cpu and x.dtype == torch.float32 and weight.dim() == 1:
        return torch.rms_norm(x, weight.shape, weight, eps)  # the same, in one call from Python
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return wide.to(x.dtype).mul_(weight)


class Rotary:
    """Rotary position embedding of one model.

    Cosines and sines are computed for the positions of each step, once for all layers: a table for
    every position of a 128k context would be 64 MB and no faster.
    """

    def __init__(
        self, rope: RopeConfig, head_dim: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._scale = rope.attention_factor
        self._dtype = dtype

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `[T, 1, head_dim]` for positions `[T]`."""
        angles = positions.float()[:, None] * self._frequencies
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        # rotate_half(x) is roll(x) with its first half negated: the sign is put into the sine.
        return (
            torch.cat((cos, cos), -1).to(self._dtype)[:, None],
            torch.cat((-sin, sin), -1).to(self._dtype)[:, None],
        )


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Apply rotary embedding to `[T, heads, head_dim]`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies: Tensor = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies)
    if rope.rope_type == "yarn":
        return _yarn(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, the rest blended."""
    wavelengths = 2 * math.pi / frequencies
    smooth = (rope.original_max_position_embeddings / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp from kept to stretched frequencies."""
    half = frequencies.shape[0]

    def dimension(rotations: float) -> float:  # that turns this often within the original context
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return half * math.log(turns) / math.log(rope.theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001  # keeps the ramp finite
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)
