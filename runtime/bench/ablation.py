"""What of the gain comes from fewer bytes, and what from fewer broadcasts: the four combinations.

Owns them, written alike, so that nothing but the two differs:

                        many broadcasts                   one broadcast
    fat metadata        ablation-fat-many                 ablation-fat-one
    compact metadata    ablation-compact-many             ablation-compact-one

Fat metadata is the pickled list of keys, values, dtypes and shapes that two-broadcasts sends;
compact metadata is the header and the metadata of a frame, its layout known. Many: the size, the
metadata, and each tensor have a broadcast of their own, those of the tensors all under way at once,
and received tensors are new. One: size, metadata and tensors lie in one buffer of a size that both
sides know, copied in; received tensors are views of it, kept from message to message.

The two ends are two-broadcasts and the frame of a process-group channel without what makes them
channels: time-outs, watching the peers, waiting by cadence. Those are measured beside them.
"""

import itertools
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from onecast.comm import values
from onecast.comm.frame import Encoder
from onecast.comm.header import HEADER_BYTES, aligned, read_header, write_header

from .method import Method

_SIZE_BYTES = 8
_SPARE_BYTES = 16  # plain values may grow

ABLATION = (
    "ablation-fat-many",
    "ablation-compact-many",
    "ablation-fat-one",
    "ablation-compact-one",
)


class _Spec(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


Build = Callable[[list[torch.Tensor]], dict[str, Any]]


class _Fat:
    def encode(self, mapping: dict[str, Any]) -> tuple[bytes | bytearray, list[Any]]:
        """The metadata, and the tensors."""
        metadata = [
            (key, _Spec(value.dtype, tuple(value.shape)))
            if isinstance(value, torch.Tensor)
            else (key, value)
            for key, value in mapping.items()
        ]
        return pickle.dumps(metadata), [v for v in mapping.values() if isinstance(v, torch.Tensor)]

    def decode(self, memory: memoryview) -> tuple[tuple[_Spec, ...], Build]:
        """The tensors to expect, and what makes a mapping of them."""
        metadata = pickle.loads(memory)

        def build(tensors: list[torch.Tensor]) -> dict[str, Any]:
            supply = iter(tensors)
            return {
                key: next(supply) if isinstance(value, _Spec) else value for key, value in metadata
            }

        return tuple(value for _, value in metadata if isinstance(value, _Spec)), build


class _Compact:
    def __init__(self, mapping: Mapping[str, Any]) -> None:
        self._encoder = Encoder()
        message = self._encoder.plan(mapping)
        self._encoder.commit(message)  # on both sides: the layout went ahead, once
        self._layout = message.layout
        ends = list(itertools.accumulate(rank for _, rank in self._layout.tensors))
        self._dims = list(zip([0, *ends], ends, strict=False))

    def encode(self, mapping: dict[str, Any]) -> tuple[bytes | bytearray, list[Any]]:
        message = self._encoder.plan(mapping)
        assert not message.defines
        head = bytearray(message.metadata_bytes)
        start, end = message.placement.start, message.placement.end
        number = message.layout.number
        write_header(memoryview(head), 0, number, 0, message.metadata, start, end, 0)
        return head, list(message.sources)

    def decode(self, memory: memoryview) -> tuple[tuple[_Spec, ...], Build]:
        header = read_header(memory, 0, 0)
        layout = self._layout
        items = values.unpack(memory[HEADER_BYTES : HEADER_BYTES + header.metadata_length])
        specs = tuple(
            _Spec(dtype, tuple(items[first:end]))
            for (dtype, _), (first, end) in zip(layout.tensors, self._dims, strict=True)
        )
        return specs, lambda tensors: layout.build(tensors, items[layout.num_dims :])


class _Many(Method):
    def __init__(self, name: str, codec: _Fat | _Compact) -> None:
        self.name = name
        self._codec = codec

    def send(self, mapping: dict[str, Any]) -> None:
        metadata, tensors = self._codec.encode(mapping)
        content = torch.frombuffer(bytearray(metadata), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(metadata)]), src=0)
        dist.broadcast(content, src=0)
        works = [dist.broadcast(tensor, src=0, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
        self.messages += 1
        self.broadcasts += 2 + len(tensors)
        self.metadata_bytes = _SIZE_BYTES + len(metadata)
        self.nbytes = self.metadata_bytes + sum(tensor.nbytes for tensor in tensors)

    def receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        size = torch.empty(1, dtype=torch.int64)
        dist.broadcast(size, src=0)
        content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        specs, build = self._codec.decode(memoryview(content.numpy()))  # type: ignore[arg-type]
        tensors = [torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]
        works = [dist.broadcast(tensor, src=0, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
        return build(tensors)

    def mapping(self, received: Any) -> Mapping[str, Any]:
        mapping: Mapping[str, Any] = received
        return mapping


class _One(Method):
    def __init__(self, name: str, codec: _Fat | _Compact, mapping: dict[str, Any]) -> None:
        self.name = name
        self._codec = codec
        metadata, tensors = codec.encode(mapping)
        room = _SIZE_BYTES + len(metadata) + _SPARE_BYTES
        for tensor in tensors:
            room = aligned(room) + tensor.nbytes
        self._buffer = torch.zeros(aligned(room), dtype=torch.uint8)
        self._memory = memoryview(self._buffer.numpy())  # type: ignore[arg-type]
        self._size = self._memory[:_SIZE_BYTES].cast("Q")
        self._views: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    def send(self, mapping: dict[str, Any]) -> None:
        metadata, tensors = self._codec.encode(mapping)
        specs = tuple(_Spec(tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
        end = _SIZE_BYTES + len(metadata)
        self._size[0] = len(metadata)
        self._memory[_SIZE_BYTES:end] = metadata
        torch._foreach_copy_(self._tensors(end, specs), tensors)
        dist.broadcast(self._buffer, src=0)
        self.messages += 1
        self.broadcasts += 1
        self.metadata_bytes = end
        self.nbytes = self._buffer.numel()

    def receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        dist.broadcast(self._buffer, src=0)
        end = _SIZE_BYTES + self._size[0]
        specs, build = self._codec.decode(self._memory[_SIZE_BYTES:end])
        return build(self._tensors(end, specs))

    def mapping(self, received: Any) -> Mapping[str, Any]:
        mapping: Mapping[str, Any] = received
        return mapping

    def _tensors(self, metadata_end: int, specs: tuple[_Spec, ...]) -> list[torch.Tensor]:
        start = aligned(metadata_end)
        views = self._views.get((start, specs))
        if views is None:
            views = self._views[start, specs] = []
            for dtype, shape in specs:
                nbytes = torch.Size(shape).numel() * dtype.itemsize
                views.append(self._buffer[start : start + nbytes].view(dtype).view(shape))
                start = aligned(start + nbytes)
        return views


def open_ablation(mapping: dict[str, Any]) -> list[Method]:
    """All four, on every rank alike."""
    return [
        _Many("ablation-fat-many", _Fat()),
        _Many("ablation-compact-many", _Compact(mapping)),
        _One("ablation-fat-one", _Fat(), mapping),
        _One("ablation-compact-one", _Compact(mapping), mapping),
    ]
