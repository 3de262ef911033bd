"""Export: endpoints are reached as the variables say, lost spans are counted, nobody waits."""

import ssl
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from otlp_receivers import Endpoint, Reply, grpc_endpoint, http_endpoint

from onecast.telemetry.otlp_answer import Answer, Transport
from onecast.telemetry.otlp_encoder import Encoded, OtlpEncoder
from onecast.telemetry.otlp_export import OtlpExport
from onecast.telemetry.otlp_grpc import GrpcTransport
from onecast.telemetry.otlp_http import HttpTransport
from onecast.telemetry.otlp_options import OtlpOptions
from onecast.telemetry.span_table import SpanTable
from onecast.telemetry.spans import Span

SPANS = [Span(7, number, None, f"s{number}", None, 1, 2, {}, None) for number in range(1, 11)]


def encode(items: Sequence[Span]) -> list[Encoded]:
    return OtlpEncoder({None: {"service.name": "s"}}, "1").encode(SpanTable([], []), items)


def transport(endpoint: str, protocol: str = "http/protobuf", **env: str) -> Transport:
    options = OtlpOptions.from_env(
        {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in env.items()}, protocol
    )
    if protocol == "grpc":
        return GrpcTransport(endpoint, options, "tested/1")
    return HttpTransport(f"{endpoint}/v1/traces", options, "tested/1")


def export(to: Transport, *, timeout_s: float = 10, queue_spans: int = 1000) -> OtlpExport[Span]:
    return OtlpExport(to, encode, timeout_s=timeout_s, queue_spans=queue_spans)


def send_all(to: Transport, timeout_s: float = 10) -> OtlpExport[Span]:
    exporter = export(to, timeout_s=timeout_s)
    for span in SPANS:
        assert exporter.submit(span, 1)
    exporter.close()
    return exporter


PROTOCOLS = pytest.mark.parametrize(
    ("serve", "protocol"), [(http_endpoint, "http/protobuf"), (grpc_endpoint, "grpc")]
)


@PROTOCOLS
def test_spans_arrive_with_the_headers_of_the_variables(serve: Any, protocol: str) -> None:
    with serve() as endpoint:
        exporter = send_all(transport(endpoint.url, protocol, HEADERS="Api-Key=se%20cret, x=a=b"))
    assert (exporter.exported, endpoint.num_spans, exporter.dropped) == (10, 10, {})
    (headers,) = endpoint.headers
    assert (headers["api-key"], headers["x"]) == ("se cret", "a=b")
    assert "tested/1" in headers["user-agent"]


@pytest.mark.parametrize("compression", ["none", "gzip", "deflate"])
def test_compression_over_http(compression: str) -> None:
    with http_endpoint() as endpoint:
        assert send_all(transport(endpoint.url, COMPRESSION=compression)).exported == 10
    (headers,), (size,) = endpoint.headers, endpoint.sizes
    assert headers.get("content-encoding", "none") == compression
    whole = sum(len(encoded.body) for encoded in encode(SPANS))
    assert size == whole if compression == "none" else size < whole / 2


def test_compression_over_grpc() -> None:
    with grpc_endpoint() as endpoint:
        assert send_all(transport(endpoint.url, "grpc", COMPRESSION="gzip")).exported == 10


RETRY_INFO = Status(code=8)
RETRY_INFO.details.add().Pack(RetryInfo())
AGAIN = (("grpc-status-details-bin", RETRY_INFO.SerializeToString()),)
CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("serve", "protocol", "reply"),
    [
        *((http_endpoint, "http/protobuf", Reply(status)) for status in (429, 502, 503, 504)),
        (http_endpoint, "http/protobuf", Reply(503, {"Retry-After": "0"})),
        (http_endpoint, "http/protobuf", Reply(503, {"Retry-After": "soon"})),
        (grpc_endpoint, "grpc", Reply(CODE.UNAVAILABLE)),
        (grpc_endpoint, "grpc", Reply(CODE.ABORTED)),
        (grpc_endpoint, "grpc", Reply(CODE.RESOURCE_EXHAUSTED, metadata=AGAIN)),
    ],
)
def test_what_may_succeed_later_is_sent_again(serve: Any, protocol: str, reply: Reply) -> None:
    with serve([reply, reply]) as endpoint:
        exporter = send_all(transport(endpoint.url, protocol))
    assert (exporter.exported, endpoint.num_spans, exporter.dropped) == (10, 10, {})
    assert len(endpoint.headers) == 3


@pytest.mark.parametrize(
    ("serve", "protocol", "reply"),
    [
        *((http_endpoint, "http/protobuf", Reply(status)) for status in (400, 404, 500, 307)),
        (grpc_endpoint, "grpc", Reply(CODE.INVALID_ARGUMENT)),
        (grpc_endpoint, "grpc", Reply(CODE.RESOURCE_EXHAUSTED)),
    ],
)
def test_what_never_succeeds_is_sent_once_and_counted(
    serve: Any, protocol: str, reply: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    with serve([reply]) as endpoint:
        exporter = send_all(transport(endpoint.url, protocol))
    assert (exporter.exported, exporter.dropped) == (0, {"export_failed": 10})
    assert len(endpoint.headers) == 1
    assert "spans are being dropped" in caplog.text


def test_an_endpoint_that_says_when_to_come_back_is_not_asked_before() -> None:
    with http_endpoint([Reply(503, {"Retry-After": "1"})]) as endpoint:
        begin = time.monotonic()
        assert send_all(transport(endpoint.url)).exported == 10
        assert time.monotonic() - begin >= 1
    with http_endpoint([Reply(429, {"Retry-After": "3600"})]) as endpoint:
        exporter = send_all(transport(endpoint.url), timeout_s=3)
        assert exporter.dropped == {"export_failed": 10}, "an hour is more than it has"
    assert len(endpoint.headers) == 1


@PROTOCOLS
def test_the_spans_that_an_endpoint_rejects_are_counted(
    serve: Any, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serve([Reply(rejected=4)]) as endpoint:
        exporter = send_all(transport(endpoint.url, protocol))
    assert (exporter.exported, exporter.dropped) == (6, {"rejected": 4})
    assert "too many of them" in caplog.text


@PROTOCOLS
def test_an_endpoint_that_goes_and_comes_back_gets_the_later_spans(
    serve: Any, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Reply(CODE.INTERNAL if protocol == "grpc" else 500)
    with serve([bad]) as endpoint:
        exporter = export(transport(endpoint.url, protocol))
        exporter.submit(SPANS[0], 1)
        while not exporter.dropped:
            time.sleep(0.01)
        exporter.submit(SPANS[1], 1)
        exporter.close()
    assert (exporter.exported, exporter.dropped) == (1, {"export_failed": 1})
    assert "works again" in caplog.text


class Gate:
    """A transport that takes requests when it is let."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.asked = threading.Event()

    def send(self, body: bytes, timeout_s: float) -> Answer:
        self.asked.set()
        self.open.wait(20)
        return Answer(True)

    def close(self) -> None:
        """Ignores it, like a transport in a system call."""


def test_a_slow_endpoint_drops_whole_items_and_never_blocks() -> None:
    gate = Gate()
    exporter = export(gate, timeout_s=0.3, queue_spans=100)
    begin = time.monotonic()
    taken = [exporter.submit(SPANS[0], 10) for _ in range(30)]
    assert time.monotonic() - begin < 1
    assert taken == [True] * 10 + [False] * 20
    assert exporter.dropped == {"queue_full": 200}
    assert gate.asked.wait(10)
    assert not exporter.submit(SPANS[0], 1), "what is being sent still takes its room"
    gate.open.set()
    exporter.close()
    assert exporter.dropped == {"queue_full": 201}


def test_closing_is_bounded_even_if_the_transport_is_stuck() -> None:
    gate = Gate()
    exporter = export(gate, timeout_s=0.2)
    exporter.submit(SPANS[0], 7)
    begin = time.monotonic()
    exporter.close()
    assert time.monotonic() - begin < 3
    assert (exporter.exported, exporter.dropped) == (0, {"shutdown": 7})
    gate.open.set()


@PROTOCOLS
def test_closing_is_bounded_where_nobody_answers(serve: Any, protocol: str) -> None:
    with serve([Reply(delay_s=30)]) as endpoint:
        exporter = export(transport(endpoint.url, protocol), timeout_s=0.3)
        exporter.submit(SPANS[0], 1)
        begin = time.monotonic()
        exporter.close()
        assert time.monotonic() - begin < 4
    assert sum(exporter.dropped.values()) == 1


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_an_endpoint_that_is_not_there_costs_spans_and_nothing_else(protocol: str) -> None:
    exporter = send_all(transport("http://127.0.0.1:9", protocol), timeout_s=0.4)
    assert (exporter.exported, sum(exporter.dropped.values())) == (0, 10)
    assert set(exporter.dropped) <= {"export_failed", "shutdown"}


def test_spans_that_cannot_be_encoded_are_counted_and_the_next_ones_go() -> None:
    def fragile(items: Sequence[Span]) -> list[Encoded]:
        if items[0].name == "bad":
            raise KeyError("bad")
        return encode(items)

    with http_endpoint() as endpoint:
        exporter = OtlpExport(transport(endpoint.url), fragile, timeout_s=10, queue_spans=100)
        exporter.submit(SPANS[0]._replace(name="bad"), 1)
        while not exporter.dropped:
            time.sleep(0.01)
        exporter.submit(SPANS[0], 1)
        exporter.close()
    assert (exporter.exported, exporter.dropped) == (1, {"encoding": 1})


def test_a_warning_never_tells_the_password_of_a_url(caplog: pytest.LogCaptureFixture) -> None:
    send_all(transport("http://user:hunter2@127.0.0.1:9"), timeout_s=0.3)
    assert "spans are being dropped" in caplog.text
    assert "hunter2" not in caplog.text


# -- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority of our own, and what it has signed: a server and a client."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        try:
            subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("openssl is not installed")

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority")
    for name in ("server", "client"):
        openssl(
            "req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.pem",
            "-CA", "ca.pem", "-CAkey", "ca.key", "-subj", f"/CN={name}",
            "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE",
        )  # fmt: skip
    return folder


def tls_endpoint(protocol: str, folder: Path) -> Any:
    """Asks its clients for a certificate."""
    if protocol == "grpc":
        pair = (folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes()
        return grpc_endpoint(
            tls=grpc.ssl_server_credentials([pair], (folder / "ca.pem").read_bytes(), True)
        )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    return http_endpoint(tls=context)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_certificates_of_both_sides_are_used_and_checked(protocol: str, certificates: Path) -> None:
    both = {
        "CERTIFICATE": str(certificates / "ca.pem"),
        "CLIENT_CERTIFICATE": str(certificates / "client.pem"),
        "CLIENT_KEY": str(certificates / "client.key"),
    }
    endpoint: Endpoint
    with tls_endpoint(protocol, certificates) as endpoint:
        assert send_all(transport(endpoint.url, protocol, **both)).exported == 10
        stranger = transport(endpoint.url, protocol, CERTIFICATE=both["CERTIFICATE"])
        assert send_all(stranger, timeout_s=0.5).exported == 0
        del both["CERTIFICATE"]
        distrustful = transport(endpoint.url, protocol, **both)
        assert send_all(distrustful, timeout_s=0.5).exported == 0
        if protocol == "grpc":  # a bare host:port means TLS unless INSECURE says otherwise
            both["CERTIFICATE"] = str(certificates / "ca.pem")
            bare = endpoint.url.removeprefix("https://")
            assert send_all(transport(bare, protocol, **both)).exported == 10
    assert endpoint.num_spans == (20 if protocol == "grpc" else 10)


def test_insecure_means_grpc_without_tls() -> None:
    with grpc_endpoint() as endpoint:
        bare = endpoint.url.removeprefix("http://")
        assert send_all(transport(bare, "grpc", INSECURE="true")).exported == 10


# -- variables -----------------------------------------------------------------------------------


def test_the_variables_of_traces_win() -> None:
    options = OtlpOptions.from_env(
        {
            "OTEL_EXPORTER_OTLP_HEADERS": "a=1",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "b=2",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "gzip",
            "OTEL_EXPORTER_OTLP_TRACES_INSECURE": " ",
            "OTEL_EXPORTER_OTLP_INSECURE": "True",
        },
        "grpc",
    )
    assert (options.headers, options.compression, options.insecure) == ({"b": "2"}, "gzip", True)
    assert "2" not in repr(options), "headers are credentials"


@pytest.mark.parametrize(
    ("protocol", "name", "value", "told"),
    [
        ("grpc", "COMPRESSION", "deflate", "'deflate'; over grpc it must be one of none, gzip"),
        ("http/protobuf", "COMPRESSION", "zstd", "none, gzip, deflate"),
        ("grpc", "INSECURE", "yes", "true or false"),
        ("grpc", "CERTIFICATE", "/nowhere/ca.pem", "no such file"),
        ("grpc", "CLIENT_KEY", __file__, "given together"),
        ("grpc", "HEADERS", "a=1,secret", "part 2 is no header"),
        ("grpc", "HEADERS", "a=sec%0Aret", "'a' has characters"),
    ],
)
def test_a_variable_that_cannot_be_is_named(
    protocol: str, name: str, value: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        OtlpOptions.from_env({f"OTEL_EXPORTER_OTLP_{name}": value}, protocol)
    assert f"OTEL_EXPORTER_OTLP_{name}" in str(caught.value)
    assert "sec" not in str(caught.value).replace("INSECURE", "")


@pytest.mark.parametrize(
    ("protocol", "endpoint"), [("grpc", "ftp://h:1"), ("grpc", "http://"), ("http/protobuf", "h:1")]
)
def test_an_endpoint_that_cannot_be_is_told(protocol: str, endpoint: str) -> None:
    with pytest.raises(ValueError, match="otlp_endpoint"):
        transport(endpoint, protocol)


def test_the_bytes_on_the_wire_are_the_encoders() -> None:
    with http_endpoint() as endpoint:
        send_all(transport(endpoint.url))
    (encoded,) = encode(SPANS)
    assert endpoint.received == [ExportTraceServiceRequest.FromString(encoded.body)]
