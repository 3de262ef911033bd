"""Carries out steps on one rank: block operations, then the forward; and the followers' loop.

Knows nothing of requests or of scheduling; rank 0 drives its own executor through `engine.py`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from onecast.comm import Channel, Closed, Frame

from .kv_cache import KVCache
from .model_runner import ModelRunner
from .observer import Observer


class StepExecutor:
    """Applies the block operations of a step to this rank's KV cache and runs the model."""

    def __init__(self, model: ModelRunner, kv_cache: KVCache, observer: Observer) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._observer = observer

    @property
    def asynchronous(self) -> bool:
        """Whether `execute` returns while a device is still at it."""
        return self._kv_cache.device.type == "cuda"

    @property
    def bytes_per_block(self) -> int:
        """Of this rank's part of a block, all layers."""
        return self._kv_cache.bytes_per_block(self._kv_cache.spec, self._kv_cache.block_size)

    def execute(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Run one step; `inputs` is the step's frame as `InputBuilder.build` lays it out.

        Returns the float32 logits `[num_rows, vocab_size]` on the driver, None elsewhere, and
        None for a step without sequences, which only moves blocks.
        """
        self._kv_cache.apply(inputs, self._observer.phase)
        if not inputs["seq_lens"].shape[0]:
            return None
        with self._observer.phase("model.forward"):
            return self._model.forward(inputs, self._kv_cache)

    def follow(self, channel: Channel) -> int:
        """Carry out what the driver publishes until it closes the channel; returns the steps."""
        step = 0
        while True:
            with self._observer.step(step) as observed:
                with self._observer.phase("step.receive"):
                    frame = _next_frame(channel)
                    if frame is None:
                        observed.discard()
                        return step
                with frame:
                    inputs = frame.mapping
                    assert inputs["step"] == step, f"driver is at {inputs['step']}, not {step}"
                    idle: bool = inputs.get("idle", False)
                    if idle:
                        observed.discard()
                    else:
                        observed.set_batch_size(inputs["seq_lens"].shape[0])
                        self.execute(inputs)
            step += 1
            while idle:  # outside any step: nobody waits for one
                frame = _next_frame(channel)
                if frame is None:
                    return step
                with frame:
                    idle = frame.mapping["idle"]


def _next_frame(channel: Channel) -> Frame | None:
    """The next frame; None when the driver has closed the channel."""
    try:
        return channel.receive()
    except Closed:
        return None
