"""One rank of a run, set up: device, process groups, its part of the model, KV cache, channel.

Owns the order in which these come up and go down. Knows nothing of what the run is for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from onecast.comm import AllReduce, Channel, Probe, open_all_reduce, open_channel
from onecast.comm.prior_art import open_prior_channel

from .config import PRIOR_PROTOCOLS, EngineConfig, RankEnvironment
from .executor import StepExecutor
from .kv_cache import KVCache
from .memory import block_counts
from .model_config import ModelConfig
from .model_runner import ModelRunner, load_model
from .observer import Observer
from .roll_call import Roll


@dataclass(frozen=True, slots=True)
class Rank:
    """What a rank works with once it is set up."""

    environment: RankEnvironment
    channel: Channel
    all_reduce: AllReduce | None  # None: the whole model is here, or on a GPU
    executor: StepExecutor
    kv_cache: KVCache
    observer: Observer


@contextmanager
def process_groups(
    config: EngineConfig, environment: RankEnvironment, roll: Roll
) -> Iterator[tuple[torch.device, dist.ProcessGroup, dist.ProcessGroup]]:
    """Join torch.distributed, once all ranks are there; gives the device, the model's group and
    the step broadcast's.

    Two groups of the same ranks: metrics and traces tell the step broadcast from the model's own
    collectives by their names.
    """
    device = _choose_device(config, environment)
    cuda = device.type == "cuda"
    timeout = timedelta(seconds=config.timeout_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        timeout=timeout,
        store=roll.store,
        rank=environment.rank,
        world_size=environment.world_size,
        device_id=device if cuda else None,
    )
    model_group = dist.new_group(timeout=timeout, group_desc="tp")
    control_group = dist.new_group(timeout=timeout, group_desc="control")
    assert model_group is not None and control_group is not None
    yield device, model_group, control_group
    # Not in a `finally`: after an error the peers may be gone, and waiting for them in an
    # orderly shutdown would only delay the message that says so.
    dist.destroy_process_group()


@contextmanager
def open_rank(
    config: EngineConfig,
    environment: RankEnvironment,
    device: torch.device,
    model_group: dist.ProcessGroup,
    control_group: dist.ProcessGroup,
    observer: Observer,
) -> Iterator[Rank]:
    """Load this rank's part of the model, make its KV cache, open all-reduce and channel."""
    reducer = _open_all_reduce(config, environment, model_group, observer)
    model = load_model(
        config.model,
        group=model_group,
        device=device,
        dtype=config.dtype,
        all_reduce=None if reducer is None else reducer.all_reduce,
        gather=None if reducer is None else reducer.gather,
    )
    kv_cache = _make_kv_cache(config, environment, model, device)
    channel = _open_channel(config, control_group, device, observer.probe)
    executor = StepExecutor(model, kv_cache, observer)
    yield Rank(environment, channel, reducer, executor, kv_cache, observer)
    channel.close()
    if reducer is not None:
        reducer.close()
    kv_cache.close()


def _open_all_reduce(
    config: EngineConfig,
    environment: RankEnvironment,
    group: dist.ProcessGroup,
    observer: Observer,
) -> AllReduce | None:
    if environment.world_size == 1 or config.device != "cpu":
        return None
    return open_all_reduce(
        group,
        transport=config.all_reduce,
        probe=observer.collectives,
        timeout_s=config.timeout_s,
        spin=config.spin,
    )


def _open_channel(
    config: EngineConfig, group: dist.ProcessGroup, device: torch.device, probe: Probe | None
) -> Channel:
    if config.channel in PRIOR_PROTOCOLS:
        return open_prior_channel(
            config.channel, group, device=device, probe=probe, timeout_s=config.timeout_s
        )
    return open_channel(
        group,
        transport=config.channel,
        device=device,
        probe=probe,
        timeout_s=config.timeout_s,
        spin=config.spin,
    )


def _make_kv_cache(
    config: EngineConfig, environment: RankEnvironment, model: ModelRunner, device: torch.device
) -> KVCache:
    context = ModelConfig.from_dir(config.model).max_position_embeddings
    num_blocks, num_host_blocks = block_counts(
        config,
        bytes_per_block=KVCache.bytes_per_block(model.cache_spec, config.block_size),
        max_model_len=config.context_limit(context),
        device=device,
        local_world_size=environment.local_world_size,
    )
    return KVCache(
        model.cache_spec,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        block_size=config.block_size,
        device=device,
    )


def _choose_device(config: EngineConfig, environment: RankEnvironment) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", environment.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
