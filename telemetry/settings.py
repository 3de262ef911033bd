"""What a session is told, checked once. The only place that reads the environment.

Knows nothing of how the settings are used. They reach the sidecar as JSON on its command line;
credentials do not: OTLP headers and certificates stay in the environment, where the exporters
look for them.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

_PROTOCOLS = ("grpc", "http/protobuf")


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """Settings of one session; `from_env` fills the OpenTelemetry ones from OTEL_* variables."""

    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = 0  # 0: any free port; None: no HTTP at all
    trace_file: str | None = None  # opens in Jaeger's and in Perfetto's page
    trace_steps: int = 2000  # the trace file keeps this many of the latest steps
    trace_spans: int = 200_000  # and never more than this many spans
    otlp_endpoint: str | None = None  # None: no OTLP; for http/protobuf the full URL
    otlp_protocol: str = "http/protobuf"
    otlp_timeout_s: float = 3.0  # of one export, retries included, and of the last flush
    otlp_queue_spans: int = 50_000  # what waits for a slow endpoint; more is dropped and counted
    service_name: str = "onecast"
    ring_records: int = 65536
    poll_interval_s: float = 0.05
    start_timeout_s: float = 30.0
    close_timeout_s: float = 15.0

    def __post_init__(self) -> None:
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port is {self.metrics_port}; it must be 0 to 65535, or None")
        if self.otlp_protocol not in _PROTOCOLS:
            raise ValueError(
                f"otlp_protocol is {self.otlp_protocol!r}; it must be one of {_PROTOCOLS}"
            )
        if self.ring_records < 64 or self.ring_records & (self.ring_records - 1):
            raise ValueError(
                f"ring_records is {self.ring_records}; it must be a power of two, at least 64"
            )
        for name in ("trace_steps", "trace_spans", "otlp_queue_spans"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("otlp_timeout_s", "poll_interval_s", "start_timeout_s", "close_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, **changes: object
    ) -> "TelemetrySettings":
        """Settings from OTEL_* variables; `changes` win.

        OTLP is on where an endpoint is given and neither OTEL_SDK_DISABLED=true nor
        OTEL_TRACES_EXPORTER=none says otherwise. As the specification has it, the traces endpoint
        is taken as it is, and the general one gets /v1/traces appended for http/protobuf.
        """
        env = os.environ if environ is None else environ
        found: dict[str, object] = {}
        protocol = (
            env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
            or env.get("OTEL_EXPORTER_OTLP_PROTOCOL")
            or "http/protobuf"
        )
        found["otlp_protocol"] = protocol
        endpoint = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        if not endpoint and (base := env.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
            endpoint = base if protocol == "grpc" else base.rstrip("/") + "/v1/traces"
        disabled = env.get("OTEL_SDK_DISABLED", "").lower() == "true"
        if endpoint and not disabled and env.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp":
            found["otlp_endpoint"] = endpoint
        if service_name := env.get("OTEL_SERVICE_NAME"):
            found["service_name"] = service_name
        return cls(**{**found, **changes})  # type: ignore[arg-type]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TelemetrySettings":
        return cls(**json.loads(text))
