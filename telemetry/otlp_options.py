"""How an OTLP endpoint is reached: what the environment says beyond its address.

Owns these variables of OpenTelemetry; those with TRACES win over those without:

    OTEL_EXPORTER_OTLP[_TRACES]_HEADERS              key=value,key=value; percent-encoded
    OTEL_EXPORTER_OTLP[_TRACES]_COMPRESSION          none, gzip, deflate (http alone)
    OTEL_EXPORTER_OTLP[_TRACES]_CERTIFICATE          file of the authorities to trust
    OTEL_EXPORTER_OTLP[_TRACES]_CLIENT_CERTIFICATE   file of ours, with
    OTEL_EXPORTER_OTLP[_TRACES]_CLIENT_KEY           its key
    OTEL_EXPORTER_OTLP[_TRACES]_INSECURE             grpc without a scheme: true for no TLS

They hold credentials: none of these values is ever printed or handed to another process.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

_COMPRESSIONS = {"http/protobuf": ("none", "gzip", "deflate"), "grpc": ("none", "gzip")}
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True)
class OtlpOptions:
    """ValueError names the variable that cannot be; without its value, for it may be a secret."""

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # names in lower case
    compression: str = "none"
    certificate: str | None = None
    client_certificate: str | None = None
    client_key: str | None = None
    insecure: bool | None = None  # None: as the endpoint's scheme says

    @classmethod
    def from_env(cls, environ: Mapping[str, str], protocol: str) -> "OtlpOptions":
        variables = _Variables(environ)
        name, text = variables.find("COMPRESSION")
        compression = text or "none"
        if compression not in _COMPRESSIONS[protocol]:
            raise ValueError(
                f"{name} is {compression!r}; over {protocol} it must be one of "
                f"{', '.join(_COMPRESSIONS[protocol])}"
            )
        options = cls(
            headers=_headers(*variables.find("HEADERS")),
            compression=compression,
            certificate=_file(*variables.find("CERTIFICATE")),
            client_certificate=_file(*variables.find("CLIENT_CERTIFICATE")),
            client_key=_file(*variables.find("CLIENT_KEY")),
            insecure=_flag(*variables.find("INSECURE")),
        )
        if (options.client_certificate is None) != (options.client_key is None):
            raise ValueError(
                "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY "
                "must be given together"
            )
        return options


class _Variables:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def find(self, what: str) -> tuple[str, str]:
        """The variable that holds, and its value; an empty one counts as not there."""
        for name in (f"OTEL_EXPORTER_OTLP_TRACES_{what}", f"OTEL_EXPORTER_OTLP_{what}"):
            if text := self._environ.get(name, "").strip():
                return name, text
        return f"OTEL_EXPORTER_OTLP_{what}", ""


def _headers(name: str, text: str) -> dict[str, str]:
    found = {}
    for place, part in enumerate(filter(None, (part.strip() for part in text.split(",")))):
        key, equals, value = part.partition("=")
        key, value = unquote(key.strip()), unquote(value.strip())
        if not equals or _HEADER_NAME.fullmatch(key) is None:
            raise ValueError(f"{name}: part {place + 1} is no header key=value")
        if not value.isprintable() or not value.isascii():
            raise ValueError(f"{name}: the value of header {key!r} has characters no header may")
        found[key.lower()] = value
    return found


def _file(name: str, text: str) -> str | None:
    if not text:
        return None
    if not Path(text).is_file():
        raise ValueError(f"{name} is {text!r}: there is no such file")
    return text


def _flag(name: str, text: str) -> bool | None:
    if not text:
        return None
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{name} is {text!r}; it must be true or false")
    return text.lower() == "true"
