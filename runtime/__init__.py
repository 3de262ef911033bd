"""Tensor-parallel inference workers. Run them with the `onecast` command or under torchrun.

For an engine of one's own: `Scheduler` decides, `InputBuilder` makes the frame of a step,
`StepExecutor` carries it out on each rank with a `ModelRunner`, and `Engine` is the driver's loop
around them. Names are imported when first asked for: deciding needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .executor import StepExecutor
    from .input_builder import InputBuilder
    from .kv_cache import CacheSpec, KVCache
    from .model_runner import ModelRunner, load_model
    from .request import Request, SampledToken, SamplingParams, Sequence
    from .sampling import Sampler
    from .scheduler import Scheduler, SchedulerConfig
    from .step import StepPlan
    from .tokenizer import Tokenizer

_MODULES = {
    "CacheSpec": "kv_cache",
    "Engine": "engine",
    "InputBuilder": "input_builder",
    "KVCache": "kv_cache",
    "ModelRunner": "model_runner",
    "Request": "request",
    "SampledToken": "request",
    "Sampler": "sampling",
    "SamplingParams": "request",
    "Scheduler": "scheduler",
    "SchedulerConfig": "scheduler",
    "Sequence": "request",
    "StepExecutor": "executor",
    "StepPlan": "step",
    "Tokenizer": "tokenizer",
    "load_model": "model_runner",
}

__all__ = [
    "CacheSpec",
    "Engine",
    "InputBuilder",
    "KVCache",
    "ModelRunner",
    "Request",
    "SampledToken",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "SchedulerConfig",
    "Sequence",
    "StepExecutor",
    "StepPlan",
    "Tokenizer",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
