"""Settings of every test process and of those it starts, and the check that none of them stays."""

import os
from collections.abc import Iterator

import pytest
import torch
from cli_runs import SESSION, onecast_processes, stray_segments, wait_for

# Several ranks share few cores here: with a thread pool each they would mostly wait for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Several test sessions may share a machine: each looks after its own processes.
os.environ.update([SESSION.split("=")])


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """The test leaves no worker, no sidecar and nothing in /dev/shm."""
    segments = stray_segments()
    yield
    wait_for(lambda: not onecast_processes(), "the run's processes to end", 20)
    wait_for(lambda: stray_segments() <= segments, "the run's shared memory to go", 5)
