"""Who a rank is: from torchrun's variables, else from the store its group came up with."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from onecast.telemetry.auto_identity import Identity, identify

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "nightly",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}


def all_of(world_size: int, who: Callable[[int], Identity]) -> list[Identity]:
    found: list[Identity | None] = [None] * world_size

    def one(rank: int) -> None:
        found[rank] = who(rank)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert None not in found
    return [identity for identity in found if identity is not None]


def test_torchrun_says_all_but_what_tells_runs_apart() -> None:
    def environ(rank: int) -> dict[str, str]:
        return TORCHRUN | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "GROUP_RANK": str(rank // 2),
        }

    first, second = dist.HashStore(), dist.HashStore()
    ranks = [identify(rank, 4, first, environ(rank)) for rank in range(4)]
    assert [(one.local_rank, one.local_world_size) for one in ranks] == [
        (0, 2), (1, 2), (0, 2), (1, 2)
    ]  # fmt: skip
    assert len({one.engine_id for one in ranks}) == 1
    assert ranks[0].engine_id.startswith("nightly-")
    assert ranks[0].key == ranks[1].key != ranks[2].key == ranks[3].key
    again = identify(0, 4, second, environ(0))  # the same command, a minute later
    assert again.engine_id != ranks[0].engine_id and again.key != ranks[0].key


def test_without_a_store_what_the_launcher_says_must_do() -> None:
    for store in (None, dist.Store()):
        one, other = (identify(3, 4, store, TORCHRUN) for _ in range(2))
        assert one == other
        restarted = identify(3, 4, store, TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"})
        assert restarted.key != one.key
    alone = [identify(0, 1, None, {}) for _ in range(2)]
    assert alone[0].key != alone[1].key


def test_ranks_that_nobody_launched_tell_their_hosts(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    ranks = all_of(3, lambda rank: identify(rank, 3, dist.FileStore(path, 3), {}))
    assert [(one.local_rank, one.local_world_size) for one in ranks] == [(0, 3), (1, 3), (2, 3)]
    assert len({(one.engine_id, one.key) for one in ranks}) == 1
    assert ranks[0].engine_id.startswith("torch-")


def test_ranks_of_other_hosts_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    store.set("onecast/host/0", "another host")
    assert identify(1, 2, store, {}).local_rank == 0
    assert identify(1, 2, store, {}).local_world_size == 1


def test_a_rank_that_never_tells_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onecast.telemetry.auto_identity._HOSTS_TIMEOUT_S", 0.05)
    found = identify(1, 2, dist.HashStore(), {})
    assert (found.local_rank, found.local_world_size) == (0, 1)


@pytest.mark.parametrize(
    "changes", [{"RANK": "0"}, {"WORLD_SIZE": "8"}, {"LOCAL_RANK": "x"}, {"LOCAL_RANK": "2"}]
)
def test_variables_of_another_group_are_not_believed(changes: dict[str, Any]) -> None:
    store = dist.HashStore()
    store.set("onecast/host/2", "elsewhere")
    store.set("onecast/host/0", "elsewhere")
    store.set("onecast/host/1", "elsewhere")
    assert identify(3, 4, store, TORCHRUN | changes).local_world_size == 1
