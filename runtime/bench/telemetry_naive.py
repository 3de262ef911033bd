"""What people write who instrument collectives by hand: an SDK span and a histogram in each call.

Owns that instrumentation, with nothing done badly: one tracer, a BatchSpanProcessor with its
defaults, OTLP over http, attributes set at the start, one histogram with four labels.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry, Histogram

_BUCKETS = [1e-6 * 2**power for power in range(19)]


class Naive:
    """`all_reduce` in the place of `dist.all_reduce`; `flush` sends what is queued."""

    def __init__(self, endpoint: str, rank: int) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "bench", "onecast.rank": rank}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self.all_reduce = self._wrap(rank)

    def _wrap(self, rank: int) -> Callable[[torch.Tensor], Any]:
        tracer = self._provider.get_tracer("naive")
        seconds = Histogram(
            "collective_duration_seconds", "Of a collective", ["op", "group", "size", "rank"],
            buckets=_BUCKETS, registry=CollectorRegistry(),
        )  # fmt: skip
        sequence = 0

        def all_reduce(tensor: torch.Tensor) -> None:
            nonlocal sequence
            sequence += 1
            attributes: dict[str, str | int] = {
                "onecast.collective.op": "all_reduce",
                "onecast.collective.group": "tp",
                "onecast.collective.seq": sequence,
                "onecast.collective.bytes": tensor.nbytes,
                "onecast.collective.dtype": "bfloat16",
                "onecast.step.id": sequence // 130,
            }
            begin = time.perf_counter()
            with tracer.start_as_current_span("all_reduce", attributes=attributes):
                dist.all_reduce(tensor)
            seconds.labels("all_reduce", "tp", "16KiB", str(rank)).observe(
                time.perf_counter() - begin
            )

        return all_reduce

    def flush(self) -> None:
        self._provider.force_flush(5_000)

    def close(self) -> None:
        self._provider.shutdown()
