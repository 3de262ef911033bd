"""What /live.json says is what was written into the rings, and it never grows too large."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_nodes import MS, US, WrittenNode

from onecast.telemetry import live_kept, ring
from onecast.telemetry.histograms import DURATIONS, Histogram
from onecast.telemetry.live import MAX_BYTES, live_view
from onecast.telemetry.probe import RingProbe
from onecast.telemetry.ring import pack_meta
from onecast.telemetry.ring_reader import RingReader

Json = dict[str, Any]


def view_of(written: WrittenNode) -> Json:
    """As it arrives: through JSON."""
    view: Json = json.loads(json.dumps(live_view(written.node)))
    return view


def bars(step: Json, rank: int) -> list[Json]:
    """A lane's columns as one dict a bar, with begin and sequence summed up."""
    columns = step["detail"]["lanes"][rank]["bars"]
    rows = zip(*columns.values(), strict=True)
    found = [dict(zip(columns, values, strict=True)) for values in rows]
    for before, bar in pairwise(found):
        bar["begin"] += before["begin"]
        bar["sequence"] += before["sequence"]
    return found


def test_a_kept_step_is_there_to_the_nanosecond(tmp_path: Path) -> None:
    written = WrittenNode(tmp_path)
    written.write_step(collectives=5)
    issued = [writer_rows(written, rank) for rank in range(4)]
    written.node.poll()
    (step,) = view_of(written)["kept"]
    start = min(row[ring.BEGIN] for rows in issued for row in rows)
    assert (step["step"], step["reason"], step["batch"], step["ranks"]) == (0, "all", 48, 4)
    assert step["bars"] == 20
    kinds = step["detail"]["kinds"]
    for rank, rows in enumerate(issued):
        calls = [row for row in rows if row[ring.META] & 0xF == ring.COLLECTIVE]
        shown = bars(step, rank)
        assert [bar["begin"] for bar in shown] == [row[ring.BEGIN] - start for row in calls]
        assert [bar["took"] for bar in shown] == [row[ring.END] - row[ring.BEGIN] for row in calls]
        assert [bar["sequence"] for bar in shown] == [1, 2, 3, 4, 5]
        assert [kinds[bar["kind"]][0] for bar in shown] == [
            "all_reduce", "all_gather", "broadcast", "all_reduce", "all_gather",
        ]  # fmt: skip
        assert [kinds[bar["kind"]][5] for bar in shown] == [2 << 20, 16384, 2 << 20, 16384, 2 << 20]
        last = [max(rows[i][ring.BEGIN] for rows in calls_of(issued)) for i in range(5)]
        assert [bar["wait"] for bar in shown] == [
            came - row[ring.BEGIN] for came, row in zip(last, calls, strict=True)
        ]
        assert [bar["flags"] & 1 for bar in shown] == [bar["wait"] == 0 for bar in shown]
        names = [step["detail"]["phase_names"][phase[0]] for phase in lane(step, rank)["phases"]]
        assert names == ["model.forward", "sample"]
    assert lane(step, 2)["caused"][0] >= 1
    assert lane(step, 2)["caused"][1] >= 380 * US, "it kept the first rank waiting for so long"


def writer_rows(written: WrittenNode, rank: int) -> list[list[int]]:
    rows: list[list[int]] = RingReader(written.writers[rank].path).drain().rows.tolist()
    return rows


def calls_of(issued: list[list[list[int]]]) -> list[list[list[int]]]:
    return [[r for r in rows if r[ring.META] & 0xF == ring.COLLECTIVE] for rows in issued]


def lane(step: Json, rank: int) -> Json:
    found: Json = step["detail"]["lanes"][rank]
    assert found["rank"] == rank
    return found


def test_totals_are_those_of_all_steps(tmp_path: Path) -> None:
    written = WrittenNode(tmp_path).write_steps(70)  # more than are kept
    view = view_of(written)
    assert view["steps"]["count"] == 70
    assert sum(row["count"] for row in view["latency"]) == 70 * 20 * 4
    for row in view["latency"]:
        assert sum(row["hist"][1:]) == row["count"]
        assert (row["p50_s"], row["p99_s"]) == (
            quantile(row["hist"], 0.5),
            quantile(row["hist"], 0.99),
        )
    assert sum(row["last"] for row in view["stragglers"]) == 70 * 20
    late = max(view["stragglers"], key=lambda row: int(row["last"]))
    assert late["rank"] == 2 and late["last"] >= 70 * 5
    assert [step["step"] for step in view["kept"]] == list(range(6, 70))
    assert view["ranks"][0] == {"rank": 0, "up": True, "step": -1, "phase": None}
    assert (view["world_size"], view["local_world_size"]) == (4, 4)


def quantile(hist: list[int], fraction: float) -> float | None:
    """What a reader can work out of the counts by itself."""
    whole = Histogram(DURATIONS)
    whole.counts[hist[0] : hist[0] + len(hist) - 1] += np.array(hist[1:])
    return whole.quantile(fraction)


def test_what_is_in_flight_and_where_each_rank_is(tmp_path: Path) -> None:
    written = WrittenNode(tmp_path, ranks=2, hang_s=0.05).write_steps(1)
    writer = written.writers[1]
    written.enter(0, group="tp\tunique-tp")
    writer.set_step(1)
    writer.begin(pack_meta(ring.PHASE, writer.intern("step.receive")), 0, 0)
    writer.begin(pack_meta(ring.PHASE, writer.intern("kv.swap_in")), 0, 0)
    time.sleep(0.1)
    written.node.poll()
    view = view_of(written)
    (one,) = view["in_flight"]
    assert 0.1 <= one.pop("age_s") < 60
    assert one == {
        "rank": 0, "op": "all_reduce", "group": "tp", "group_size": 2, "sequence": 21,
        "bytes": 16384, "step": 1,
    }  # fmt: skip
    assert [rank["phase"] for rank in view["ranks"]] == [None, "kv.swap_in"]
    (hang,) = view["hangs"]
    assert (hang["kind"], hang["op"], hang["group"], hang["sequence"]) == (
        "hang", "all_reduce", "tp", 21,
    )  # fmt: skip
    assert "rank 0 waits in all_reduce #21 (tp, 16 KiB)" in hang["text"]


def test_the_time_of_a_step_is_parted_without_counting_anything_twice(tmp_path: Path) -> None:
    """By hand, in us: a frame 0-100 (decoded from 80 on), a phase, and three collectives."""
    written = WrittenNode(tmp_path, ranks=1)
    writer = written.writers[0]
    begin = time.perf_counter_ns() - 10 * MS
    writer.set_step(0)
    probe = RingProbe(writer)
    probe.received(1, 5000, 50, 0, begin, begin + 80 * US, begin + 100 * US)
    for number, (op, first, last, status) in enumerate(
        [
            ("broadcast", 200, 300, 0),
            ("all_reduce", 250, 400, 0),  # 100 of it beside the broadcast: 100 left
            ("all_gather", 500, 900, 300 * US << 8),  # waited for from 800 on
            ("reduce_scatter", 600, 700, ring.UNWAITED),
        ],
        1,
    ):
        meta = written.meta(writer, op, f"g{number}\tu{number}")
        writer.record(begin + first * US, begin + last * US, meta, 1, 64, status)
    writer.record(begin, begin + 1000 * US, pack_meta(ring.STEP_KIND), 0, 1, 0)
    written.node.poll()
    (step,) = view_of(written)["kept"]
    assert [part // US for part in lane(step, 0)["share"]] == [120, 80, 200, 0, 600]
    assert lane(step, 0)["bars"]["overlap"] == [0, 0, 300 * US, 0]


def test_a_step_that_never_ended_says_so(tmp_path: Path) -> None:
    written = WrittenNode(tmp_path, ranks=2).write_steps(1)
    for rank, writer in enumerate(written.writers):
        writer.set_step(1)
        writer.begin(pack_meta(ring.STEP_KIND), 1, 48)
        if rank == 0:
            written.enter(0)
    written.node.finish()
    step = view_of(written)["kept"][-1]
    assert step["error"] == "never ended"
    (bar,) = bars(step, 0)
    assert bar["flags"] & 8 and bar["wait"] == -1


def test_it_stays_bounded_whatever_a_program_does(tmp_path: Path) -> None:
    written = WrittenNode(tmp_path, ranks=16)
    for number in range(30):
        name = f"{number} " + '\u4e16\x01"' * 15
        written.write_steps(3, collectives=60, group=name + "\tunique", phase=name * 2, dtype=name,
                            ops=[f"{i} {name}" for i in range(12)])  # fmt: skip
    for rank in range(16):
        for _ in range(40):
            written.enter(rank, op=name, group=name)
    written.node.poll()
    text = json.dumps(live_view(written.node))
    assert len(text) <= MAX_BYTES, len(text)
    view = json.loads(text)
    assert view["latency_left_out"] > 0
    assert "detail" in view["kept"][-1] or len(view["kept"]) == 64


def test_of_a_huge_step_the_longest_calls_are_shown(tmp_path: Path) -> None:
    written = WrittenNode(tmp_path, ranks=8).write_steps(1, collectives=1500)
    view = live_view(written.node)
    assert len(json.dumps(view)) <= MAX_BYTES
    (step,) = view["kept"]
    assert step["bars"] == 12000
    shown = [bar for rank in range(8) for bar in bars(step, rank)]
    assert step["detail"]["left_out"] == 12000 - len(shown) > 0
    assert min(bar["took"] for bar in bars(step, 0)) >= 100 * US
    assert all(bar["took"] > 300 * US for bar in bars(step, 0)[:1] if bar["wait"] > 300 * US)


def test_nothing_of_a_request_is_in_it(tmp_path: Path) -> None:
    written = WrittenNode(tmp_path, ranks=1).write_steps(1)
    writer = written.writers[0]
    now = time.perf_counter_ns()
    meta = pack_meta(ring.REQUEST, writer.intern("a-finish-reason"))
    writer.record_in_step(-1, now - 1000, now, meta, 77, 5 | 6 << 32, 0)
    written.node.poll()
    assert "a-finish-reason" not in json.dumps(live_view(written.node))


def test_a_step_is_worked_out_once_and_only_if_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = live_kept.step_detail

    def counting(kept: Any, names: Any) -> Any:
        made.append(kept.step)
        return original(kept, names)

    monkeypatch.setattr(live_kept, "step_detail", counting)
    written = WrittenNode(tmp_path, ranks=2).write_steps(3)
    first = live_view(written.node)
    written.write_steps(1)
    second = live_view(written.node)
    assert made == [2, 1, 0, 3]
    assert second["kept"][:3] == first["kept"]
    made.clear()
    written.write_steps(64, collectives=300)
    kept = live_view(written.node)["kept"]
    drawn = [step["step"] for step in kept if "detail" in step]
    assert len(kept) == 64 and drawn == list(range(68 - len(drawn), 68))
    assert len(made) <= len(drawn) + 1, "of those that do not fit, one was tried"
