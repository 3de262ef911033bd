"""Memory that holds one frame, and the tensors that look into it.

Owns where the tensors of a frame lie (`Placement`), the views of them into a piece of memory
(`Region`), which are kept for as long as frames repeat their dimensions, and copying into them.
Knows nothing of headers, metadata or who sends.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .dtypes import NUMPY_DTYPES
from .errors import FrameError
from .gather import Gather
from .header import ALIGNMENT, aligned
from .layout import Layout, brief
from .parts import MIXED, PLAIN_TENSORS, Source, make_guards

MAX_DIMENSION = (1 << 63) - 1
POISON = 0xA5

_GATHER_BYTES = 1 << 20  # more is copied by torch, which holds up no other thread meanwhile
_KEPT = 64  # views of so many placements are kept; decode steps repeat a handful


class Placement:
    """Where the tensors of a layout lie in a frame, for given dimensions and a given start."""

    __slots__ = ("end", "start", "tensors")

    def __init__(self, layout: Layout, dims: Sequence[int], start: int, limit: int) -> None:
        """`end`: of the last tensor. Raises FrameError if it lies beyond `limit`."""
        self.tensors: list[tuple[torch.dtype, list[int], list[int], int]] = []
        self.start = self.end = offset = start
        first = 0
        for dtype, rank in layout.tensors:
            shape = list(dims[first : first + rank])
            first += rank
            strides = [1] * rank
            count = 1
            for axis in range(rank - 1, -1, -1):
                if type(shape[axis]) is not int or not 0 <= shape[axis] <= MAX_DIMENSION:
                    raise FrameError(f"a dimension is {brief(shape[axis])}")
                strides[axis] = count
                count *= max(shape[axis], 1)
            if 0 in shape:
                if count > MAX_DIMENSION:
                    raise FrameError(f"an empty tensor has the dimensions {shape}")
                self.tensors.append((dtype, shape, strides, 0))
                continue
            self.end = offset + count * dtype.itemsize
            if self.end > limit:
                raise FrameError(f"a tensor {shape} of {dtype} ends at {self.end}, beyond {limit}")
            self.tensors.append((dtype, shape, strides, offset // dtype.itemsize))
            offset = aligned(self.end)


class Views:
    """The tensors of a placement in a region, and whether callers have left them as they were.

    They are handed out again and again. A caller may change what a view is in place (unsqueeze_,
    requires_grad_, resize_, set_ ...), for as long as the frame is its own.
    """

    __slots__ = ("_addresses", "_guards", "_placement", "tensors")

    def __init__(self, placement: Placement, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self._placement = placement
        self._addresses = [*map(torch.Tensor.data_ptr, tensors)]
        self._guards = make_guards(tensors) if tensors else None

    def are_untouched(self) -> bool:
        tensors = self.tensors
        if [*map(torch.Tensor.data_ptr, tensors)] != self._addresses:
            return False
        if self._guards is not None and self._guards.check(*tensors):
            return True
        return all(
            tensor.dtype is dtype
            and [*tensor.shape] == shape
            and [*tensor.stride()] == strides
            and not tensor.requires_grad
            for tensor, (dtype, shape, strides, _) in zip(
                tensors, self._placement.tensors, strict=True
            )
        )


class Repeated:
    """The frame that a region held last: one that repeats its dimensions has the same views."""

    __slots__ = (
        "_dims",
        "_mapping",
        "_num_dims",
        "_num_items",
        "layout",
        "start",
        "total",
        "views",
    )

    def __init__(
        self,
        layout: Layout,
        start: int,
        total: int,
        dims: list[int],
        mapping: dict[Any, Any],
        views: Views | None,
    ) -> None:
        self.layout = layout
        self.views = views
        self.start = start
        self.total = total
        self._dims = dims
        self._mapping = mapping
        self._num_dims = len(dims)
        self._num_items = len(dims) + layout.num_values

    def refill(self, items: Any) -> dict[Any, Any] | None:
        """Its mapping with the values among `items`, a frame's metadata; None: other dimensions."""
        num_dims = self._num_dims
        if (
            type(items) is not list
            or len(items) != self._num_items
            or items[:num_dims] != self._dims
        ):
            return None
        mapping = self._mapping.copy()
        for key, value in zip(self.layout.value_keys, items[num_dims:]):  # noqa: B905 - equal
            mapping[key] = value
        return mapping


class Region:
    """`tensor` as the home of a frame: uint8, one axis, address and length multiples of 64.

    `memory` is the same bytes as a memoryview, None for device memory. Views of one placement are
    the same objects from frame to frame.
    """

    def __init__(self, tensor: torch.Tensor, file: tuple[int, int] | None = None) -> None:
        """`file`: descriptor and offset of the same memory, where it is that of a file."""
        assert tensor.dtype is torch.uint8 and tensor.dim() == 1 and tensor.is_contiguous()
        assert tensor.numel() % ALIGNMENT == 0
        self.tensor = tensor
        self.nbytes = tensor.numel()
        self.memory: memoryview | None = None
        if tensor.device.type == "cpu":
            self.memory = memoryview(tensor.numpy())  # type: ignore[arg-type]
        self.repeated: Repeated | None = None  # the decoder's memory of the frame before
        self.handed: Views | None = None  # what a caller has in hands, or had
        self._file = file
        self._gathers: dict[Placement, Gather] = {}
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._views: dict[Placement, Views] = {}
        self._arrays: dict[Placement, list[np.ndarray[Any, Any] | None]] = {}

    def views(self, placement: Placement) -> list[torch.Tensor]:
        """The tensors of a frame that lies here; the caller must not change the list."""
        return self._views_of(placement).tensors

    def hand_out(self, placement: Placement) -> list[torch.Tensor]:
        """The same, for somebody who may change what they are: `take_back` has to follow."""
        self.handed = self._views_of(placement)
        return self.handed.tensors

    def take_back(self) -> None:
        """The frame was released: views that were changed are not handed out again."""
        if self.handed is not None:
            if not self.handed.are_untouched():
                self.repeated = None
                self._views.clear()
                self._typed.clear()
            self.handed = None

    def _views_of(self, placement: Placement) -> Views:
        views = self._views.get(placement)
        if views is None:
            # A view made in inference mode could not be written by a later frame outside of it.
            with torch.inference_mode(False):
                views = Views(placement, [self._view(*tensor) for tensor in placement.tensors])
            _keep(self._views, placement, views)
        return views

    def copy_in(self, placement: Placement, sources: Sequence[Source | None], kind: int) -> None:
        """Copy the sources, which are of this `kind`, to where the placement says.

        With MIXED sources, None is left out.
        """
        if kind == PLAIN_TENSORS and self._file is not None and placement.end <= _GATHER_BYTES:
            gather = self._gathers.get(placement)
            if gather is None:
                gather = Gather(*self._file, self.tensor.data_ptr(), placement)
                _keep(self._gathers, placement, gather)
            if gather.write(sources):  # type: ignore[arg-type]
                return
        views = self.views(placement)
        if kind != MIXED:
            if views:
                torch._foreach_copy_(views, sources)  # type: ignore[arg-type]
            return
        arrays = self._arrays.get(placement)
        if arrays is None:
            arrays = [view.numpy() if view.dtype in NUMPY_DTYPES else None for view in views]
            _keep(self._arrays, placement, arrays)
        # Into an array an array goes by numpy: an eighth of what torch's copy takes.
        for source, array, view in zip(sources, arrays, views, strict=True):
            if type(source) is np.ndarray:
                assert array is not None
                array[...] = source
            elif source is not None:
                view.copy_(source)  # type: ignore[arg-type]

    def poison(self) -> None:
        """Overwrite a released frame, so that a stale view shows."""
        self.tensor.fill_(POISON)

    def _view(
        self, dtype: torch.dtype, shape: list[int], strides: list[int], offset: int
    ) -> torch.Tensor:
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = self.tensor.view(dtype)
        return typed.as_strided(shape, strides, typed.storage_offset() + offset)


def _keep(cache: dict[Placement, Any], placement: Placement, value: Any) -> None:
    if len(cache) >= _KEPT:
        del cache[next(iter(cache))]  # the oldest
    cache[placement] = value
