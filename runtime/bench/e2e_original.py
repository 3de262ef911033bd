"""The table of the change that all of this answers, with ours beside it.

Owns its figures: vLLM's pull request 4757 sent the block lists of a step with metadata of a known
size, one broadcast in the place of two. Those were measured on GPUs, ours here: ratios compare,
milliseconds do not.
"""

from collections.abc import Sequence

import torch

from onecast.comm.prior_mapping import divide

from .e2e_channels import CHANNELS, FUSED, SHM
from .figures import Row
from .methods import steady_frame
from .workloads import make_workload

_BLOCK_LISTS = "W1"
_FURTHER = 8  # tensors, to see what one more costs


def compare_with_original(protocols: Sequence[Row]) -> Row:
    """`protocols`: what the ablation measured of the real ones."""
    ours = {row["channel"]: row for row in protocols if row["workload"] == _BLOCK_LISTS}
    tensors = {name: row["tensors"] for name, row in ours.items()}
    table = [
        ("time of the block message, ms", 0.388, 0.128,
         {name: row["measured_us"] / 1e3 for name, row in ours.items()}),
        ("metadata of the block message, bytes", 260, 107,
         {name: row["metadata_bytes"] for name, row in ours.items()}),
        ("metadata of a further tensor, bytes", 120, 52,
         {name: _metadata_of_a_tensor(name) for name in CHANNELS}),
        ("broadcasts beside the tensors' own", 2, 1,
         {name: row["broadcasts"] - (0 if name in (FUSED, SHM) else tensors[name])
          for name, row in ours.items()}),
    ]  # fmt: skip
    rows = [
        {"what": what, "before": before, "after": after, "ours": found}
        for what, before, after, found in table
    ]
    return {"rows": rows}


def _metadata_of_a_tensor(channel: str) -> float:
    base = make_workload(_BLOCK_LISTS)
    more = {f"further_{i}": torch.zeros(8, 2, dtype=torch.int64) for i in range(_FURTHER)}
    both = [_metadata_bytes(channel, mapping) for mapping in ({**base, **more}, base)]
    return (both[0] - both[1]) / _FURTHER


def _metadata_bytes(channel: str, mapping: Row) -> int:
    if channel in (FUSED, SHM):
        return steady_frame(mapping)[1]
    return len(divide(mapping, torch.device("cpu"))[1])
