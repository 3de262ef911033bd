"""Matrix products with the weights of a model: `rows @ weight.T + bias`.

Owns how a weight is kept for that. On an x86 CPU it is laid out once as oneDNN reads it best, by
`mkldnn::_linear_pointwise`, which torch's own compiler uses for frozen weights. torch's plain
product leaves float32 to MKL, which does not make the most of AMD's processors, and lays bfloat16
out anew in every call. Measured on one core of one of those (AVX-512), plain over packed time:

    rows                    1       8      32     128
    float32   512 x 256    0.45    1.4     1.8     2.2
    float32  1376 x 256    0.73    2.1     2.2     2.3
    float32  4096 x 256    1.1     2.9     2.3     2.3
    float32  4096 x 2048   2.0     3.0     2.6     2.3
    bfloat16 1376 x 256    1.6     1.5     1.2     1.06
    bfloat16 4096 x 2048   2.6     1.8     1.3     1.07

Small float32 weights are therefore kept in both layouts, the plain one for single rows. Everything
else is kept once, but for weights that something else needs as they are (`shared`): of those a
second, packed copy is made up to 64 MiB, and larger ones stay plain. Elsewhere than on x86, on a
GPU, and in any other dtype the product is torch's own.
"""

import platform

import torch
from torch import Tensor
from torch.nn.functional import linear

_PACKED = {torch.float32, torch.bfloat16}
_SMALL = 1 << 20  # numbers: below, one row in float32 is quicker by torch's own product
_MOST_SHARED_BYTES = 64 << 20


class Projection:
    """`weight`: `[out_features, in_features]`; `bias`: `[out_features]` or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, shared: bool = False) -> None:
        """`shared`: the weight stays in memory whatever becomes of it here."""
        self._bias = bias
        self._packed: Tensor | None = None
        if _can_pack(weight) and not (shared and weight.nbytes > _MOST_SHARED_BYTES):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        keeps_plain = weight.dtype == torch.float32 and weight.numel() < _SMALL
        self._plain = weight if self._packed is None or keeps_plain else None

    @property
    def is_packed(self) -> bool:
        """Whether products of several rows are oneDNN's."""
        return self._packed is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, in all layouts that it is kept in here, without the bias."""
        kept = (self._plain, self._packed)
        return sum(one.numel() * one.element_size() for one in kept if one is not None)

    def __call__(self, rows: Tensor) -> Tensor:
        """`[R, in_features]` to `[R, out_features]`; not for autograd."""
        packed = self._packed
        if packed is None or (self._plain is not None and rows.shape[0] == 1):
            assert self._plain is not None
            return linear(rows, self._plain, self._bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, packed, self._bias, "none", [], ""
        )
        return product


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in _PACKED
        and weight.numel() > 0
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (weight.dtype == torch.float32 or _has_bfloat16())
    )


def _has_bfloat16() -> bool:
    found: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return found
