"""What a session is told, checked once.

Knows nothing of how the settings are used, nor where they come from (`environment` reads the
variables). They reach the sidecar as JSON on its command line; credentials do not: OTLP headers and
certificates stay in the environment, where the exporter looks for them.
"""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .environment import read_environment

_PROTOCOLS = ("grpc", "http/protobuf")
_MOST = 1e9  # seconds, or numbers: what fits wherever it is counted
_ADDRESS = r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@]+):[0-9]{1,5}"
_STEP_RULES = "optimizer, none, or collectives:N with N >= 1"


def _flight_dir() -> str:
    return os.path.join(tempfile.gettempdir(), f"onecast-flight-{os.getuid()}")


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """Settings of one session; `from_env` fills them from OTEL_* and ONECAST_* variables."""

    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = 0  # 0: any free port; None: no HTTP at all
    metrics_peers: Sequence[str] = ()  # host:port of the other nodes' sidecars, for /sd
    trace_file: str | None = None  # opens in Jaeger's and in Perfetto's page
    trace_steps: int = 2000  # the trace file keeps this many of the latest steps
    trace_spans: int = 200_000  # and never more than this many spans
    # Which steps become traces: one in so many (0: none, 1: all), and beside those every step that
    # failed, was slower than 99% of the last ones, or had a rank this much later than another.
    trace_one_in: int = 1
    trace_slow: bool = True
    trace_skew_s: float = 0.01  # 0: off
    otlp_endpoint: str | None = None  # None: no OTLP; for http/protobuf the full URL
    otlp_protocol: str = "http/protobuf"
    otlp_timeout_s: float = 3.0  # of one export, retries included, and of the last flush
    otlp_queue_spans: int = 200_000  # what waits for a slow endpoint; more is dropped and counted
    span_links: int = 1024  # from a step to its requests
    service_name: str = "onecast"
    resource_attributes: Mapping[str, str] = field(default_factory=dict)
    hang_s: float = 30.0  # a collective in flight for longer is told of; 0: never
    flight_dir: str = field(default_factory=_flight_dir)  # what is kept of runs that ended badly
    ring_records: int = 65536
    poll_interval_s: float = 0.1
    worker_restarts: int = 0  # how often the launcher has started this node's ranks again
    start_timeout_s: float = 30.0
    close_timeout_s: float = 15.0
    # Of programs that know nothing of steps: what ends one.
    auto_step: str = "optimizer"
    ddp_hook: bool = False  # DistributedDataParallel's gradients through a hook that can be seen

    def __post_init__(self) -> None:
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port is {self.metrics_port}; it must be 0 to 65535, or None")
        for peer in self.metrics_peers:
            if not re.fullmatch(_ADDRESS, peer):
                raise ValueError(f"metrics_peers has {peer!r}; it must be host:port")
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
        for name in ("trace_one_in", "trace_skew_s", "hang_s", "span_links"):
            if not 0 <= getattr(self, name) <= _MOST:  # not a number is neither
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 to {_MOST:g}")
        for name in ("otlp_timeout_s", "poll_interval_s", "start_timeout_s", "close_timeout_s"):
            if not 0 < getattr(self, name) <= _MOST:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be above 0, to {_MOST:g}"
                )
        if not re.fullmatch(r"optimizer|none|collectives:[1-9][0-9]*", self.auto_step):
            raise ValueError(f"auto_step is {self.auto_step!r}; it must be {_STEP_RULES}")

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, **changes: object
    ) -> "TelemetrySettings":
        """Settings from the environment (`environment` lists the variables); `changes` win.

        ValueError names the variable and its value where one cannot be.
        """
        found = read_environment(os.environ if environ is None else environ)
        settings = {**found, **changes}
        if settings.get("otlp_endpoint") and "trace_one_in" not in settings:
            settings["trace_one_in"] = 100  # every step of a busy engine is more than one can read
        return cls(**settings)  # type: ignore[arg-type]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TelemetrySettings":
        fields = json.loads(text)
        return cls(**{**fields, "metrics_peers": tuple(fields["metrics_peers"])})
