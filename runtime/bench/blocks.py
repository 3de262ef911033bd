"""`onecast bench blocks`: how fast the blocks of a KV cache move, beside plain copies of the bytes.

Owns the command: whose blocks, how many of them, how many launches, and where the report goes. What
is compared is in `blocks_moves`, the figures and their targets in `blocks_report`; what a GPU does
is measured by `blocks_gpu`, which `onecast gpu-check` starts.

The methods take turns round by round, so that a slow spell of the machine meets all; between
launches the machine may be another, and a figure shows its spread over them.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from onecast.runtime.kv_cache import CacheSpec

from .blocks_moves import BLOCK_SIZE, Headline, Model, Plan, launch
from .blocks_report import make_ratios, make_rows, print_report
from .figures import describe_machine
from .terminal import deliver, make_parser


def _llama_3_8b(tp: int) -> Model:
    return Model(f"Llama-3-8B bf16, TP {tp}", CacheSpec(32, 8 // tp, 128, torch.bfloat16))


_HEADLINE = _llama_3_8b(2)
_MODELS = (
    _llama_3_8b(1),
    _HEADLINE,
    _llama_3_8b(8),
    Model("demo checkpoint fp32, TP 2", CacheSpec(4, 2, 32, torch.float32)),
)
QUICK = Plan(
    models=_MODELS,
    counts=(1, 16, 64),
    pool_bytes=256 << 20,
    cell_s=0.08,
    least_rounds=3,
    launches=1,
    headline=Headline(_HEADLINE.name, 64),
)
FULL = Plan(
    models=_MODELS,
    counts=(1, 4, 16, 64, 256),
    pool_bytes=512 << 20,
    cell_s=0.35,
    least_rounds=4,
    launches=3,
    headline=Headline(_HEADLINE.name, 64),
)


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write JSON if asked; returns the exit status."""
    parser = make_parser("blocks", __doc__, "one short launch, under a minute")
    options = parser.parse_args(argv)
    report = measure(QUICK if options.quick else FULL)
    return deliver(report, options.json, print_report)


def measure(plan: Plan) -> dict[str, Any]:
    """The whole report: rows of what was measured, ratios against the figures to reach."""
    load = os.getloadavg()[0]
    launches = []
    for number in range(plan.launches):
        print(f"launch {number + 1} of {plan.launches}", file=sys.stderr, flush=True)
        launches.append(launch(plan))
    return {
        "bench": "blocks",
        "machine": describe_machine(load, f"blocks of {BLOCK_SIZE} tokens, copies on one core"),
        "headline": plan.headline,
        "rows": make_rows(launches),
        "ratios": make_ratios(launches, plan.headline),
    }
