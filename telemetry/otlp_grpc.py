"""OTLP over gRPC: one unary call with bytes that are already encoded.

Owns the channel and what a status code means. Knows nothing of retries or spans.
"""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from .otlp_answer import Answer, accepted
from .otlp_options import OtlpOptions

_METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_CODE = grpc.StatusCode
_RETRYABLE = (
    _CODE.CANCELLED,
    _CODE.DEADLINE_EXCEEDED,
    _CODE.ABORTED,
    _CODE.OUT_OF_RANGE,
    _CODE.UNAVAILABLE,
    _CODE.DATA_LOSS,
)
_DETAILS = "grpc-status-details-bin"
_COMPRESSIONS = {"none": grpc.Compression.NoCompression, "gzip": grpc.Compression.Gzip}
_CHANNEL_OPTIONS = (
    # An endpoint that comes back is found again within the time of an export.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 5000),
)


class GrpcTransport:
    """`endpoint`: http://host:port (no TLS), https://host:port, or host:port (as INSECURE says)."""

    def __init__(self, endpoint: str, options: OtlpOptions, user_agent: str) -> None:
        parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
        if parts.scheme not in ("", "http", "https") or not parts.netloc:
            raise ValueError(
                f"otlp_endpoint is {endpoint!r}; it must be http://host:port, https://host:port or "
                "host:port"
            )
        insecure = parts.scheme == "http" if parts.scheme else bool(options.insecure)
        settings: dict[str, Any] = {
            "options": (*_CHANNEL_OPTIONS, ("grpc.primary_user_agent", user_agent)),
            "compression": _COMPRESSIONS[options.compression],
        }
        if insecure:
            self._channel = grpc.insecure_channel(parts.netloc, **settings)
        else:
            credentials = grpc.ssl_channel_credentials(
                _bytes(options.certificate),
                _bytes(options.client_key),
                _bytes(options.client_certificate),
            )
            self._channel = grpc.secure_channel(parts.netloc, credentials, **settings)
        self._metadata = tuple(options.headers.items())
        self._export = self._channel.unary_unary(_METHOD)  # no serialisers: bytes in, bytes out

    def send(self, body: bytes, timeout_s: float) -> Answer:
        try:
            return accepted(self._export(body, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            return _answer(error)
        except ValueError as error:  # the channel was closed, or a header cannot be
            return Answer(False, reason=str(error))

    def close(self) -> None:
        self._channel.close()


def _answer(error: Any) -> Answer:
    code = error.code()
    retry_after_s = _retry_after(error.trailing_metadata() or ())
    # An exhausted endpoint may be asked again only if it says when.
    retry = code in _RETRYABLE or (code is _CODE.RESOURCE_EXHAUSTED and retry_after_s is not None)
    return Answer(
        False,
        retry=retry,
        retry_after_s=retry_after_s,
        reason=f"gRPC status {code.name}: {(error.details() or '')[:200]}",
    )


def _retry_after(metadata: Any) -> float | None:
    """The RetryInfo among the details of a status."""
    for key, value in metadata:
        if key != _DETAILS:
            continue
        for detail in Status.FromString(value).details:
            if detail.Is(RetryInfo.DESCRIPTOR):
                delay = RetryInfo.FromString(detail.value).retry_delay
                return float(delay.seconds + delay.nanos * 1e-9)
    return None


def _bytes(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
