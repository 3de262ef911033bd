"""Hangs: whoever does not come, calls another thing or is stopped is named, and named once."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from recorded_ranks import (
    RecordedRanks,
    phase,
    recorded_ranks,
    recording,
    say,
    wait_for_test,
)
from written_rings import SECOND, START, WrittenRing

from onecast.telemetry.hang import Hang, HangWatch
from onecast.telemetry.hang_diagnosis import diagnose

LIMIT_S = 0.3


def _watched(ranks: RecordedRanks, watch: HangWatch) -> list[Hang]:
    drained = {rank: reader.drain() for rank, reader in ranks.readers.items()}
    return watch.poll(ranks.readers, drained, time.perf_counter_ns())


def _hangs(
    ranks: RecordedRanks, watch: HangWatch, such: Callable[[Hang], bool], count: int = 1
) -> list[Hang]:
    """The hangs that go on, once there are `count` of which that is true."""

    def look() -> list[Hang]:
        _watched(ranks, watch)
        found = [hang for hang in watch.hangs if such(hang)]
        return found if len(found) == count else []

    found: list[Hang] = ranks.until(look, f"{count} hangs of that kind")
    return found


def _swaps_too_long(rank: int, run_dir: str) -> None:
    ring = recording(rank, run_dir)
    tensor = torch.ones(4096)
    for _ in range(3):
        dist.all_reduce(tensor)
    if rank == 1:
        with phase(ring, "kv.swap_in"):
            say(run_dir, "swapping")
            wait_for_test(run_dir)
    wait_for_test(run_dir, "swapping")
    dist.all_reduce(tensor)
    wait_for_test(run_dir, "leave")


def test_a_rank_that_does_not_come_is_named_with_what_it_does_and_told_once() -> None:
    with recorded_ranks(_swaps_too_long) as ranks:
        watch = HangWatch(LIMIT_S, 2)
        (hang,) = ranks.until(lambda: _watched(ranks, watch), "a hang")
        again = time.monotonic() + 1.3
        while time.monotonic() < again:
            assert not _watched(ranks, watch), "it was told before, and nothing has changed"
            time.sleep(0.05)
        (open_now,) = watch.hangs
        assert open_now.age_s > 1.3
        ranks.release("go")
        (over,) = ranks.until(lambda: _watched(ranks, watch), "the end of the hang")
        assert over.over and over.text.startswith("over after ")
        assert "all_reduce #4 (default_pg), which held up rank 0" in over.text
        assert not watch.hangs
    waits, absent = hang.text.split("; ")
    assert waits.startswith("rank 0 waits in all_reduce #4 (default_pg, 16 KiB) for ")
    assert absent.startswith("rank 1 never entered it: last finished #3, now in kv.swap_in for ")
    assert [(one.rank, one.status) for one in hang.ranks] == [(0, "waits"), (1, "absent")]
    assert (hang.kind, hang.op, hang.sequence) == ("hang", "all_reduce", 4)
    assert watch.totals == {("hang", "all_reduce", "default_pg"): 1}
    assert watch.told


def _never_begins(rank: int, run_dir: str) -> None:
    recording(rank, run_dir)
    if rank == 1:
        wait_for_test(run_dir)
    dist.barrier()


def test_a_hang_at_the_very_first_collective_is_named() -> None:
    with recorded_ranks(_never_begins) as ranks:
        (hang,) = _hangs(ranks, HangWatch(LIMIT_S, 2), lambda hang: hang.kind == "hang")
    assert "rank 0 waits in barrier #1 (default_pg) for " in hang.text
    assert (
        "rank 1 never entered it: it has called nothing of this group yet, now in no phase, "
        "with nothing recorded yet" in hang.text
    )


def _calls_something_else(rank: int, run_dir: str) -> None:
    recording(rank, run_dir)
    dist.all_reduce(torch.ones(4))
    if rank == 1:
        dist.barrier()
    else:
        dist.all_reduce(torch.ones(4096))


def test_ranks_that_call_different_operations_are_a_desync() -> None:
    watch = HangWatch(LIMIT_S, 2)
    with recorded_ranks(_calls_something_else) as ranks:
        (hang,) = _hangs(ranks, watch, lambda hang: hang.kind == "desync")
    assert hang.text.startswith(
        "ranks disagree on #2 of default_pg: rank 0 called all_reduce (16 KiB), "
        "rank 1 called barrier; "
    )
    assert watch.totals["desync", "all_reduce", "default_pg"] == 1


def _gives_another_size(rank: int, run_dir: str) -> None:
    recording(rank, run_dir)
    dist.all_reduce(torch.ones(4))
    dist.all_reduce(torch.ones(4096 if rank else 8192))
    dist.all_reduce(torch.ones(4))


def test_ranks_that_give_different_sizes_are_a_desync_even_if_it_ends_them() -> None:
    with recorded_ranks(_gives_another_size) as ranks:
        ranks.until(lambda: len(ranks.readers) == 2, "both rings")
        ranks.join()  # Gloo aborts the one and fails the other, or both wait
        watch = HangWatch(LIMIT_S, 2)
        drained = {rank: reader.drain() for rank, reader in ranks.readers.items()}
        told = watch.poll(ranks.readers, drained, time.perf_counter_ns(), last=True)
    assert ranks.failure is not None
    (hang,) = told
    assert hang.kind == "desync"
    assert hang.text.startswith(
        "ranks disagree on #2 of default_pg: rank 0 called all_reduce (32 KiB), "
        "rank 1 called all_reduce (16 KiB)"
    )
    assert watch.totals == {("desync", "all_reduce", "default_pg"): 1}


def _crosses(rank: int, run_dir: str) -> None:
    recording(rank, run_dir)
    tp, dp = dist.new_group(group_desc="tp"), dist.new_group(group_desc="dp")
    for group in (dp, tp) if rank else (tp, dp):
        dist.all_reduce(torch.ones(4), group=group)


def test_ranks_that_use_two_groups_in_different_orders_wait_for_each_other() -> None:
    watch = HangWatch(LIMIT_S, 2)
    with recorded_ranks(_crosses) as ranks:
        hangs = _hangs(ranks, watch, lambda hang: hang.kind == "desync", 2)
    assert {hang.group for hang in hangs} == {"tp", "dp"}
    for hang in hangs:
        assert "they call their collectives in different orders" in hang.text
        assert "now waiting in all_reduce #1" in hang.text
    assert sum(n for (kind, _, _), n in watch.totals.items() if kind == "desync") == 1


def _is_stopped(rank: int, run_dir: str) -> None:
    ring = recording(rank, run_dir)
    dist.all_reduce(torch.ones(4))
    if rank == 1:
        with phase(ring, "model.forward"):
            say(run_dir, "busy")
            wait_for_test(run_dir)
    dist.all_reduce(torch.ones(4))
    wait_for_test(run_dir, "leave")


def test_a_stopped_rank_is_named_as_such_and_what_it_does_when_it_goes_on() -> None:
    with recorded_ranks(_is_stopped) as ranks:
        watch = HangWatch(LIMIT_S, 2)
        ranks.until(Path(ranks.run_dir, "busy").exists, "the phase")
        ranks.kill(1, signal.SIGSTOP)
        ranks.until(lambda: ranks.looks()[1].state == "stopped", "that it has stopped")
        try:
            (hang,) = ranks.until(lambda: _watched(ranks, watch), "a hang")
            pid = ranks.readers[1].pid
            assert f"rank 1 is stopped (SIGSTOP, pid {pid}): last finished #1, in " in hang.text
            assert {one.rank: one.status for one in hang.ranks} == {0: "waits", 1: "stopped"}
        finally:
            ranks.kill(1, signal.SIGCONT)
        (hang,) = ranks.until(lambda: _watched(ranks, watch), "what has changed")
        assert "rank 1 never entered it: last finished #1, now in model.forward" in hang.text
        ranks.release("go")
        (over,) = ranks.until(lambda: _watched(ranks, watch), "the end of the hang")
        assert over.over
        assert sum(watch.totals.values()) == 1


def _receives_nothing(rank: int, run_dir: str) -> None:
    recording(rank, run_dir)
    if rank == 0:
        dist.recv(torch.ones(4), 1)
    else:
        wait_for_test(run_dir)
        dist.send(torch.ones(4), 0)


def test_a_receive_without_a_send_is_told_without_guessing_whose() -> None:
    watch = HangWatch(LIMIT_S, 2)
    with recorded_ranks(_receives_nothing) as ranks:
        (hang,) = _hangs(ranks, watch, lambda hang: hang.op == "recv")
    assert hang.text.startswith("rank 0 waits in recv #1 (default_pg, 16 B) for ")
    assert "whom it waits for is not recorded; rank 1 is now in no phase" in hang.text
    assert watch.totals == {("hang", "recv", "default_pg"): 1}


def _forgets_to_wait(rank: int, run_dir: str) -> None:
    ring = recording(rank, run_dir)
    work = dist.all_reduce(torch.ones(4), async_op=True)
    while not Path(run_dir, "go").exists():
        with phase(ring, "model.forward"):
            time.sleep(0.02)
    work.wait()


def test_an_operation_that_nobody_waits_for_is_told_but_is_no_hang() -> None:
    watch = HangWatch(1.0, 2)  # as long may a busy machine keep a rank from recording
    with recorded_ranks(_forgets_to_wait) as ranks:
        (hang,) = _hangs(ranks, watch, lambda hang: hang.kind == "unwaited")
    assert " all_reduce #1 (default_pg, 16 B) in flight for " in hang.text
    assert " and went on, now in " in hang.text
    assert hang.text.endswith("all of its ranks have entered it, and nobody waits for it")
    assert not [key for key in watch.totals if key[0] == "desync"]


def _four_ranks_in_three_groups(rank: int, run_dir: str) -> None:
    ring = recording(rank, run_dir, 4)
    pairs = [dist.new_group([0, 1], group_desc="tp"), dist.new_group([2, 3], group_desc="tp")]
    for _ in range(2):
        dist.all_reduce(torch.ones(4), group=pairs[rank // 2])
        dist.all_reduce(torch.ones(8))
    if rank == 1:
        with phase(ring, "kv.swap_out"):
            say(run_dir, "swapping")
            wait_for_test(run_dir)
    wait_for_test(run_dir, "swapping")
    dist.all_reduce(torch.ones(4), group=pairs[rank // 2])
    dist.all_reduce(torch.ones(8))


def test_of_several_groups_the_one_that_holds_up_the_others_comes_first_and_is_counted() -> None:
    watch = HangWatch(LIMIT_S, 4)
    with recorded_ranks(_four_ranks_in_three_groups, 4) as ranks:
        (held_up,) = _hangs(ranks, watch, lambda hang: hang.consequence)
        (root,) = _hangs(ranks, watch, lambda hang: not hang.consequence)
    assert root.text.startswith("rank 0 waits in all_reduce #3 (tp, 16 B) for ")
    assert "rank 1 never entered it: last finished #2, now in kv.swap_out for " in root.text
    assert held_up.text.startswith("ranks 2, 3 wait in all_reduce #3 (default_pg, 32 B) for ")
    assert (
        "rank 0 never entered it: last finished #2, now waiting in all_reduce #3 (tp"
        in held_up.text
    )
    assert watch.totals["hang", "all_reduce", "tp"] == 1


# ---- what real ranks on one host cannot be made to do


@pytest.fixture
def pair(tmp_path: Path) -> tuple[WrittenRing, WrittenRing]:
    return WrittenRing(tmp_path, 0), WrittenRing(tmp_path, 1)


def _now(seconds: float) -> int:
    return START + int(seconds * SECOND)


def test_the_assignment_s_sentence(pair: tuple[WrittenRing, WrittenRing]) -> None:
    for ring in pair:
        ring.call(0, 1, 359)
    pair[0].call(2, None, 360)
    pair[1].phase(1.5, None, "kv.swap_in")
    (hang,) = diagnose([ring.look() for ring in pair], _now(14), 10 * SECOND)
    assert hang.text == (
        "rank 0 waits in all_reduce #360 (tp, 16 KiB) for 12.0 s; "
        "rank 1 never entered it: last finished #359, now in kv.swap_in for 12.5 s"
    )
    assert not diagnose([ring.look() for ring in pair], _now(11.9), 10 * SECOND)


def test_a_busy_rank_without_a_phase_is_told_by_its_last_record(
    pair: tuple[WrittenRing, WrittenRing],
) -> None:
    for ring in pair:
        ring.call(0, 1, 1)
    pair[0].call(2, None, 2)
    pair[1].step(0.5, None, 17)
    (hang,) = diagnose([ring.look() for ring in pair], _now(14), 10 * SECOND)
    assert hang.text.endswith(
        "rank 1 never entered it: last finished #1, now in step 17, in no phase, "
        "13.0 s after the end of all_reduce #1 (tp, 16 KiB)"
    )


def test_a_dead_rank_is_told_with_what_it_died_in(pair: tuple[WrittenRing, WrittenRing]) -> None:
    for ring in pair:
        ring.call(0, 1, 1)
    pair[0].call(2, None, 2)
    pair[1].phase(1.5, None, "model.forward")
    looks = [pair[0].look(), pair[1].look("dead")]
    (hang,) = diagnose(looks, _now(14), 10 * SECOND)
    pid = looks[1].pid
    assert hang.text.endswith(f"rank 1 is dead (pid {pid}): last finished #1, in model.forward")


def test_a_collective_of_the_dead_alone_is_no_hang(pair: tuple[WrittenRing, WrittenRing]) -> None:
    pair[1].call(2, None, 2)
    assert not diagnose([pair[0].look(), pair[1].look("dead")], _now(14), SECOND)


def test_a_hang_inside_the_backend_is_told_as_one_of_all_ranks(
    pair: tuple[WrittenRing, WrittenRing],
) -> None:
    pair[0].call(2, None, 1)
    pair[1].call(2.5, None, 1)
    (hang,) = diagnose([ring.look() for ring in pair], _now(14), 10 * SECOND)
    assert hang.kind == "hang"
    assert hang.text == (
        "ranks 0, 1 wait in all_reduce #1 (tp, 16 KiB) for 12.0 s; that is all of its ranks"
    )
    (hang,) = diagnose([pair[0].look(), pair[1].look("stopped")], _now(14), 10 * SECOND)
    assert "rank 0 waits in all_reduce #1 (tp, 16 KiB) for 12.0 s; rank 1 is stopped" in hang.text
    assert hang.text.count("in it, in all_reduce #1 (tp, 16 KiB) for 11.5 s") == 1


def test_a_rank_that_has_finished_what_another_waits_in_is_said_so(
    pair: tuple[WrittenRing, WrittenRing],
) -> None:
    pair[0].call(2, None, 1, op="broadcast")
    pair[1].call(2, 3, 1, op="broadcast")
    pair[1].phase(4, None, "sample")
    (hang,) = diagnose([ring.look() for ring in pair], _now(14), 10 * SECOND)
    assert hang.text.endswith("rank 1 has finished it, now in sample for 10.0 s")


def test_a_peer_that_cannot_send_is_named(pair: tuple[WrittenRing, WrittenRing]) -> None:
    pair[0].call(2, None, 3, op="recv")
    pair[1].call(1, 1.5, 9)
    pair[1].phase(1.6, None, "model.forward")
    for state, words in (("stopped", "is stopped (SIGSTOP"), ("dead", "is dead (")):
        (hang,) = diagnose([pair[0].look(), pair[1].look(state)], _now(14), 10 * SECOND)
        assert hang.text.startswith("rank 0 waits in recv #3 (tp, 16 KiB) for 12.0 s; whom it ")
        assert f"rank 1 {words}" in hang.text and "#9" not in hang.text
        assert "in model.forward" in hang.text


def test_ranks_on_other_nodes_are_said_to_be_unknown(tmp_path: Path) -> None:
    rings = [WrittenRing(tmp_path, rank, world_size=8) for rank in range(2)]
    for ring in rings:
        ring.call(2, None, 1, group="world", size=8)
    (hang,) = diagnose([ring.look() for ring in rings], _now(14), 10 * SECOND)
    assert hang.text == (
        "ranks 0, 1 wait in all_reduce #1 (world, 16 KiB) for 12.0 s; "
        "6 of its 8 ranks are on other nodes, unknown here"
    )


def test_a_rank_of_this_node_that_has_no_ring_is_missed(tmp_path: Path) -> None:
    ring = WrittenRing(tmp_path, 0)
    ring.call(2, None, 1)
    (hang,) = diagnose([ring.look()], _now(14), 10 * SECOND, local_ranks=2)
    assert hang.text.endswith("1 of its 2 ranks should be here and have no ring")


def test_who_belongs_to_a_group_that_one_rank_has_used_is_not_guessed(tmp_path: Path) -> None:
    rings = [WrittenRing(tmp_path, rank, world_size=4, local_world_size=4) for rank in range(4)]
    rings[0].call(2, None, 1)
    (hang,) = diagnose([ring.look() for ring in rings], _now(14), 10 * SECOND)
    assert hang.text == (
        "rank 0 waits in all_reduce #1 (tp, 16 KiB) for 12.0 s; 1 of its 2 ranks has not been "
        "seen in this group: among ranks 1-3"
    )


def test_waiting_for_work_is_no_hang_while_there_is_none(
    pair: tuple[WrittenRing, WrittenRing],
) -> None:
    pair[1].phase(1, None, "step.receive")
    pair[1].call(2, None, 7, op="broadcast", group="control")
    pair[0].call(1, 1.5, 6, op="broadcast", group="control")
    assert not diagnose([ring.look() for ring in pair], _now(60), 10 * SECOND)
    pair[0].phase(3, None, "schedule")
    (hang,) = diagnose([ring.look() for ring in pair], _now(60), 10 * SECOND)
    assert "now in schedule for 57.0 s" in hang.text


def test_a_disagreement_before_the_hang_is_what_is_told(
    pair: tuple[WrittenRing, WrittenRing],
) -> None:
    for ring in pair:
        ring.call(0, 1, 1, nbytes=64 if ring.rank else 128)
    pair[0].call(2, None, 2)
    (hang,) = HangWatch(10, 2).look([ring.look() for ring in pair], _now(14))
    assert hang.kind == "desync"
    assert hang.text.endswith(
        "before that, ranks disagree on #1 of tp: rank 0 called all_reduce (128 B), "
        "rank 1 called all_reduce (64 B)"
    )


def test_changes_are_told_ever_more_rarely(pair: tuple[WrittenRing, WrittenRing]) -> None:
    pair[0].call(2, None, 1)
    watch = HangWatch(1, 2)
    told = []
    for half_second in range(240):
        state = "stopped" if half_second % 2 else "running"  # flickers all the time
        looks = [pair[0].look(), pair[1].look(state)]
        told.append(len(watch.look(looks, _now(10 + half_second / 2))))
    assert max(told) == 1
    assert 4 <= sum(told) <= 9, "at 1, 2, 4, 8 ... seconds"
    assert sum(watch.totals.values()) == 1


def test_no_limit_watches_nothing(pair: tuple[WrittenRing, WrittenRing]) -> None:
    pair[0].call(2, None, 1)
    assert HangWatch(0, 2).poll({}, {}, _now(1000)) == []
