"""broadcast_tensor_dict, and the protocol it replaces."""

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from channel_runs import collectives
from test_frame import assert_arrived, block_message

from onecast.comm import UnsupportedTypeError, broadcast_tensor_dict, tensor_dict
from onecast.comm.testing import run_ranks


def mapping_of(step: int) -> dict[str, Any]:
    return {
        **block_message(),
        "step": step,
        "nested": [torch.full((3,), step), (torch.ones(2), "text"), {"deep": torch.zeros(0, 2)}],
        "ids": [1, 2, step],
        "transposed": torch.arange(6).reshape(2, 3).T,
    }


def call_from_both_ends(rank: int) -> None:
    kept = []
    for step in range(6):
        before = collectives()
        for src in (0, 1):
            sent = mapping_of(step + 10 * src)
            got = broadcast_tensor_dict(sent if rank == src else None, src=src)
            assert_arrived(sent, got) if rank != src else None
            kept.append((sent, got))
        if step > 1:
            assert collectives() == before  # the ranks share memory
    for sent, got in kept:  # later calls have not touched what earlier ones returned
        if got["transposed"] is not sent["transposed"]:
            assert_arrived(sent, got)
        got["copy"].add_(1)
    assert len(tensor_dict._channels[dist.group.WORLD]) == 2


def refuse_and_go_on(rank: int) -> None:
    if rank == 0:
        with pytest.raises(UnsupportedTypeError, match="a: object of type object"):
            broadcast_tensor_dict({"a": object()})
        with pytest.raises(ValueError, match="rank 0 is the source"):
            broadcast_tensor_dict(None)
    got = broadcast_tensor_dict({"a": 1} if rank == 0 else None)
    assert got == {"a": 1}


def forget_destroyed_groups(rank: int) -> None:
    group = dist.new_group()
    assert broadcast_tensor_dict({"a": rank}, group=group) == {"a": 0}
    assert group in tensor_dict._channels
    before = len(tensor_dict._channels)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert len(tensor_dict._channels) == before - 1


def run_all(rank: int) -> None:
    for scenario in (refuse_and_go_on, call_from_both_ends, forget_destroyed_groups):
        scenario(rank)
        dist.barrier()


def test_what_is_broadcast_is_the_callers_to_keep_and_costs_no_collective_on_one_host():
    run_ranks(run_all, 2)


def test_without_a_process_group_it_says_so():
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        broadcast_tensor_dict({})
