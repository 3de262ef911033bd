"""A queue with the face that vLLM's and SGLang's publish, and nothing of theirs behind it."""

import pickle

import torch
import torch.distributed as dist

SOURCE = """
from stand_in_queue import MessageQueue as MessageQueue  # not the package of that name
"""


class MessageQueue:
    def __init__(self, group):
        self._group = group

    @staticmethod
    def create_from_process_group(pg, max_chunk_bytes, max_chunks, writer_rank=0):
        assert max_chunk_bytes * max_chunks > 0
        dist.barrier(pg)
        return MessageQueue(pg)

    def enqueue(self, obj):
        pickled = pickle.dumps(obj)
        dist.broadcast(torch.tensor([len(pickled)]), 0, group=self._group)
        dist.broadcast(torch.frombuffer(bytearray(pickled), dtype=torch.uint8), 0, self._group)

    def dequeue(self):
        size = torch.empty(1, dtype=torch.int64)
        dist.broadcast(size, 0, group=self._group)
        content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self._group)
        return pickle.loads(content.numpy())


def install(folder, module):
    """Let `module` be importable from a folder; what is in it speaks through the queue above."""
    *packages, name = module.split(".")
    for package in packages:
        folder = folder / package
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    (folder / f"{name}.py").write_text(SOURCE)
