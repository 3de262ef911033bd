"""A program that names its steps itself, on the session it finds; alone it works just as well."""

import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from waiting import wait_for_the_test

try:
    from onecast.telemetry import current_session
except ImportError:
    current_session = None


def main() -> None:
    dist.init_process_group("gloo")
    optimizer_steps, own_steps = map(int, sys.argv[1:])
    x = torch.ones(4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    for _ in range(optimizer_steps):
        dist.all_reduce(x)
        optimizer.step()
    session = current_session() if current_session is not None else None
    for step in range(100, 100 + own_steps):
        with session.step(step) if session is not None else nullcontext():
            dist.all_reduce(x)
            optimizer.step()
    wait_for_the_test(dist.get_rank())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
