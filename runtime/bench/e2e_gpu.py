"""`onecast bench e2e` on a GPU, as far as a few minutes go: a synthetic model of real shapes.

Owns how much of it there is. Run by `onecast gpu-check`, as a process of its own; `--device cpu`
takes the same path over a small model. The whole reports go along, for `e2e_page` to show.

    TP 1   every protocol; a rank alone still makes its messages, and tells nobody
    TP 2   where two ranks meet over NCCL. Ranks that share a GPU take turns on it, and every sum
           of every layer is several of them: few steps, of what matters most
"""

import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .e2e_channels import CHANNELS, FUSED, SHM, TWO
from .e2e_measure import Amount, Chosen, measure
from .e2e_rows import BROADCAST_US, SHARE, STEP, TOKENS_PER_S
from .gpu_part import Asked, Results, Row, run_part
from .nccl import nccl_refusal
from .synthetic import default_cache, synthetic_model

MODELS = {"cuda": "1b", "cpu": "small"}
SHOWN = (TOKENS_PER_S, STEP, BROADCAST_US, SHARE)


class Case(NamedTuple):
    """One launch."""

    tp: int
    channels: tuple[str, ...]
    amount: Amount


_MOST = Amount(launches=1, rounds=2, drawn=24, telemetry_rounds=2, steps=0, batches=(1, 8, 64))
ALONE = Case(1, tuple(CHANNELS), _MOST)
TOGETHER = Case(2, tuple(CHANNELS), _MOST._replace(batches=(1, 8)))  # each on a GPU of its own
SHARING = Case(
    2, (TWO, FUSED, SHM), _MOST._replace(batches=(8,), rounds=1, drawn=12, telemetry_rounds=1)
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write rows, figures and reports; returns the exit status."""
    return run_part("onecast.runtime.bench.e2e_gpu", __doc__, _measure_part, argv)


def _measure_part(asked: Asked, results: Results) -> None:
    name = MODELS[asked.device]
    model = synthetic_model(name, default_cache())
    own_gpus = asked.device == "cuda" and torch.cuda.device_count() >= TOGETHER.tp
    for case in (ALONE, TOGETHER if own_gpus else SHARING):
        refusal = nccl_refusal(case.tp) if asked.device == "cuda" else None
        if refusal is not None:
            results.add(skipped=[refusal])
            continue
        amount = case.amount._replace(drawn=max(2, min(case.amount.drawn, asked.steps)))
        command = ["onecast", "bench", "e2e", "--synthetic", name, "--device", asked.device]
        command += ["--tp", str(case.tp)]
        chosen = Chosen(
            f"synthetic {name}",
            model,
            name,
            asked.device,
            (case.tp,),
            case.channels,
            "auto",
            shlex.join(command),
        )
        report = measure(chosen, amount, asked.timeout_s)
        results.add(rows=_shown(report, name), ratios=report["ratios"], reports=[report])


def _shown(report: Row, name: str) -> list[Row]:
    """The rows that gpu-check has tables of, in their order."""
    order = [*CHANNELS]
    rows = [row for row in report["rows"] if row["metric"] in SHOWN]
    rows.sort(key=lambda row: (row["tp"], row["batch"], order.index(row["channel"])))
    return [
        {
            **row,
            "workload": f"{name}, TP {row['tp']}, batch {row['batch']}",
            "method": row["channel"],
            "ranks": row["tp"],
            "mode": "e2e",
        }
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
