"""Steps of programs without steps: the same on all ranks, whatever their optimizers do."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from onecast.telemetry.auto_steps import CollectiveTurns, OptimizerTurns, StepClock
from onecast.telemetry.ring import COLLECTIVE, PHASE, pack_meta


class Log:
    """A step's scope, a phase's scope and a ring, all writing down what is done to them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.step = -1
        self.records = 0
        self.names: list[str] = []

    def __enter__(self) -> None:
        self.events.append(f"step {self.step}")

    def __exit__(self, *exception: Any) -> None:
        self.events.append(f"end {self.step}")

    def discard(self) -> None:
        self.events.append(f"discard {self.step}")

    def intern(self, name: str) -> int:
        self.names.append(name)
        return len(self.names)

    def begin(self, meta: int, sequence: int, nbytes: int) -> int:
        self.events.append(f"begin {sequence}")
        return sequence

    def end(self, ticket: int, status: int = 0) -> None:
        self.events.append(f"end of {ticket}")

    def fail(self, ticket: int, error: BaseException) -> None:
        self.events.append(f"fail {ticket}")

    def set_coverage(self, group: int, unrecorded: int) -> None:
        self.events.append(f"coverage {group} {unrecorded}")


class Phase:
    def __init__(self, log: Log) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.log.events.append("phase")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.log.events.append("phase ended" if error is None else f"phase failed: {error}")


@pytest.fixture
def log() -> Log:
    return Log()


def clock_of(log: Log) -> StepClock:
    return StepClock(log, lambda: log.records)


def test_a_step_ends_where_the_next_begins_and_the_open_one_was_none(log: Log) -> None:
    clock = clock_of(log)
    clock.turn()
    clock.turn()
    clock.stop()
    clock.turn()  # too late
    clock.stop()
    assert log.events == [
        "step 0", "end 0", "step 1", "end 1", "step 2", "discard 2", "end 2",
    ]  # fmt: skip


def test_a_step_without_an_end_in_sight_is_given_up_and_counting_goes_on(log: Log) -> None:
    clock = clock_of(log)
    log.records = 16384
    clock.give_up_long()
    assert log.events == ["step 0"]
    log.records += 1
    clock.give_up_long()
    clock.give_up_long()
    assert log.events == ["step 0", "discard 0", "end 0"]
    clock.turn()  # its number counts turns, so that ranks that did not give up agree
    clock.turn()
    assert log.events[3:] == ["step 1", "end 1", "step 2"]


@pytest.fixture
def turns(log: Log) -> Iterator[OptimizerTurns]:
    turns = OptimizerTurns(Phase(log))
    turns.start(clock_of(log))
    yield turns
    turns.stop()


def optimizer(kind: Any = torch.optim.SGD, **options: Any) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    made: torch.optim.Optimizer = kind([parameter], lr=0.1, **options)
    return made


def steps(log: Log) -> list[int]:
    return [int(event.split()[1]) for event in log.events if event.startswith("end ")]


def test_an_optimizers_step_is_a_phase_and_ends_a_step(log: Log, turns: OptimizerTurns) -> None:
    one = optimizer(torch.optim.AdamW)
    one.step()
    one.step()
    assert log.events == [
        "step 0", "phase", "phase ended", "end 0", "step 1", "phase", "phase ended", "end 1",
        "step 2",
    ]  # fmt: skip


def test_nothing_of_ours_stays_with_torch(log: Log) -> None:
    from torch.optim import optimizer as module

    hooks = module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks
    before = [dict(found) for found in hooks]
    turns = OptimizerTurns(Phase(log))
    turns.start(clock_of(log))
    assert [len(found) for found in hooks] == [len(found) + 1 for found in before]
    turns.stop()
    assert [dict(found) for found in hooks] == before
    optimizer().step()
    assert steps(log) == []


def test_of_several_optimizers_the_first_counts(log: Log, turns: OptimizerTurns) -> None:
    discriminator, generator = optimizer(), optimizer()
    for _ in range(3):
        discriminator.step()
        generator.step()
    assert steps(log) == [0, 1, 2]


def test_one_optimizer_a_parameter_is_one_step(log: Log, turns: OptimizerTurns) -> None:
    each = [optimizer() for _ in range(50)]
    for _ in range(4):
        for one in each:
            one.step()
    assert steps(log) == [0, 1, 2, 3]


def test_another_optimizer_counts_once_the_first_is_no_longer_used(
    log: Log, turns: OptimizerTurns
) -> None:
    optimizer().step()
    other = optimizer()
    for _ in range(8):
        other.step()
    assert steps(log) == [0, 1]
    other.step()
    assert steps(log) == [0, 1, 2]


def test_an_optimizer_inside_another_is_part_of_it(log: Log, turns: OptimizerTurns) -> None:
    inner = optimizer()

    class Wrapper(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([torch.nn.Parameter(torch.ones(1))], {})

        def step(self, closure: Any = None) -> None:
            inner.step()

    wrapper = Wrapper()
    wrapper.step()
    wrapper.step()
    assert steps(log) == [0, 1]
    assert log.events.count("phase") == 2


def test_a_step_that_raised_is_no_step_and_the_next_one_is(log: Log, turns: OptimizerTurns) -> None:
    one = optimizer()

    def raises() -> float:
        raise KeyError("in the closure")

    with pytest.raises(KeyError):
        one.step(raises)
    one.step()
    assert log.events == [
        "step 0", "phase", "phase failed: the step did not end", "phase", "phase ended", "end 0",
        "step 1",
    ]  # fmt: skip


def test_every_n_collectives_of_the_default_group_are_a_step(log: Log) -> None:
    turns = CollectiveTurns(log, "0", 3)
    turns.start(clock_of(log))
    reduce, send = turns.intern("all_reduce"), turns.intern("send")
    world, tensor = turns.intern("default_pg\t0"), turns.intern("tp\t10")
    counted = pack_meta(COLLECTIVE, reduce, world, group_size=2)
    for sequence in range(1, 8):
        turns.begin(counted, sequence, 8)
        turns.begin(pack_meta(COLLECTIVE, reduce, tensor, group_size=2), 100 + sequence, 8)
        turns.begin(pack_meta(COLLECTIVE, send, world, group_size=2), 200 + sequence, 8)
        turns.begin(pack_meta(PHASE, reduce, world), 300 + sequence, 8)
    shown = [event for event in log.events if int(event.split()[1]) < 100]
    assert shown == [
        "step 0", "begin 1", "begin 2", "begin 3", "end 0", "step 1", "begin 4", "begin 5",
        "begin 6", "end 1", "step 2", "begin 7",
    ]  # fmt: skip
    turns.stop()
    turns.begin(counted, 10, 8)
    assert log.events[-1] == "begin 10"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its compiler
def test_a_compiled_step_still_turns_the_clock(log: Log, turns: OptimizerTurns) -> None:
    one = optimizer()
    compiled = torch.compile(one.step, backend="eager")
    compiled()
    compiled()
    assert steps(log) == [0, 1]
