"""What tests of channels share: both ends in one call, counted collectives, drawn mappings."""

import io
import warnings
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from test_frame import mappings


def exchange(channel: Any, mapping: Any) -> Any:
    """The frame of `mapping`, on either side."""
    return channel.publish(mapping) if channel.is_source else channel.receive()


def collectives() -> int:
    """How many collectives the default group has carried out, by its own count."""
    world = dist.group.WORLD
    assert world is not None
    return world._get_sequence_number_for_group()


def draw_mappings(count: int) -> bytes:
    """Mappings, drawn once for all ranks: what hypothesis draws may differ among processes."""
    drawn: list[Any] = []

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mappings)
    def draw(mapping: Any) -> None:
        drawn.append(mapping)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental")
        draw()
    buffer = io.BytesIO()
    torch.save(drawn, buffer)  # pickle by itself does not know tensors of every dtype
    return buffer.getvalue()
