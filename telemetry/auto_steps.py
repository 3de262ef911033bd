"""Steps of a program that knows nothing of steps, found from what it does anyway.

Owns when one step ends and the next begins; `StepClock` counts them, and what turns it is one of

    OptimizerTurns    torch.optim: a step ends with an optimizer's step, which is a phase of it
    CollectiveTurns   every N collectives of the default group

Both depend only on what all ranks do alike, so step numbers agree between ranks and nothing is
sent. The first step begins at once, each other one where the last one ended. The one that is open
when it all ends was none, nor is one with so many records that its end is not in sight: a program
that has no optimizer. Knows nothing of rings but their tickets, and imports no torch by itself.
"""

import itertools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from .intercept import Recorder
from .ring import COLLECTIVE, is_point_to_point, meta_group, meta_kind, meta_name

_CLOCK_CHANGES_AFTER = 8  # steps of one optimizer without any of the one that counts
_TOO_MANY_RECORDS = 16384


class StepScope(Protocol):
    """A reusable context, as `Session.step` returns one."""

    step: int

    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: Any) -> None: ...
    def discard(self) -> None: ...


class StepClock:
    """Opens step 0 and, with every `turn`, the next one, until `stop`."""

    def __init__(self, scope: StepScope, records: Callable[[], int]) -> None:
        """`records()`: how many records the rank has written so far."""
        self._scope = scope
        self._records = records
        self._next = itertools.count().__next__
        self._lock = threading.Lock()  # a step may be given up by another thread
        self._open = self._stopped = False
        self._since = 0
        self._begin()

    def turn(self) -> None:
        """Here one step ends and the next begins."""
        with self._lock:
            if self._stopped:
                return
            if self._open:
                self._scope.__exit__(None, None, None)
            self._begin()

    def give_up_long(self) -> None:
        """Discard the open step if it has too many records to be one; a turn opens the next."""
        with self._lock:
            if self._open and self._records() - self._since > _TOO_MANY_RECORDS:
                self._discard()

    def stop(self) -> None:
        """No more steps. The open one was none: what it has recorded belongs to no step."""
        with self._lock:
            self._stopped = True
            self._discard()

    def _discard(self) -> None:
        if self._open:
            self._open = False
            self._scope.discard()
            self._scope.__exit__(None, None, None)

    def _begin(self) -> None:
        self._scope.step = self._next()
        self._since = self._records()
        self._scope.__enter__()
        self._open = True


class Turns(Protocol):
    """What turns a clock."""

    def start(self, clock: StepClock) -> None: ...
    def stop(self) -> None: ...


class OptimizerTurns:
    """Turns the clock after each step of the program's optimizer.

    Where there are several (adversarial training, one optimizer a parameter), the first that
    steps counts, until another has stepped many times without it. An optimizer's step within
    another's is part of it.
    """

    def __init__(self, phase: Any) -> None:
        """`phase`: the reusable context of an optimizer's step."""
        self._clock: StepClock | None = None
        self._phase = phase
        self._pid = os.getpid()
        self._inside: list[int] = []
        self._numbers: dict[int, tuple[weakref.ref[Any], int]] = {}  # by id, which is used again
        self._counts: int | None = None  # the number of the optimizer that does
        self._next_number = itertools.count().__next__
        self._others: dict[int, int] = {}
        self._handles: list[Any] = []

    def start(self, clock: StepClock) -> None:
        from torch.optim.optimizer import (
            register_optimizer_step_post_hook,
            register_optimizer_step_pre_hook,
        )

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            self._before(self._number(optimizer))

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            self._after(self._number(optimizer))

        self._clock = clock
        for hook in (before, after):
            hook._torchdynamo_disable = True  # type: ignore[attr-defined]  # a compiled step calls it
        self._handles = [
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _number(self, optimizer: Any) -> int:
        """Optimizers in the order they first stepped: unlike their ids, the same on all ranks."""
        known = self._numbers.get(id(optimizer))
        if known is None or known[0]() is not optimizer:
            known = weakref.ref(optimizer), self._next_number()
            self._numbers[id(optimizer)] = known
        return known[1]

    def _before(self, optimizer: int) -> None:
        if os.getpid() != self._pid:
            return
        if optimizer in self._inside:  # its last step raised
            self._leave(optimizer, RuntimeError("the step did not end"))
        if not self._inside:
            self._phase.__enter__()
        self._inside.append(optimizer)

    def _after(self, optimizer: int) -> None:
        if os.getpid() != self._pid or optimizer not in self._inside:
            return
        self._leave(optimizer, None)
        if not self._inside and self._is_the_one(optimizer) and self._clock is not None:
            self._clock.turn()

    def _leave(self, optimizer: int, error: Exception | None) -> None:
        del self._inside[self._inside.index(optimizer) :]
        if not self._inside:
            self._phase.__exit__(type(error) if error else None, error, None)

    def _is_the_one(self, optimizer: int) -> bool:
        if self._counts is None:
            self._counts = optimizer
        if optimizer != self._counts:
            steps = self._others[optimizer] = self._others.get(optimizer, 0) + 1
            if steps < _CLOCK_CHANGES_AFTER:
                return False
            self._counts = optimizer
        self._others.clear()
        return True


class CollectiveTurns:
    """A recorder that turns the clock before collective N + 1, 2 N + 1, ... of the default group.

    It stands before the ring, so the collective that ends a step by beginning is in the next one.
    """

    def __init__(self, ring: Recorder, default_group: str, every: int) -> None:
        """`default_group`: its name, unique in the cluster, as torch has it."""
        self._ring = ring
        self._suffix = f"\t{default_group}"
        self._every = every
        self._last = every  # the number of the last collective of the open step
        self._pid = os.getpid()
        self._default: int | None = None
        self._uncounted: set[int] = set()
        self._counts: dict[int, bool] = {}  # by meta word
        self._clock: StepClock | None = None
        self.end = ring.end
        self.fail = ring.fail
        self.set_coverage = ring.set_coverage
        self._begin = ring.begin

    def start(self, clock: StepClock) -> None:
        self._clock = clock

    def stop(self) -> None:
        self._clock = None

    def intern(self, name: str) -> int:
        number = self._ring.intern(name)
        if name.endswith(self._suffix):
            self._default = number
        elif is_point_to_point(name):
            self._uncounted.add(number)
        return number

    def begin(self, meta: int, sequence: int, nbytes: int) -> int:
        if sequence > self._last and self._clock is not None and self._is_counted(meta):
            self._last += self._every
            if os.getpid() == self._pid:
                self._clock.turn()
        return self._begin(meta, sequence, nbytes)

    def _is_counted(self, meta: int) -> bool:
        counts = self._counts.get(meta)
        if counts is None:
            counts = self._counts[meta] = (
                meta_kind(meta) == COLLECTIVE
                and meta_group(meta) == self._default
                and meta_name(meta) not in self._uncounted
            )
        return counts
