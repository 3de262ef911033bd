"""What request bodies are checked against, from the limits of an engine.

Owns which of its limits binds. Torch-free: the HTTP server's process has none.
"""

from .admission import SchedulerConfig
from .model_config import ModelConfig
from .openai_body import BodyContext
from .tokenizer import Tokenizer


def body_context(
    limits: SchedulerConfig, tokenizer: Tokenizer, model: ModelConfig, name: str
) -> BodyContext:
    """A sequence must fit the model's context, and the device's cache when it is there alone."""
    cached = limits.num_blocks * limits.block_size
    if cached < limits.max_model_len:
        return BodyContext(tokenizer, cached, model.vocab_size, name, limited_by="KV cache")
    return BodyContext(tokenizer, limits.max_model_len, model.vocab_size, name)
