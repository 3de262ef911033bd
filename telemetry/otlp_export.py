"""Sends what is handed to it to an OTLP endpoint, from a thread of the sidecar.

Owns the queue, the retries, and the count of what it drops. Knows neither what the items are (it is
given the function that encodes them) nor the protocol. Never blocks its caller: a slow or absent
endpoint costs spans, and they are counted by reason:

    queue_full      more waited than otlp_queue_spans
    export_failed   the endpoint refused them, or did not take them within otlp_timeout_s
    rejected        the endpoint took the request, but not these of its spans
    encoding        they could not be encoded: a mistake of ours
    shutdown        the time to flush them was over
"""

import logging
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from .otlp_answer import Answer, Transport
from .otlp_encoder import Encoded

_logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_BATCH_SPANS = 8192
_LINGER_S = 0.1  # so long spans wait for others; a step a post would keep both ends busy
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.1, 5.0
_LAST_WAIT_S = 0.5  # for the thread to see that it is over


class OtlpExport(Generic[Item]):
    """A bounded queue in front of an endpoint. Items go whole or not at all."""

    def __init__(
        self,
        transport: Transport,
        encode: Callable[[Sequence[Item]], list[Encoded]],
        *,
        timeout_s: float,
        queue_spans: int,
    ) -> None:
        self.dropped: Counter[str] = Counter()  # spans, by reason
        self.exported = 0  # spans
        self._transport = transport
        self._encode = encode
        self._timeout_s = timeout_s
        self._limit = queue_spans
        self._queue: deque[tuple[Item, int]] = deque()
        self._queued = 0  # spans in the queue
        self._sending = 0  # spans that have left it, and are neither sent nor dropped
        self._changed = threading.Condition()
        self._closing_by: float | None = None  # time.monotonic
        self._over = threading.Event()  # what is still here has been counted as dropped
        self._failing = False
        # A daemon: a transport that ignores its timeout must not keep the sidecar alive.
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def submit(self, item: Item, num_spans: int) -> bool:
        """Queue an item, or drop it; whether it was queued."""
        with self._changed:
            if self._queued + self._sending + num_spans > self._limit:
                self.dropped["queue_full"] += num_spans
                return False
            self._queue.append((item, num_spans))
            self._queued += num_spans
            if self._queued >= _BATCH_SPANS or len(self._queue) == 1:
                self._changed.notify()
            return True

    def close(self) -> None:
        """Send what is queued, within otlp_timeout_s; what is left is dropped and counted."""
        with self._changed:
            self._closing_by = time.monotonic() + self._timeout_s
            self._changed.notify()
        self._thread.join(self._timeout_s)
        with self._changed:
            self._over.set()
            left = self._queued + self._sending
            if left:
                self.dropped["shutdown"] += left
            self._queued = self._sending = 0
            self._queue.clear()
            self._changed.notify()
        self._transport.close()
        self._thread.join(_LAST_WAIT_S)

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while items := self._next_batch():
            try:
                requests = self._encode(items)
            except Exception as error:  # the thread must outlive one bad batch
                if not self._failing:
                    _logger.exception("spans cannot be encoded")
                self._settle(self._sending, Answer(False, reason=repr(error)), "encoding")
                continue
            for encoded in requests:
                if self._over.is_set():
                    return
                self._settle(encoded.num_spans, self._send(encoded.body), "export_failed")
            with self._changed:
                self._sending = 0  # whatever was announced, all of it is settled

    def _next_batch(self) -> list[Item]:
        """What is queued, once it is enough or has waited; nothing when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing_by is not None)
            self._changed.wait_for(
                lambda: self._queued >= _BATCH_SPANS or self._closing_by is not None, _LINGER_S
            )
            items: list[Item] = []
            while self._queue and (not items or self._sending < _BATCH_SPANS):
                item, num_spans = self._queue.popleft()
                items.append(item)
                self._queued -= num_spans
                self._sending += num_spans
            return items

    def _send(self, body: bytes) -> Answer:
        """Once, and again while that may help and there is time."""
        deadline = time.monotonic() + self._timeout_s
        backoff_s = _FIRST_BACKOFF_S
        while True:
            if self._closing_by is not None:
                deadline = min(deadline, self._closing_by)
            answer = self._transport.send(body, max(0.01, deadline - time.monotonic()))
            if answer.accepted or not answer.retry:
                return answer
            wait_s = backoff_s * random.uniform(0.8, 1.2)
            if answer.retry_after_s is not None:
                wait_s = answer.retry_after_s
            if time.monotonic() + wait_s >= deadline or self._over.wait(wait_s):
                return answer
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    def _settle(self, num_spans: int, answer: Answer, reason: str) -> None:
        rejected = min(answer.rejected_spans, num_spans)
        with self._changed:
            if self._over.is_set():
                return  # close() has counted them already
            self._sending -= num_spans
            if answer.accepted:
                self.exported += num_spans - rejected
                if rejected:
                    self.dropped["rejected"] += rejected
            else:
                self.dropped[reason] += num_spans
        self._tell(answer, failing=not answer.accepted or rejected > 0)

    def _tell(self, answer: Answer, *, failing: bool) -> None:
        """One line when it begins to fail, and one when it works again."""
        if failing and not self._failing:
            _logger.warning("OTLP export fails (%s): spans are being dropped", answer.reason)
        elif self._failing and not failing:
            _logger.warning(
                "OTLP export works again; spans dropped so far: %d", sum(self.dropped.values())
            )
        self._failing = failing
