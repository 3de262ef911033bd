"""`torch.cuda` with the streams of `racing_streams`: what a program calls, put on the machine.

A helper, not a test.
"""

import contextlib
import itertools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from racing_streams import Event, Machine, Stream


@contextlib.contextmanager
def racing_streams(machine: Machine) -> Iterator[None]:
    """`torch.cuda` is the machine; tensors that it adopted are moved by it."""
    empty, copy, to, numpy = torch.empty, torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.numpy
    numbers = itertools.count(1)

    @contextlib.contextmanager
    def use(stream: Stream) -> Iterator[None]:
        machine.stack.append(stream)
        try:
            yield
        finally:
            machine.stack.pop()

    def known(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in machine.memories

    def empty_(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        if pin_memory:
            machine.adopt(made, "page-locked pairs")
        return made

    def copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not (known(self) and known(source)):
            return copy(self, source, non_blocking)
        assert non_blocking, "the host would wait"
        assert len(self) == len(source)
        machine.log.append(f"copy of {len(self)} on {machine.current.name}")
        machine.submit(machine.rows(source), machine.rows(self), lambda: copy(self, source), "copy")
        return self

    def to_(self: torch.Tensor, *options: Any, non_blocking: bool = False) -> torch.Tensor:
        if not known(self):
            return to(self, *options, non_blocking=non_blocking)
        assert non_blocking, "the host would wait"
        made = torch.full_like(self, -1)
        machine.adopt(made, "uploaded pairs")
        machine.homes[made.untyped_storage().data_ptr()] = machine.current.name
        machine.submit(machine.rows(self), machine.rows(made), lambda: copy(made, self), "upload")
        return made

    def numpy_(self: torch.Tensor) -> Any:
        if known(self):
            machine.host_writes(self, "pairs written")
        return numpy(self)

    def record_stream(self: torch.Tensor, stream: Stream) -> None:
        machine.recorded.add((self.untyped_storage().data_ptr(), stream.name))

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "Stream": lambda device: machine.stream(f"side {next(numbers)}"),
            "Event": lambda enable_timing=False: Event(machine),
            "_sleep": lambda cycles: None,
            "current_stream": lambda device: machine.current,
            "stream": use,
            "device": lambda device: contextlib.nullcontext(),
            "synchronize": lambda device: machine.finish(),
            "get_device_properties": lambda device: types.SimpleNamespace(multi_processor_count=4),
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "empty", empty_)
        for name, method in {
            "copy_": copy_,
            "to": to_,
            "numpy": numpy_,
            "record_stream": record_stream,
            "is_pinned": lambda self: known(self),
        }.items():
            patch.setattr(torch.Tensor, name, method)
        yield
