"""OTLP over HTTP: posts encoded requests on one connection that stays open.

Owns headers, compression, TLS, and what a status means. Knows nothing of retries or spans.
"""

import gzip
import time
import zlib
from email.utils import parsedate_to_datetime

import requests

from .otlp_answer import Answer, accepted
from .otlp_options import OtlpOptions

_RETRYABLE = (429, 502, 503, 504)
_MOST_OF_AN_ANSWER = 1 << 16  # bytes; what comes after is not read
_FAST = 1  # of gzip's levels: spans are so alike that the higher ones gain little


class HttpTransport:
    """`endpoint` is the full URL. Proxies are those of the environment, as `requests` has them."""

    def __init__(self, endpoint: str, options: OtlpOptions, user_agent: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"otlp_endpoint is {endpoint!r}; it must begin with http:// or https://"
            )
        self._endpoint = endpoint
        self._compression = options.compression
        self._session = requests.Session()
        self._session.headers.update(
            {
                "User-Agent": user_agent,
                "Content-Type": "application/x-protobuf",
                **options.headers,
            }
        )
        if self._compression != "none":
            self._session.headers["Content-Encoding"] = self._compression
        # Given with every request: the session's own would lose to REQUESTS_CA_BUNDLE.
        self._verify = options.certificate
        if options.client_certificate is not None and options.client_key is not None:
            self._session.cert = (options.client_certificate, options.client_key)

    def send(self, body: bytes, timeout_s: float) -> Answer:
        if self._compression == "gzip":
            body = gzip.compress(body, _FAST, mtime=0)
        elif self._compression == "deflate":
            body = zlib.compress(body, _FAST)
        try:
            with self._session.post(
                self._endpoint,
                data=body,
                timeout=timeout_s,
                verify=self._verify,
                allow_redirects=False,  # a redirected POST would become a GET
                stream=True,
            ) as response:
                answer = response.raw.read(_MOST_OF_AN_ANSWER, decode_content=True)
                return _answer(response, answer)
        except (requests.ConnectionError, requests.Timeout) as error:
            return Answer(False, retry=True, reason=_reason(error))
        except (requests.RequestException, OSError, ValueError) as error:
            return Answer(False, reason=_reason(error))

    def close(self) -> None:
        self._session.close()


def _answer(response: requests.Response, body: bytes) -> Answer:
    if 200 <= response.status_code < 300:
        return accepted(body)
    return Answer(
        False,
        retry=response.status_code in _RETRYABLE,
        retry_after_s=_retry_after(response.headers.get("Retry-After", "")),
        reason=f"HTTP status {response.status_code} {response.reason or ''}".rstrip(),
    )


def _retry_after(text: str) -> float | None:
    """Seconds, or a date."""
    text = text.strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    """The innermost cause; what is around it has the URL, and that may hold a password."""
    cause: Exception = error
    while (inner := _inner(cause)) is not None:
        cause = inner
    name = type(cause).__name__
    tells = isinstance(cause, OSError) and not isinstance(cause, requests.RequestException)
    return f"{name}: {cause}" if tells else name


def _inner(error: Exception) -> Exception | None:
    candidates = (getattr(error, "reason", None), *error.args, error.__cause__)
    return next((one for one in candidates if isinstance(one, Exception)), None)
