"""What a finished run prints: some prompts with their completions, then its measured figures.

Owns the text alone; every number comes from the caller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(slots=True)
class RunFigures:
    """Counts of one run, all as measured on rank 0."""

    requests: int = 0
    failed_requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    elapsed_s: float = 0.0
    steps: int = 0
    channel: str = ""
    all_reduce: str = ""
    broadcasts: int = 0
    growth_steps: int | None = None  # None: the channel's frames have no capacity to outgrow
    frame_bytes: int = 0
    metadata_bytes: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    copied: int = 0
    recomputes: int = 0
    prefix_queried_tokens: int | None = None  # None: prefix caching is off
    prefix_hit_tokens: int = 0
    ranks: int = 0
    output: Path | None = None
    trace: Path | None = None
    metrics_url: str | None = None
    report: Mapping[str, Any] | None = None  # of the sidecar
    shown: list[tuple[str, Sequence[str]]] = field(default_factory=list)  # prompt, completions


def print_summary(figures: RunFigures, console: Console) -> None:
    """Print completions, the run's figures and each rank's collective latencies."""
    for prompt, completions in figures.shown:
        console.print(f"[bold]{escape(_shorten(prompt))}[/bold]")
        for text in completions:
            console.print(f"  [green]→[/green] {escape(_shorten(text))}", highlight=False)
        console.print()
    console.print(_run_table(figures))
    if figures.report is not None and figures.report["collectives"]:
        console.print(_collective_table(figures.report["collectives"]))


def _run_table(figures: RunFigures) -> Table:
    steps = max(1, figures.steps)
    table = Table(title=f"{figures.ranks} tensor-parallel ranks", show_header=False)
    table.add_column("what")
    table.add_column("figure", overflow="fold")
    outgrew = ""
    if figures.growth_steps is not None:
        outgrew = f", {figures.growth_steps:,} of which outgrew the capacity"
    failed = f" ({figures.failed_requests} failed)" if figures.failed_requests else ""
    rows = [
        ("requests", f"{figures.requests}{failed}"),
        (
            "tokens/s",
            f"{figures.generated_tokens / max(figures.elapsed_s, 1e-9):,.0f} generated "
            f"({figures.generated_tokens:,} in {figures.elapsed_s:.1f} s, "
            f"after {figures.prompt_tokens:,} prompt tokens)",
        ),
        ("steps", f"{figures.steps:,}"),
        ("control channel", figures.channel),
        (
            "control broadcasts per step",
            f"{figures.broadcasts / steps:.2f} ({figures.broadcasts:,} for {figures.steps:,} "
            f"frames{outgrew})",
        ),
        (
            "frame metadata per step",
            f"{figures.metadata_bytes / steps:,.0f} bytes "
            f"(of {figures.frame_bytes / steps:,.0f} in the frame)",
        ),
        (
            "blocks swapped out / in / copied",
            f"{figures.swapped_out:,} / {figures.swapped_in:,} / {figures.copied:,}",
        ),
    ]
    if figures.all_reduce:
        rows.append(("all-reduces of the model", figures.all_reduce))
    if figures.prefix_queried_tokens is not None:
        queried, hit = figures.prefix_queried_tokens, figures.prefix_hit_tokens
        share = hit / max(1, queried)
        rows.append(("found in the prefix cache", f"{hit:,} of {queried:,} tokens ({share:.0%})"))
    if figures.recomputes:
        rows.append(("recomputed (host memory full)", f"{figures.recomputes:,} sequences"))
    rows.append(("completions", str(figures.output)))
    if figures.trace is not None and figures.trace.is_file():  # else telemetry has said why
        rows.append(("trace (open in Jaeger or Perfetto)", str(figures.trace)))
    if figures.metrics_url is not None:
        rows.append(("metrics were served at", figures.metrics_url))
    if figures.report is not None:
        for reason, count in figures.report["dropped_by_reason"].items():
            rows.append((f"telemetry left out: {reason}", f"{count:,}"))
    for row in rows:
        table.add_row(*row)
    return table


def _collective_table(collectives: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="collectives, by rank")
    for name in ("op", "group", "rank"):
        table.add_column(name)
    for name in ("count", "p50 µs", "p99 µs", "payload"):
        table.add_column(name, justify="right")
    for row in sorted(collectives, key=lambda row: (row["op"], row["group"], row["rank"])):
        table.add_row(
            row["op"],
            row["group"],
            str(row["rank"]),
            f"{row['count']:,}",
            f"{row['p50_s'] * 1e6:,.0f}",
            f"{row['p99_s'] * 1e6:,.0f}",
            _bytes(row["bytes"]),
        )
    return table


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def _shorten(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
