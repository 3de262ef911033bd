"""What a node's sidecar costs, and how soon it answers: real processes, rings fed at a real pace.

Owns three measurements of one sidecar each, its CPU time read from /proc:

    export   8 ranks at 100 steps/s with 130 collectives each, every span sent to a receiver on this
             host: spans per second of CPU, join, build, encode and post, and the metrics as well
    metrics  the same ranks, nothing exported, a scrape a second: the share of a core
    scrape   64 ranks with 10 operations of 4 groups each: how long a GET of /metrics takes
"""

import statistics
import threading
import time
from typing import NamedTuple

from onecast.telemetry import TelemetrySettings

from .telemetry_feed import STEPS_PER_S, Feeder, Sidecar, cpu_s

Figures = dict[str, list[float]]

_RANKS = 8
_SCRAPED_RANKS = 64
_SETTLE_S = 1.0  # until rings are attached and the first scrape has been made


class NodePlan(NamedTuple):
    feed_s: float
    scrapes: int
    ranks: int = _RANKS
    scraped_ranks: int = _SCRAPED_RANKS
    drain_s: float = 20.0  # the most that is waited for the last span


def measure_export(plan: NodePlan, endpoint: str) -> Figures:
    """Spans per second of CPU, the sidecar's share of a core meanwhile, and what was dropped."""
    # Whole steps wait in the queue for a receiver that pauses: room for some seconds of them.
    settings = TelemetrySettings(
        otlp_endpoint=endpoint, trace_one_in=1, metrics_port=0, otlp_queue_spans=1_000_000
    )
    with Sidecar(plan.ranks, settings) as sidecar:
        feeder = Feeder(sidecar.run_dir, plan.ranks)
        try:
            feeder.feed(STEPS_PER_S // 4)
            before = _settled(sidecar, plan.drain_s)
            cpu = cpu_s(sidecar.pid)
            seconds = feeder.feed(round(plan.feed_s * STEPS_PER_S))
            while_fed = cpu_s(sidecar.pid) - cpu
            after = _settled(sidecar, plan.drain_s)
            spent = cpu_s(sidecar.pid) - cpu
        finally:
            feeder.close()
    spans = after["spans_exported"] - before["spans_exported"]
    return {
        "spans_per_core_second": [spans / spent],
        "sidecar_core_share_exporting": [while_fed / seconds],
        "spans_exported": [spans],
        "spans_dropped": [after["dropped"] - before["dropped"]],
    }


def _settled(sidecar: Sidecar, timeout_s: float) -> dict[str, int]:
    """The report once no more spans leave; each look costs the sidecar next to nothing."""
    deadline = time.monotonic() + timeout_s
    last = -1
    while True:
        report = sidecar.report()
        if report["spans_exported"] == last or time.monotonic() > deadline:
            return {"spans_exported": report["spans_exported"], "dropped": report["dropped"]}
        last = report["spans_exported"]
        time.sleep(0.5)


def measure_metrics_only(plan: NodePlan) -> Figures:
    """The share of a core that the sidecar takes."""
    settings = TelemetrySettings(trace_one_in=0, trace_slow=False, trace_skew_s=0.0)
    with Sidecar(plan.ranks, settings) as sidecar:
        feeder = Feeder(sidecar.run_dir, plan.ranks)
        done = threading.Event()

        def scrape() -> None:
            while not done.wait(1.0):
                sidecar.get("/metrics")

        scraper = threading.Thread(target=scrape)
        scraper.start()
        try:
            feeder.feed(round(_SETTLE_S * STEPS_PER_S))
            cpu = cpu_s(sidecar.pid)
            seconds = feeder.feed(round(plan.feed_s * STEPS_PER_S))
            share = (cpu_s(sidecar.pid) - cpu) / seconds
        finally:
            done.set()
            scraper.join()
            feeder.close()
    return {"sidecar_core_share_metrics_only": [share]}


def measure_scrape(plan: NodePlan) -> Figures:
    """How long each scrape took, and how large the answer is."""
    times = []
    settings = TelemetrySettings(trace_one_in=0, trace_slow=False, trace_skew_s=0.0)
    with Sidecar(plan.scraped_ranks, settings) as sidecar:
        feeder = Feeder(sidecar.run_dir, plan.scraped_ranks, varied=True)
        try:
            feeder.feed(5)
            time.sleep(_SETTLE_S)
            for number in range(plan.scrapes + 2):
                feeder.feed(1)
                time.sleep(0.4)  # past any page that is kept for a moment
                begin = time.perf_counter()
                page = sidecar.get("/metrics")
                if number >= 2:
                    times.append((time.perf_counter() - begin) * 1e3)
        finally:
            feeder.close()
    lines = [line for line in page.splitlines() if not line.startswith(b"#")]
    return {
        "scrape_ms": times,
        "scrape_max_ms": [max(times)],
        "scrape_series": [len(lines)],
        "scrape_bytes": [len(page)],
        "scrape_p90_ms": [statistics.quantiles(times, n=10)[-1] if len(times) > 1 else times[0]],
    }
