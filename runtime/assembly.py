"""An engine around rank 0, whatever feeds it: a batch file, or requests over HTTP.

Owns how settings and what the rank has (blocks, a channel, an executor) become an engine.
"""

from .config import EngineConfig
from .engine import Engine
from .model_config import ModelConfig
from .rank import Rank
from .sampling import Sampler
from .scheduler import Scheduler, SchedulerConfig
from .tokenizer import Tokenizer


def make_engine(
    config: EngineConfig, rank: Rank, model: ModelConfig, tokenizer: Tokenizer
) -> Engine:
    """The driver's loop, within the limits of `config` and of the rank's KV cache."""
    kv_cache = rank.kv_cache
    limits = SchedulerConfig(
        block_size=config.block_size,
        num_blocks=kv_cache.num_blocks,
        num_host_blocks=kv_cache.num_host_blocks,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_size=config.max_batch_size,
        max_model_len=config.context_limit(model.max_position_embeddings),
        chunked_prefill=not config.no_chunked_prefill,
        prefix_caching=not config.no_prefix_caching,
    )
    return Engine(
        scheduler=Scheduler(limits, model.eos_token_ids),
        channel=rank.channel,
        executor=rank.executor,
        sampler=Sampler(),
        tokenizer=tokenizer,
        observer=rank.observer,
        overlap=not config.no_overlap,
    )
