"""Settings of every test process, and of every process it starts."""

import os

import torch

# Several ranks share few cores here: with a thread pool each they would mostly wait for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
