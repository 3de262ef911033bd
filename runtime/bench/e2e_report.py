"""The rows of `onecast bench e2e`, and its figures with their targets.

Owns the names and targets. Every figure is computed from rows or from the ablation: over all
launches, its spread from each launch alone. Knows nothing of terminals.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .e2e_ablation import Launch as AblationLaunch
from .e2e_channels import FUSED, SHM, TWO
from .e2e_cost import make_ablation
from .e2e_rows import PAIRED, SHARE, STEP, TOKENS_PER_S, make_row, make_rows
from .e2e_run import Case, Turn
from .e2e_telemetry import ToggledTurn
from .figures import REPORTED, Row, make_figure

ON, OFF = f"{TOKENS_PER_S}, telemetry on", f"{TOKENS_PER_S}, telemetry off"
ON_VS_OFF = f"{TOKENS_PER_S}, on vs off"
RECORDS_ON, RECORDS_OFF = "records/step, telemetry on", "records/step, telemetry off"
STEP_ON, STEP_OFF = f"{STEP}, telemetry on", f"{STEP}, telemetry off"

TP, BATCH = 2, 8  # of the figures


class Seen(NamedTuple):
    """Everything that was measured, launch by launch."""

    turns: list[list[Turn]]
    telemetry: list[tuple[int, str, list[ToggledTurn]]]  # TP, channel
    ablation: list[AblationLaunch]


def make_all_rows(seen: Seen) -> list[Row]:
    return make_rows(seen.turns) + _telemetry_rows(seen.telemetry)


def _telemetry_rows(launches: Sequence[tuple[int, str, list[ToggledTurn]]]) -> list[Row]:
    values: dict[tuple[Case, str], list[list[float]]] = {}
    for tp, channel, turns in launches:
        for turn in turns:
            metric = STEP_ON if turn.on else STEP_OFF
            case = Case(tp, turn.batch, channel)
            values.setdefault((case, metric), []).append(turn.steps_us)
            metric = RECORDS_ON if turn.on else RECORDS_OFF
            values.setdefault((case, metric), []).append([turn.records])
        pairs: dict[tuple[int, int], dict[bool, float]] = {}
        for turn in turns:
            pairs.setdefault((turn.batch, turn.round), {})[turn.on] = turn.tokens_per_s
        for (batch, _), pair in pairs.items():
            found = {ON: pair[True], OFF: pair[False], ON_VS_OFF: pair[True] / pair[False]}
            for metric, value in found.items():
                values.setdefault((Case(tp, batch, channel), metric), []).append([value])
    return [make_row(case, None, metric, found) for (case, metric), found in values.items()]


# ---- figures

# name: (target with the shipped checkpoint on the CPU, what it is, channel, metric)
_FROM_ROWS = {
    "e2e_fused_vs_two_broadcast_tp2": (">= 1.3", "tokens/s, process group", FUSED, PAIRED),
    "e2e_shm_vs_two_broadcast_tp2": (REPORTED, "tokens/s, shared memory", SHM, PAIRED),
    "broadcast_share_of_step_shm": ("<= 0.02", "shared memory", SHM, SHARE),
    "broadcast_share_of_step_fused": (REPORTED, "process group", FUSED, SHARE),
    "broadcast_share_of_step_two_broadcasts": (REPORTED, "two-broadcasts", TWO, SHARE),
    "telemetry_on_vs_off_tokens": (">= 0.99", "tokens/s", SHM, ON_VS_OFF),
}
_FROM_MODEL = {
    "cost_model_median_error": ("relative, fitted points", "fit", "median_error"),
    "cost_model_held_out_median_error": ("relative, others", "held_out", "median_error"),
    "cost_model_held_out_max_error": ("relative, others", "held_out", "max_error"),
}
TEXTS = {
    **{name: text for name, (_, text, _, _) in _FROM_ROWS.items()},
    **{name: text for name, (text, _, _) in _FROM_MODEL.items()},
}


def make_ratios(seen: Seen, has_targets: bool) -> list[Row]:
    """The figures of TP 2 and batch 8, as far as those were measured.

    `has_targets`: it is the model and the device that the targets are for.
    """
    figures = []
    rows = make_all_rows(seen)
    alone = [make_rows([turns]) for turns in seen.turns]
    alone_telemetry = [_telemetry_rows([launch]) for launch in seen.telemetry]
    for name, (target, _, channel, metric) in _FROM_ROWS.items():
        value = _find(rows, channel, metric)
        if value is None:
            continue
        parts = alone_telemetry if metric == ON_VS_OFF else alone
        others = [found for part in parts if (found := _find(part, channel, metric)) is not None]
        figures.append(make_figure(name, target if has_targets else REPORTED, value, others))
    if seen.ablation:
        models = [make_ablation(some)["model"] for some in _all_and_each(seen.ablation)]
        for name, (_, part, error) in _FROM_MODEL.items():
            first, *others = (model[part][error] for model in models)
            figures.append(make_figure(name, REPORTED, first, others))
    return figures


def _find(rows: Sequence[Row], channel: str, metric: str) -> float | None:
    wanted = {"tp": TP, "batch": BATCH, "channel": channel, "rank": None, "metric": metric}
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            return float(row["median"])
    return None


def _all_and_each(launches: Sequence[AblationLaunch]) -> list[Sequence[AblationLaunch]]:
    return [launches, *([one] for one in launches)]
