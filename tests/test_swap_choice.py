"""The way that costs less is taken, by a model that a short measurement yields."""

import time

import pytest

from onecast.runtime.swap_choice import COPIES, KERNEL, UNMEASURED, Cost, SwapChoice, describe, fit


class Machine:
    """What calls take on it: a first call, and one in seven by chance, much longer."""

    def __init__(self, truth: SwapChoice, host_s: float = 0.0) -> None:
        self._truth, self._host_s = truth, host_s
        self.calls: list[tuple[str, int, int]] = []

    def measure(self, way: str, runs: int, blocks: int) -> tuple[float, float]:
        slow = 1.0 if (way, runs, blocks) not in self.calls or len(self.calls) % 7 == 0 else 0.0
        self.calls.append((way, runs, blocks))
        cost = (self._truth.copies if way == COPIES else self._truth.kernel).of(runs, blocks)
        return slow + self._host_s, slow + cost - self._host_s


TRUTH = SwapChoice(copies=Cost(8e-6, 5e-6, 20e-6), kernel=Cost(45e-6, 0.0, 22e-6))


def assert_same(found: SwapChoice, truth: SwapChoice) -> None:
    for one, other in zip(found, truth, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


def test_the_model_is_what_calls_take_whatever_a_few_of_them_took() -> None:
    machine = Machine(TRUTH)
    assert_same(fit(machine.measure, 16, 1.0), TRUTH)
    assert {call[1:] for call in machine.calls} == {(1, 1), (1, 16), (16, 16)}


def test_what_holds_up_the_host_counts_twice() -> None:
    """Until all was there, and once more as long as the call took."""

    def measure(way: str, runs: int, blocks: int) -> tuple[float, float]:
        return (runs if way == COPIES else 1) * 5e-6, TRUTH[way == KERNEL].of(runs, blocks)

    twice = SwapChoice(copies=Cost(8e-6, 10e-6, 20e-6), kernel=Cost(50e-6, 0.0, 22e-6))
    assert_same(fit(measure, 8, 0.0), twice)


def test_measuring_ends_when_its_time_is_over() -> None:
    def measure(way: str, runs: int, blocks: int) -> tuple[float, float]:
        time.sleep(0.002)
        calls.append(way)
        return 0.0, 1.0

    calls: list[str] = []
    fit(measure, 4, 0.0)
    least = len(calls)
    assert least == 15  # 5 kinds of calls, once not counted and twice counted
    calls.clear()
    fit(measure, 4, 100.0)
    assert len(calls) == 50  # and no more, however much time there is


def test_a_first_round_counts_for_nothing() -> None:
    """It compiles. Of the two that count the middle is taken."""

    def measure(*call: object) -> tuple[float, float]:
        calls.append(call)
        return 0.0, {1: 100.0, 2: 1.0, 3: 3.0}[calls.count(call)]

    calls: list[object] = []
    assert fit(measure, 4, 0.0) == SwapChoice(Cost(2.0, 0.0, 0.0), Cost(2.0, 0.0, 0.0))


def test_noise_gives_no_cost_below_nothing() -> None:
    times = {(COPIES, 1, 1): 3.0, (COPIES, 1, 4): 2.0, (COPIES, 4, 4): 1.0}
    times |= {(KERNEL, 1, 1): 2.0, (KERNEL, 4, 4): 1.0}
    found = fit(lambda *call: (0.0, times[call]), 4, 0.0)
    assert found == SwapChoice(Cost(3.0, 0.0, 0.0), Cost(2.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("runs", "blocks", "way"),
    [
        (1, 1, COPIES),
        (1, 500, COPIES),  # long runs: what the kernel loses per block tells
        (7, 7, COPIES),
        (16, 16, KERNEL),  # scattered: what each copy costs tells
        (400, 400, KERNEL),
        (4, 64, COPIES),
        (40, 64, KERNEL),
    ],
)
def test_the_cheaper_way_is_chosen(runs: int, blocks: int, way: str) -> None:
    assert TRUTH.choose(runs, blocks) == way


def test_of_equals_it_is_the_copies() -> None:
    assert SwapChoice(Cost(1.0, 0.0, 0.0), Cost(1.0, 0.0, 0.0)).choose(3, 3) == COPIES


def test_unmeasured_few_runs_are_copied_and_many_are_not() -> None:
    assert UNMEASURED.choose(1, 1) == UNMEASURED.choose(1, 30) == COPIES
    assert UNMEASURED.choose(30, 30) == KERNEL


def test_one_block_tells_nothing() -> None:
    with pytest.raises(AssertionError, match="1 blocks"):
        fit(Machine(TRUTH).measure, 1, 0.0)


def test_the_line_of_the_log() -> None:
    assert describe(TRUTH, "swap in") == (
        "swap in: copies 8.0 us + 5.00 a run + 20.00 a block; "
        "kernel 45.0 us + 0.00 a run + 22.00 a block"
    )
