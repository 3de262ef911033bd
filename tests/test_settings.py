"""Settings come from the environment in one place, and a bad one is told by its name."""

import pytest

from onecast.telemetry import TelemetrySettings


def read(**env: str) -> TelemetrySettings:
    return TelemetrySettings.from_env(env)


def test_nothing_set_means_the_defaults():
    assert read() == TelemetrySettings()
    assert read(OTEL_SERVICE_NAME="", ONECAST_HANG_S=" ") == TelemetrySettings()


def test_changes_win_over_variables():
    assert TelemetrySettings.from_env({"ONECAST_HANG_S": "5"}, hang_s=7.0).hang_s == 7.0


def test_settings_survive_the_command_line_of_the_sidecar():
    settings = read(
        OTEL_RESOURCE_ATTRIBUTES="a=b%20c,service.name=x,d=",
        ONECAST_TRACE_SKEW_MS="2.5",
        ONECAST_METRICS_PEERS="node1:9464, [fe80::1]:9464,",
        TORCHELASTIC_RESTART_COUNT="3",
    )
    assert settings.metrics_peers == ("node1:9464", "[fe80::1]:9464")
    assert settings.worker_restarts == 3
    assert settings.resource_attributes == {"a": "b c", "d": ""}
    assert settings.service_name == "x" and settings.trace_skew_s == 0.0025
    assert TelemetrySettings.from_json(settings.to_json()) == settings


def test_the_prometheus_variables_of_opentelemetry_are_honoured():
    settings = read(OTEL_EXPORTER_PROMETHEUS_HOST="::1", OTEL_EXPORTER_PROMETHEUS_PORT="9464")
    assert (settings.metrics_host, settings.metrics_port) == ("::1", 9464)
    assert read(OTEL_METRICS_EXPORTER="none").metrics_port is None


def test_a_sampler_chooses_steps():
    def one_in(**env: str) -> int:
        return read(**env).trace_one_in

    assert one_in() == 1
    assert one_in(OTEL_EXPORTER_OTLP_ENDPOINT="http://c:4318") == 100
    assert (
        one_in(OTEL_TRACES_SAMPLER="parentbased_traceidratio", OTEL_TRACES_SAMPLER_ARG="0.02") == 50
    )
    assert one_in(OTEL_TRACES_SAMPLER="always_on", ONECAST_TRACE_ONE_IN="7") == 7
    off = read(OTEL_TRACES_SAMPLER="always_off")
    assert (off.trace_one_in, off.trace_slow, off.trace_skew_s) == (0, False, 0.0)


@pytest.mark.parametrize(("text", "seconds"), [("5", 5.0), ("5000", 5.0), ("0.5", 0.5)])
def test_a_timeout_is_taken_in_the_units_of_both_conventions(text: str, seconds: float):
    assert read(OTEL_EXPORTER_OTLP_TIMEOUT=text).otlp_timeout_s == seconds


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_SAMPLER", "xray"),
        ("OTEL_RESOURCE_ATTRIBUTES", "novalue"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_PROMETHEUS_PORT", "http"),
        ("ONECAST_TRACE_SLOW", "maybe"),
        ("ONECAST_HANG_S", "x"),
    ],
)
def test_a_variable_that_cannot_be_is_named_with_its_value(name: str, value: str):
    with pytest.raises(ValueError, match=name) as caught:
        read(**{name: value})
    assert value in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"trace_one_in": -1},
        {"hang_s": -0.5},
        {"hang_s": float("inf")},
        {"trace_skew_s": float("nan")},
        {"auto_step": "collectives:0"},
        {"ring_records": 1000},
        {"otlp_protocol": "http/json"},
        {"metrics_port": 70000},
        {"metrics_peers": ("http://node:9464/metrics",)},
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_value(change: dict[str, object]):
    (name, value) = next(iter(change.items()))
    with pytest.raises(ValueError, match=name) as caught:
        TelemetrySettings(**change)  # type: ignore[arg-type]
    shown = value[0] if isinstance(value, tuple) else value
    assert str(shown) in str(caught.value)
