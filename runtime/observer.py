"""What the loop tells whoever watches it: steps, phases, requests and a few values.

Owns the narrow protocol, and the observer that watches nothing. Knows nothing of telemetry:
`launch.py` alone puts the real one here.
"""

from collections.abc import Set
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, Self

from onecast.comm import CollectiveProbe, Probe


class ObservedStep(Protocol):
    """One step of this rank, from the wait for its frame to its last phase."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def set_batch_size(self, num_sequences: int) -> None:
        """A worker learns how many sequences a step has only when its frame is there."""

    def discard(self) -> None:
        """No step after all: what arrived was the end of the run."""


class RequestObserver(Protocol):
    """What becomes of requests. Each has a number of its own in this engine, counted from 0."""

    def admitted(
        self, number: int, traceparent: str | None = None, tracestate: str | None = None
    ) -> None:
        """It was queued; the W3C trace context that it came with, unchecked."""

    def scheduled(self, step: int, numbers: Set[int]) -> None:
        """The requests that have a part in a step; `numbers` must not change afterwards."""

    def finished(
        self,
        number: int,
        arrival_ns: int,
        first_scheduled_ns: int,
        first_token_ns: int,
        prompt: int,
        generated: int,
        reason: str,
        error: bool = False,
    ) -> None:
        """It is over. perf_counter_ns, 0 for what never came; tokens; `reason` as OpenAI has it,
        "abort", or with `error` the exception's type."""


class Observer(Protocol):
    """The loop's view of telemetry. All calls are cheap enough for the hot path."""

    @property
    def probe(self) -> Probe | None: ...

    @property
    def collectives(self) -> CollectiveProbe | None: ...

    @property
    def requests(self) -> RequestObserver | None: ...

    def step(self, step: int, batch_size: int = 0) -> ObservedStep: ...

    def phase(self, name: str) -> AbstractContextManager[Any]: ...

    def set_value(self, name: str, value: int) -> None: ...


class _Unobserved:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def set_batch_size(self, num_sequences: int) -> None:
        return None

    def discard(self) -> None:
        return None


class NullObserver:
    """Watches nothing, allocates nothing."""

    probe: Probe | None = None
    collectives: CollectiveProbe | None = None
    requests: RequestObserver | None = None
    _nothing = _Unobserved()

    def step(self, step: int, batch_size: int = 0) -> ObservedStep:
        return self._nothing

    def phase(self, name: str) -> AbstractContextManager[Any]:
        return self._nothing

    def set_value(self, name: str, value: int) -> None:
        return None
