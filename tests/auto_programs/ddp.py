"""A training script that has never heard of telemetry: DistributedDataParallel over Gloo."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from waiting import wait_for_the_test


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(int(sys.argv[1])):
        torch.manual_seed(step * dist.get_world_size() + dist.get_rank())
        optimizer.zero_grad()
        loss = model(torch.randn(8, 16)).square().mean()
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        optimizer.step()
    parameters = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    print(f"rank {dist.get_rank()} parameters {parameters.double().sum().item():.6f}", flush=True)
    wait_for_the_test(dist.get_rank())
    if "CRASH" in os.environ and dist.get_rank() == 1:
        raise RuntimeError("as the test wants")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
