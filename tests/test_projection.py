"""A projection gives what torch's product gives, whatever layout its weight is kept in."""

import platform

import pytest
import torch
from torch.nn.functional import linear

from onecast.runtime import projection
from onecast.runtime.projection import Projection

PACKS = platform.machine() == "x86_64" and torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "out", "size"), [(0, 8, 4), (1, 7, 3), (5, 1, 64), (67, 96, 33), (1, 1025, 1025)]
)
@torch.inference_mode()
def test_it_is_the_product_with_the_weight(rows, out, size, has_bias, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(out, size, dtype=dtype), torch.randn(out, dtype=dtype)
    given = torch.randn(rows, size, dtype=dtype)
    expected = linear(given, weight, bias if has_bias else None)
    found = Projection(weight, bias if has_bias else None)(given)
    assert found.dtype == dtype and found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=3e-2 if dtype == torch.bfloat16 else 1e-4,
                               atol=1e-1 if dtype == torch.bfloat16 else 1e-4)  # fmt: skip


@torch.inference_mode()
def test_rows_that_are_a_view_are_taken_as_they_lie():
    weight, wide = torch.randn(6, 4), torch.randn(3, 8)
    found = Projection(weight)(wide[:, ::2])
    torch.testing.assert_close(found, linear(wide[:, ::2], weight))


@pytest.mark.skipif(not PACKS, reason="weights are packed on x86-64 with oneDNN only")
def test_only_small_float32_weights_are_kept_twice():
    small, large = torch.randn(8, 16), torch.randn(1024, 1024)
    assert Projection(small).nbytes == 2 * small.nbytes
    for weight in (large, large.bfloat16(), small.bfloat16()):
        kept = Projection(weight)
        assert kept.is_packed == (weight.dtype == torch.float32 or projection._has_bfloat16())
        assert kept.nbytes == weight.nbytes


@pytest.mark.skipif(not PACKS, reason="weights are packed on x86-64 with oneDNN only")
def test_a_large_weight_that_something_else_needs_is_not_kept_twice(monkeypatch):
    weight = torch.randn(256, 64)
    assert Projection(weight, shared=True).is_packed
    monkeypatch.setattr(projection, "_MOST_SHARED_BYTES", weight.nbytes - 1)
    kept = Projection(weight, shared=True)
    assert not kept.is_packed
    assert kept._plain is weight
    assert Projection(weight).is_packed


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_left_as_they_are(dtype):
    kept = Projection(weight := torch.randn(4, 4).to(dtype))
    assert not kept.is_packed and kept._plain is weight


def test_other_processors_are_left_alone(monkeypatch):
    monkeypatch.setattr(projection.platform, "machine", lambda: "aarch64")
    assert not Projection(torch.randn(4, 4)).is_packed
