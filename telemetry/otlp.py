"""Sends spans to an OTLP endpoint, from a thread of the sidecar.

Owns the queue and what it drops. Uses the stock exporters of opentelemetry-python, which read
headers, certificates and compression from the environment. Never blocks its caller: a slow or
absent endpoint costs spans, and they are counted.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from .settings import TelemetrySettings
from .spans import Span

_logger = logging.getLogger(__name__)
_BATCH_SPANS = 2048  # about a third of a megabyte encoded; grpc servers take four


def make_exporter(settings: TelemetrySettings) -> SpanExporter:
    """The exporter of the protocol; imported here, because grpc alone takes 100 ms."""
    if settings.otlp_protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter(endpoint=settings.otlp_endpoint, timeout=settings.otlp_timeout_s)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=settings.otlp_endpoint, timeout=settings.otlp_timeout_s)


class OtlpExport:
    """A bounded queue of whole steps in front of an exporter."""

    def __init__(self, exporter: SpanExporter, settings: TelemetrySettings, engine_id: str) -> None:
        self.dropped: Counter[str] = Counter()  # spans, by reason
        self.exported = 0
        self._exporter = exporter
        self._service_name = settings.service_name
        self._engine_id = engine_id
        self._timeout_s = settings.otlp_timeout_s
        self._limit = settings.otlp_queue_spans
        self._scope = InstrumentationScope("onecast.telemetry", version("onecast"))
        self._resources: dict[int | None, Resource] = {}
        self._queue: queue.SimpleQueue[list[Span] | None] = queue.SimpleQueue()
        self._waiting = 0  # spans in the queue or being sent
        self._lock = threading.Lock()
        self._failing = False
        # A daemon: a transport that ignores its timeout must not keep the sidecar alive.
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def submit(self, spans: list[Span]) -> None:
        """Queue one step's spans, or drop them all: half a trace misleads."""
        with self._lock:
            if self._waiting + len(spans) > self._limit:
                self.dropped["queue_full"] += len(spans)
                return
            self._waiting += len(spans)
        self._queue.put(spans)

    def close(self) -> None:
        """Send what is queued, within otlp_timeout_s; what is left is dropped and counted."""
        self._queue.put(None)
        self._thread.join(self._timeout_s)
        self._exporter.shutdown()  # ends a retry's wait
        self._thread.join(0.5)
        with self._lock:
            if self._waiting:
                self.dropped["shutdown"] += self._waiting
                self._waiting = 0

    def _run(self) -> None:
        while (spans := self._queue.get()) is not None:
            last = False
            while len(spans) < _BATCH_SPANS and not last:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    last = True
                else:
                    spans = spans + more
            for start in range(0, len(spans), _BATCH_SPANS):
                self._send(spans[start : start + _BATCH_SPANS])
            if last:
                return

    def _send(self, spans: list[Span]) -> None:
        begin = time.monotonic()
        try:
            sent = self._exporter.export(self._convert(spans)) is SpanExportResult.SUCCESS
            reason = "the exporter gave up"
        except Exception as error:  # a transport's own error must not end the thread
            sent, reason = False, repr(error)
        if not sent and not self._failing:
            _logger.warning(
                "OTLP export failed after %.1f s (%s): spans are being dropped",
                time.monotonic() - begin,
                reason,
            )
        self._failing = not sent
        with self._lock:
            if not self._waiting:
                return  # close() has counted them already
            self._waiting -= len(spans)
            if sent:
                self.exported += len(spans)
            else:
                self.dropped["export_failed"] += len(spans)

    def _resource(self, rank: int | None) -> Resource:
        resource = self._resources.get(rank)
        if resource is None:
            attributes: dict[str, str | int] = {
                "service.name": self._service_name,
                "service.instance.id": self._engine_id,
            }
            if rank is not None:
                attributes["service.instance.id"] = f"{self._engine_id}/rank-{rank}"
                attributes["onecast.rank"] = rank
            resource = self._resources[rank] = Resource.create(attributes)
        return resource

    def _convert(self, spans: Iterable[Span]) -> list[ReadableSpan]:
        return [
            ReadableSpan(
                name=span.name,
                context=_context(span.trace_id, span.span_id),
                parent=_context(span.trace_id, span.parent_id)
                if span.parent_id is not None
                else None,
                resource=self._resource(span.rank),
                attributes=span.attributes
                if span.error is None
                else {**span.attributes, "error.type": span.error},
                kind=SpanKind.INTERNAL,
                status=Status(StatusCode.ERROR, span.error)
                if span.error is not None
                else Status(StatusCode.UNSET),
                start_time=span.start_ns,
                end_time=span.end_ns,
                instrumentation_scope=self._scope,
            )
            for span in spans
        ]


def _context(trace_id: int, span_id: int) -> SpanContext:
    return SpanContext(
        trace_id, span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)
    )
