"""From joined steps and requests to traces: what is kept, and where it goes.

Owns the way: sampling, then the OTLP endpoint and the trace file. Knows neither rings nor HTTP, and
its caller never waits: spans are built, encoded and posted by the exporter's thread.
"""

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .kept_step import KeptStep
from .metrics import package_version
from .otlp_answer import Transport
from .otlp_encoder import Encoded, OtlpEncoder
from .otlp_export import OtlpExport
from .otlp_options import OtlpOptions
from .request_spans import RequestSpans
from .ring import DEVICE, META
from .ring_reader import RingReader, Rows
from .sampling import TailSampler
from .settings import TelemetrySettings
from .span_builder import SpanBuilder
from .spans import Attribute, Span, trace_id
from .step_facts import StepFacts, step_facts
from .steps import JoinedStep
from .trace_file import TraceFile

__all__ = ["KeptStep", "Tracing"]

_logger = logging.getLogger(__name__)

_KEPT = 64  # steps, for the live view


class Tracing:
    """The traces of one node. Use it from one thread, or under one lock.

    Raises ValueError for a trace file whose directory is not there, and for OTLP variables that
    cannot be; credentials are taken from `environ` (None: this process's).
    """

    def __init__(
        self,
        settings: TelemetrySettings,
        engine_id: str,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.kept: deque[KeptStep] = deque(maxlen=_KEPT)
        self._engine_id = engine_id
        self._sampler = TailSampler(settings)
        self._max_links = settings.span_links
        self._requests = RequestSpans(engine_id)
        self._names: dict[int, Sequence[str]] = {}
        self._clock_offset_ns: int | None = None
        self._builder: SpanBuilder | None = None
        self._file: TraceFile[KeptStep] | None = None
        self._file_error = 0  # steps that could not be written
        if settings.trace_file is not None:
            self._file = TraceFile(
                settings.trace_file,
                engine_id=engine_id,
                service_name=settings.service_name,
                max_steps=settings.trace_steps,
                max_spans=settings.trace_spans,
            )
        self._resources = _Resources(settings, engine_id)
        self._encoder = OtlpEncoder(self._resources.by_rank, package_version())
        self._export: OtlpExport[KeptStep | Span] | None = None
        if settings.otlp_endpoint is not None:
            environ = os.environ if environ is None else environ
            self._export = OtlpExport(
                _transport(settings, settings.otlp_endpoint, environ),
                self._encode,
                timeout_s=settings.otlp_timeout_s,
                queue_spans=settings.otlp_queue_spans,
            )

    @property
    def enabled(self) -> bool:
        """Whether any step can be kept; if not, none need be joined."""
        return self._sampler.enabled

    # -- what comes in -------------------------------------------------------------------------

    def attach(self, readers: Mapping[int, RingReader]) -> None:
        """Learn of rings that have appeared. The clock of the first one holds for all."""
        for rank in sorted(readers.keys() - self._names.keys()):
            reader = readers[rank]
            if self._clock_offset_ns is None:
                self._clock_offset_ns = reader.clock_offset_ns
            self._names[rank] = reader.names  # the very list, which the reader lets grow
            self._resources.add(reader)
        if self._clock_offset_ns is not None:
            self._builder = SpanBuilder(
                self._engine_id,
                self._names,
                self._clock_offset_ns,
                with_engine_span=0 in self._names,
            )

    def requests(self, rank: int, rows: Rows) -> None:
        """Take in what one rank recorded; only contexts and ends of requests are looked at."""
        if self._clock_offset_ns is None or not self._sampler.enabled:
            return
        self._resources.look(rank, rows)
        spans = self._requests.add(rows, self._names[rank], self._clock_offset_ns)
        if self._file is not None:
            self._file.add_requests(spans)
        if self._export is not None:
            for span in spans:
                self._export.submit(span, 1)

    def step(self, joined: JoinedStep) -> KeptStep | None:
        """Decide about one step; what is kept is on its way when this returns."""
        return next(iter(self.steps([joined])), None)

    def steps(self, steps: Sequence[JoinedStep]) -> list[KeptStep]:
        """`step` for many, in their order, at half the cost; those that are kept."""
        if not steps or self._builder is None or not self._sampler.enabled:
            return []
        found = []
        for joined, facts in zip(steps, step_facts(steps, self._names), strict=True):
            reason = self._sampler.decide(joined, self._names, facts)
            if reason is not None:
                found.append(self._keep(joined, reason, facts))
        return found

    def _keep(self, joined: JoinedStep, reason: str, facts: StepFacts) -> KeptStep:
        links = self._requests.links(joined.requests)
        kept = KeptStep(
            joined.step,
            trace_id(self._engine_id, joined.step),
            reason,
            joined,
            facts.arrivals,
            links[: self._max_links] if len(links) > self._max_links else links,
            max(0, len(links) - self._max_links),
            self._engine_id,
        )
        self.kept.append(kept)
        if self._file is not None:
            self._file.add(kept, notable=reason not in ("all", "one_in_n"))
        if self._export is not None:
            self._export.submit(kept, facts.num_spans + (0 in self._names))
        return kept

    # -- what goes out -------------------------------------------------------------------------

    def finish(self) -> None:
        """Flush the exporter, within otlp_timeout_s, and write the trace file."""
        if self._export is not None:
            self._export.close()
        if self._file is None:
            return
        if not len(self._file):
            _logger.warning(
                "the trace file %s has no step: none ended (a program without an optimizer has "
                "steps by ONECAST_STEP=collectives:N, or by Session.step)",
                self._file.path,
            )
        try:
            self._file.write(self._spans)
        except OSError as error:
            self._file_error = len(self._file)
            _logger.error("cannot write the trace file %s: %s", self._file.path, error)

    @property
    def dropped(self) -> Counter[tuple[str, str]]:
        """What was left out so far, by signal ("spans", "steps") and reason."""
        found: Counter[tuple[str, str]] = Counter()
        if self._export is not None:
            for reason, spans in list(self._export.dropped.items()):
                found["spans", reason] = spans
        if self._file is not None and self._file.left_out:
            found["steps", "trace_file_full"] = self._file.left_out
        if self._file_error:
            found["steps", "trace_file"] = self._file_error
        return found

    @property
    def exported(self) -> int:
        """Spans that an OTLP endpoint has taken."""
        return self._export.exported if self._export is not None else 0

    @property
    def trace_file(self) -> Path | None:
        return self._file.path if self._file is not None else None

    def _spans(self, kept: KeptStep) -> list[Span]:
        assert self._builder is not None, "a step was kept without a ring"
        return list(self._builder.build([kept]).spans())

    def _encode(self, items: Iterable[KeptStep | Span]) -> list[Encoded]:
        """In the exporter's thread."""
        steps: list[KeptStep] = []
        spans: list[Span] = []
        for item in items:
            if isinstance(item, KeptStep):
                steps.append(item)
            else:
                spans.append(item)
        assert self._builder is not None, "spans without a ring"
        return self._encoder.encode(self._builder.build(steps), spans)


class _Resources:
    """Who made the spans: attributes of the engine (None) and of every rank.

    What the user set in OTEL_RESOURCE_ATTRIBUTES is there too, but tells no ranks apart.
    """

    def __init__(self, settings: TelemetrySettings, engine_id: str) -> None:
        self._engine_id = engine_id
        self._common: dict[str, Attribute] = {
            "host.name": socket.gethostname(),
            **settings.resource_attributes,
            "service.name": settings.service_name,
        }
        self.by_rank: dict[int | None, dict[str, Attribute]] = {
            None: {**self._common, "service.instance.id": engine_id}
        }
        self._local_ranks: dict[int, int] = {}

    def add(self, reader: RingReader) -> None:
        self._local_ranks[reader.rank] = reader.local_rank
        self.by_rank[reader.rank] = {
            **self._common,
            "service.instance.id": f"{self._engine_id}/rank-{reader.rank}",
            "onecast.rank": reader.rank,
            "onecast.device": "cpu",
            "process.pid": reader.pid,
        }

    def look(self, rank: int, rows: Rows) -> None:
        """A rank whose collectives take time on a device has the one of its local rank."""
        if np.any((rows[:, META] & 0xF) == DEVICE):
            self.by_rank[rank]["onecast.device"] = f"cuda:{self._local_ranks[rank]}"


def _transport(settings: TelemetrySettings, endpoint: str, environ: Mapping[str, str]) -> Transport:
    """Imported here: grpc alone takes 100 ms."""
    options = OtlpOptions.from_env(environ, settings.otlp_protocol)
    user_agent = f"onecast/{package_version()}"
    if settings.otlp_protocol == "grpc":
        from .otlp_grpc import GrpcTransport

        return GrpcTransport(endpoint, options, user_agent)
    from .otlp_http import HttpTransport

    return HttpTransport(endpoint, options, user_agent)
