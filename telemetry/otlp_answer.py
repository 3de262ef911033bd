"""What an OTLP endpoint answers, whichever protocol it was asked by.

Owns the few outcomes that the exporter tells apart, and how a partial success is read.
"""

from typing import NamedTuple, Protocol


class Answer(NamedTuple):
    accepted: bool
    rejected_spans: int = 0  # of an accepted request
    retry: bool = False  # a request that was not accepted may be sent again
    retry_after_s: float | None = None  # not before so long, where the endpoint says so
    reason: str = ""  # for people


class Transport(Protocol):
    """One endpoint. `send` is called from one thread, `close` from any, to end a `send`."""

    def send(self, body: bytes, timeout_s: float) -> Answer:
        """Post one ExportTraceServiceRequest. Failures are answers, not exceptions."""

    def close(self) -> None: ...


def accepted(body: bytes) -> Answer:
    """Read an ExportTraceServiceResponse; one that cannot be read still came with a success."""
    # Here: a sidecar that exports nothing runs on machines that have no opentelemetry.
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    try:
        partial = ExportTraceServiceResponse.FromString(body).partial_success
    except Exception:  # protobuf's own DecodeError lies in a private module
        return Answer(True)
    return Answer(True, max(0, partial.rejected_spans), reason=partial.error_message[:200])
