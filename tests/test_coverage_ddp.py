"""DistributedDataParallel: reduced by a hook that can be seen, with the same gradients."""

from collections.abc import Callable
from typing import Any

import pytest
from test_intercept import Recording

from onecast.comm.testing import run_ranks
from onecast.telemetry.ddp_hook import hook_ddp, unhook_ddp


def _train(rank: int, wrap: Callable[[Any], Any]) -> list[Any]:
    """Gradients of every step, and losses."""
    import torch

    torch.manual_seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 300), torch.nn.BatchNorm1d(300), torch.nn.ReLU(), torch.nn.Linear(300, 3)
    )
    ddp = wrap(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    torch.manual_seed(rank)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = ddp(torch.randn(5, 8)).square().mean()
        loss.backward()
        found.append([parameter.grad.clone() for parameter in ddp.parameters()])
        optimizer.step()
    return found


def _compare(rank: int) -> dict[str, Any]:
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils._pytree import tree_leaves

    def plain(model: Any) -> Any:
        return DistributedDataParallel(model, bucket_cap_mb=0.005)

    def same(one: Any, other: Any) -> bool:
        pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    before = dict(DistributedDataParallel.__dict__)
    expected = _train(rank, plain)
    unseen = Recording(rank)
    _train(rank, plain)
    unseen_difference = unseen.unrecorded()
    unseen.close()

    recording = Recording(rank)
    hook_ddp()
    hooked = _train(rank, plain)
    (coverage,) = recording.instrumentor.coverage()
    counts = {op: len(rows) for (op, _), rows in recording.seen().items()}

    def with_own_hook(model: Any) -> Any:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        ddp = plain(model)
        ddp.register_comm_hook(None, default_hooks.allreduce_hook)
        with pytest.raises(RuntimeError, match="can only be called once"):
            ddp.register_comm_hook(None, default_hooks.allreduce_hook)
        return ddp

    def with_builtin_hook(model: Any) -> Any:
        from torch.distributed import BuiltinCommHookType

        ddp = plain(model)
        ddp._register_builtin_comm_hook(BuiltinCommHookType.ALLREDUCE)
        return ddp

    own, builtin = _train(rank, with_own_hook), _train(rank, with_builtin_hook)
    assert recording.unrecorded() == 0
    unhook_ddp()
    recording.close()
    after = DistributedDataParallel.__dict__
    return {
        "hooked": same(hooked, expected),
        "own": same(own, expected),
        "builtin": same(builtin, expected),
        "coverage": (coverage.recorded, coverage.issued),
        "counts": counts,
        "unseen": unseen_difference,
        "restored": list(before) == list(after) and all(before[n] is after[n] for n in before),
    }


def test_gradients_are_the_same_and_every_bucket_is_seen() -> None:
    for found in run_ranks(_compare, 2, timeout_s=90.0):
        assert found["hooked"] and found["own"] and found["builtin"] and found["restored"]
        assert found["coverage"][0] == found["coverage"][1] > 0
        assert found["counts"]["all_reduce"] > 3, "several buckets a step"
        # At the first build the parameters, then buffers in every forward.
        assert found["counts"]["broadcast_coalesced"] >= 3
        assert found["counts"]["rebuild_buckets"] == 1
        assert found["unseen"] > 3, "without the hook the difference is told"


def _three(rank: int) -> bool:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    expected = _train(rank, DistributedDataParallel)
    hook_ddp()
    hooked = _train(rank, DistributedDataParallel)
    unhook_ddp()
    return all(
        torch.equal(a, b)
        for one, other in zip(expected, hooked, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_three_ranks_divide_alike() -> None:
    assert run_ranks(_three, 3, timeout_s=90.0) == [True] * 3
