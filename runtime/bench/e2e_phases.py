"""What each rank was doing when: the phases of its steps, stamped.

Owns an `Observer` that keeps stamps and nothing else. Stamps are perf_counter_ns: one clock for all
processes of a host. Knows nothing of what becomes of them.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from torch import Tensor

from onecast.runtime.observer import NullObserver


class Span(NamedTuple):
    name: str
    begin_ns: int
    end_ns: int


class RecordedStep(NamedTuple):
    """Of one rank; the spans in it do not overlap, and are in order."""

    begin_ns: int
    end_ns: int
    spans: list[Span]
    all_reduce_ns: int  # in the forward, all calls together


class PhaseRecorder(NullObserver):
    """Keeps the steps of one rank until they are taken. For one thread."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._spans: list[Span] = []
        self._steps: list[RecordedStep] = []
        self._all_reduce_ns = 0
        self._scope = _Step(self)

    def step(self, step: int, batch_size: int = 0) -> "_Step":
        return self._scope

    def phase(self, name: str) -> "_Phase":
        phase = self._phases.get(name)
        if phase is None:
            phase = self._phases[name] = _Phase(self, name)
        return phase

    def time_all_reduce(self, call: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
        """The same, with the time that it takes kept for the step it is in."""

        def timed(tensor: Tensor) -> None:
            begin_ns = time.perf_counter_ns()
            call(tensor)
            self._all_reduce_ns += time.perf_counter_ns() - begin_ns

        return timed

    def take(self) -> list[RecordedStep]:
        """All steps since the last call."""
        taken, self._steps = self._steps, []
        return taken

    def add_span(self, span: Span) -> None:
        self._spans.append(span)

    def end_step(self, begin_ns: int | None) -> None:
        """None: it was none."""
        spans, self._spans = self._spans, []
        all_reduce_ns, self._all_reduce_ns = self._all_reduce_ns, 0
        if begin_ns is not None:
            end_ns = time.perf_counter_ns()
            self._steps.append(RecordedStep(begin_ns, end_ns, spans, all_reduce_ns))


class _Step:
    def __init__(self, recorder: PhaseRecorder) -> None:
        self._recorder = recorder
        self._begin_ns: int | None = None

    def __enter__(self) -> Self:
        self._begin_ns = time.perf_counter_ns()
        return self

    def __exit__(self, *exception: object) -> None:
        self._recorder.end_step(self._begin_ns)

    def set_batch_size(self, num_sequences: int) -> None:
        return None

    def discard(self) -> None:
        self._begin_ns = None


class _Phase:
    """One phase, again and again."""

    def __init__(self, recorder: PhaseRecorder, name: str) -> None:
        self._recorder = recorder
        self._name = name
        self._begin_ns = 0

    def __enter__(self) -> None:
        self._begin_ns = time.perf_counter_ns()

    def __exit__(self, *exception: Any) -> None:
        self._recorder.add_span(Span(self._name, self._begin_ns, time.perf_counter_ns()))
