"""The variables that settings come from: the only place of telemetry that reads the environment.

Standard OpenTelemetry variables:

    OTEL_SDK_DISABLED=true                             no OTLP
    OTEL_TRACES_EXPORTER                               otlp (default) or none
    OTEL_EXPORTER_OTLP[_TRACES]_ENDPOINT, _PROTOCOL, _TIMEOUT
    OTEL_TRACES_SAMPLER, OTEL_TRACES_SAMPLER_ARG       [parentbased_]always_on, _always_off,
                                                       _traceidratio: of steps, not of spans
    OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES
    OTEL_BSP_MAX_QUEUE_SIZE, OTEL_SPAN_LINK_COUNT_LIMIT
    OTEL_METRICS_EXPORTER                              prometheus (default) or none
    OTEL_EXPORTER_PROMETHEUS_HOST, _PORT

The exporter itself reads headers, certificates, compression and the like. Our own:

    ONECAST_TRACE_FILE, ONECAST_TRACE_ONE_IN, ONECAST_TRACE_SLOW, ONECAST_TRACE_SKEW_MS
    ONECAST_HANG_S, ONECAST_FLIGHT_DIR, ONECAST_RING_RECORDS, ONECAST_STEP, ONECAST_DDP_HOOK
    ONECAST_METRICS_PEERS                              host:port,host:port of other nodes' sidecars

And torchrun's TORCHELASTIC_RESTART_COUNT.

An empty variable counts as one that is not there, as the specification has it.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import unquote

_MILLISECONDS_FROM = 100.0
T = TypeVar("T")


def read_environment(environ: Mapping[str, str]) -> dict[str, object]:
    """The settings that the variables speak of, by name. ValueError names the variable."""
    env = {name: text.strip() for name, text in environ.items() if text.strip()}
    found = _read_otlp(env)
    for name, setting, convert in _PLAIN:
        if name in env:
            found[setting] = _convert(name, env[name], convert)
    if env.get("OTEL_METRICS_EXPORTER") == "none":
        found["metrics_port"] = None
    if "trace_one_in" not in found and "OTEL_TRACES_SAMPLER" in env:
        one_in = _sampler(env["OTEL_TRACES_SAMPLER"], env.get("OTEL_TRACES_SAMPLER_ARG", "1"))
        found["trace_one_in"] = one_in
        if one_in == 0:
            found.setdefault("trace_slow", False)
            found.setdefault("trace_skew_s", 0.0)
    attributes = _attributes(env.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    service_name = env.get("OTEL_SERVICE_NAME") or attributes.pop("service.name", None)
    if service_name:
        found["service_name"] = service_name
    attributes.pop("service.name", None)
    if attributes:
        found["resource_attributes"] = attributes
    return found


def _read_otlp(env: Mapping[str, str]) -> dict[str, object]:
    """OTLP is on where an endpoint is given and nothing says otherwise.

    The traces endpoint is taken as it is, the general one gets /v1/traces appended for
    http/protobuf.
    """

    def of_traces(what: str) -> str | None:
        return env.get(f"OTEL_EXPORTER_OTLP_TRACES_{what}") or env.get(f"OTEL_EXPORTER_OTLP_{what}")

    found: dict[str, object] = {"otlp_protocol": of_traces("PROTOCOL") or "http/protobuf"}
    endpoint = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not endpoint and (base := env.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
        grpc = found["otlp_protocol"] == "grpc"
        endpoint = base if grpc else base.rstrip("/") + "/v1/traces"
    disabled = env.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if endpoint and not disabled and "otlp" in env.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
        found["otlp_endpoint"] = endpoint
    if timeout := of_traces("TIMEOUT"):
        # Seconds for opentelemetry-python, milliseconds in the specification.
        number = _convert("OTEL_EXPORTER_OTLP_TIMEOUT", timeout, float)
        found["otlp_timeout_s"] = number / 1000 if number >= _MILLISECONDS_FROM else number
    return found


def _sampler(name: str, argument: str) -> int:
    """One step in how many is kept."""
    name = name.removeprefix("parentbased_")
    if name == "always_on":
        return 1
    if name == "always_off":
        return 0
    if name == "traceidratio":
        ratio = _convert("OTEL_TRACES_SAMPLER_ARG", argument, float)
        if not 0 <= ratio <= 1:
            raise ValueError(f"OTEL_TRACES_SAMPLER_ARG is {argument!r}; it must be 0 to 1")
        return round(1 / ratio) if ratio else 0
    raise ValueError(
        f"OTEL_TRACES_SAMPLER is {name!r}; it must be always_on, always_off or traceidratio, "
        "each also with parentbased_ before it"
    )


def _attributes(text: str) -> dict[str, str]:
    """key=value,key=value, percent-encoded; a part without `=` is an error."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"OTEL_RESOURCE_ATTRIBUTES has {part!r}; it must be key=value")
        found[key.strip()] = unquote(value.strip())
    return found


def _yes(text: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true"):
        raise ValueError("it must be 0 or 1")
    return text.lower() in ("1", "true")


def _addresses(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _milliseconds(text: str) -> float:
    return float(text) / 1000


def _convert(name: str, text: str, convert: Callable[[str], T]) -> T:
    try:
        return convert(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}: {error}") from None


_PLAIN: tuple[tuple[str, str, Callable[[str], object]], ...] = (
    ("OTEL_EXPORTER_PROMETHEUS_HOST", "metrics_host", str),
    ("OTEL_EXPORTER_PROMETHEUS_PORT", "metrics_port", int),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "otlp_queue_spans", int),
    ("OTEL_SPAN_LINK_COUNT_LIMIT", "span_links", int),
    ("ONECAST_TRACE_FILE", "trace_file", str),
    ("ONECAST_TRACE_ONE_IN", "trace_one_in", int),
    ("ONECAST_TRACE_SLOW", "trace_slow", _yes),
    ("ONECAST_TRACE_SKEW_MS", "trace_skew_s", _milliseconds),
    ("ONECAST_HANG_S", "hang_s", float),
    ("ONECAST_FLIGHT_DIR", "flight_dir", str),
    ("ONECAST_RING_RECORDS", "ring_records", int),
    ("ONECAST_STEP", "auto_step", str),
    ("ONECAST_DDP_HOOK", "ddp_hook", _yes),
    ("ONECAST_METRICS_PEERS", "metrics_peers", _addresses),
    ("TORCHELASTIC_RESTART_COUNT", "worker_restarts", int),
)
