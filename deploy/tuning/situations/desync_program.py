"""A program with a bug: each rank decides for itself when it has done enough.

    torchrun --nproc-per-node 2 desync_program.py SECONDS [--agree]

Ranks work in step, an all_reduce each, until their own share converges; then they fetch the result
from rank 0. The shares differ, so rank 1 leaves the loop first: it waits for a broadcast that rank
0, which waits for it in the next all_reduce, never sends. With --agree they decide together. Ends
with an error when a collective takes longer than SECONDS, which is the group's timeout.
"""

import argparse
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from onecast.telemetry import current_session  # noqa: TID251

PACE_S = 0.03
CONVERGED = 1e-3
SHRINK = (0.95, 0.93)  # of what is left, what a step of each rank leaves


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("timeout_s", type=float)
    parser.add_argument("--agree", action="store_true")
    options = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.timeout_s))
    rank, session = dist.get_rank(), current_session()
    left, total, step, done = 1.0, torch.zeros(1024), 0, False
    while not done:
        with session.step(step) if session is not None else nullcontext():
            time.sleep(PACE_S)
            left *= SHRINK[rank]
            total.fill_(left)
            dist.all_reduce(total)
            done = left < CONVERGED
            if options.agree:
                all_done = torch.tensor(int(done))
                dist.all_reduce(all_done, op=dist.ReduceOp.MIN)
                done = bool(all_done)
        step += 1
    with session.step(step) if session is not None else nullcontext():
        dist.broadcast(total, src=0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
