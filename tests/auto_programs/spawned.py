"""A program that starts its ranks itself, without torchrun or any of its variables."""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from waiting import wait_for_the_test


def work(rank: int, path: str, calls: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for _ in range(calls):
        dist.all_reduce(torch.ones(4))
    wait_for_the_test(rank)
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        mp.spawn(work, (f"{home}/store", int(sys.argv[1])), nprocs=2)


if __name__ == "__main__":
    main()
