"""A training script that has never heard of telemetry: FSDP2 (fully_shard, DTensor) over Gloo."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from waiting import wait_for_the_test


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(int(sys.argv[1])):
        model(torch.randn(8, 16)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(
            model.parameters(), 1.0
        )  # a DTensor: a functional all_reduce
        optimizer.step()
        optimizer.zero_grad()
    print(f"rank {dist.get_rank()} is done", flush=True)
    wait_for_the_test(dist.get_rank())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
