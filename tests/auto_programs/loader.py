"""Ranks that have no optimizer, and data loader workers, which are forked from them."""

import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from waiting import wait_for_the_test


def main() -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    numbers = torch.arange(float(sys.argv[1]))
    for batch in DataLoader(numbers, batch_size=1, num_workers=2, multiprocessing_context="fork"):
        dist.all_reduce(batch)
    wait_for_the_test(dist.get_rank())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
