"""Files that are cut, torn, overwritten, foreign or older: shown as far as they go, or refused."""

import contextlib
import io
import json
import os
import random
import struct
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from written_rings import WrittenRing

from onecast.telemetry import TelemetryError, flight_command
from onecast.telemetry.flight import keep, read_run
from onecast.telemetry.flight_ring import read_ring
from onecast.telemetry.hang import HangWatch
from onecast.telemetry.ring import (
    H_CAPACITY,
    H_HEAD,
    H_NAME_COUNT,
    H_RANK,
    H_VERSION,
    NAMES_OFFSET,
    RECORDS_OFFSET,
    WORD,
)
from onecast.telemetry.ring_reader import RingReader

_INTERESTING = [0, 1, -1, 2**62, -(2**63), 2**63 - 1, 64, 2**31, 0x7FF, 255]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The files of two ranks: 64 slots that went round, and something in flight."""
    folder = tmp_path_factory.mktemp("intact")
    for rank in range(2):
        ring = WrittenRing(folder, rank, capacity=64)
        for step in range(12):
            ring.step(step, step + 0.9, step)
            ring.phase(step + 0.1, step + 0.8, "model.forward")
            for number in range(4):
                ring.call(step + 0.2, step + 0.3, 4 * step + number + 1)
        ring.call(20, None, 49, nbytes=8 + rank)
        ring.die()
    return [(folder / f"rank-{rank}.ring").read_bytes() for rank in range(2)]


def read_everything(folder: Path) -> str:
    """All that looks at a run; returns what `onecast flight` says. Nothing may raise."""
    out = io.StringIO()
    for as_json in (True, False):
        options = Namespace(
            run_dir=[str(folder)], events=30, json=as_json, perfetto=str(folder / "trace.json")
        )
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = flight_command.run(options)
        assert status in (0, 2)
    if status == 0:
        run = read_run(folder)
        looks = [one.look for one in run.ranks.values()]
        for state in ("running", "dead"):
            HangWatch(1, 2).look([_as(look, state) for look in looks], run.now_ns)
        assert read_run(keep(folder, folder / "flight")).ranks.keys() == run.ranks.keys()
    return out.getvalue()


def _as(look: object, state: str) -> object:
    import dataclasses

    return dataclasses.replace(look, state=state)  # type: ignore[type-var]


def a_run(folder: Path, files: list[bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for rank, data in enumerate(files):
        (folder / f"rank-{rank}.ring").write_bytes(data)
    return folder


def word(data: bytes, index: int, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into("q", changed, index * WORD, value)
    return bytes(changed)


@pytest.mark.parametrize("index", range(14))
@pytest.mark.parametrize("value", _INTERESTING)
def test_any_word_of_the_header_may_be_anything(
    intact: list[bytes], tmp_path: Path, index: int, value: int
) -> None:
    read_everything(a_run(tmp_path / "run", [word(intact[0], index, value), intact[1]]))


@pytest.mark.parametrize(
    "length", [0, 1, 255, 256, 4095, 4096, 5000, NAMES_OFFSET + 200, RECORDS_OFFSET,
               RECORDS_OFFSET + 1, RECORDS_OFFSET + 64 * 10 + 7],
)  # fmt: skip
def test_a_ring_that_was_cut_is_shown_as_far_as_it_goes(
    intact: list[bytes], tmp_path: Path, length: int
) -> None:
    folder = a_run(tmp_path / "run", [intact[0], intact[1][:length]])
    said = read_everything(folder)
    if length < 256:
        assert "is not a telemetry ring" in said
    else:
        assert f"rank-1.ring: cut short: {length} of {len(intact[1])} bytes" in said
        assert len(read_run(folder).ranks) == 2


def test_what_is_left_of_a_cut_ring_is_exact(intact: list[bytes], tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", [intact[0][: RECORDS_OFFSET + 10 * 64]])
    whole = read_ring(a_run(tmp_path / "whole", intact) / "rank-0.ring")
    part = read_ring(folder / "rank-0.ring")
    slots = (whole.rows[:, 7] - 1) % 64
    assert (part.rows == whole.rows[slots < 10]).all()
    assert len(part.rows) == 10


def test_any_bytes_may_be_anything(intact: list[bytes], tmp_path: Path) -> None:
    for seed in range(60):
        _damage(intact, tmp_path / "run", seed)


@pytest.mark.slow
def test_any_bytes_may_be_anything_at_length(intact: list[bytes], tmp_path: Path) -> None:
    for seed in range(1000, 1800):
        _damage(intact, tmp_path / "run", seed)


def _damage(intact: list[bytes], folder: Path, seed: int) -> None:
    dice = random.Random(seed)
    files = [bytearray(data) for data in intact]
    for data in files:
        regions = [
            (0, 256),
            (256, 4096),
            (NAMES_OFFSET, NAMES_OFFSET + 2000),
            (RECORDS_OFFSET, len(data)),
        ]
        for _ in range(dice.choice([1, 4, 60])):
            start, end = dice.choice(regions)
            if dice.random() < 0.5:
                position = dice.randrange(start, end - 8) // 8 * 8
                struct.pack_into("q", data, position, dice.choice(_INTERESTING))
            else:
                data[dice.randrange(start, end)] = dice.randrange(256)
        # Most damage elsewhere, or nearly all would be refused for the first two words.
        data[:16] = intact[0][:16]
    read_everything(a_run(folder, [bytes(data) for data in files]))


def test_a_foreign_file_and_an_empty_one_are_named(intact: list[bytes], tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", [intact[0], os.urandom(80_000)])
    said = read_everything(folder)
    assert "rank-1.ring is not a telemetry ring" in said
    (folder / "rank-0.ring").write_bytes(b"")
    assert "is no run directory" in read_everything(folder)
    (folder / "rank-2.ring").mkdir()
    os.mkfifo(folder / "rank-3.ring")
    (folder / "rank-4.ring").symlink_to("/dev/zero")
    assert "is no run directory" in read_everything(folder)


def test_other_versions(intact: list[bytes], tmp_path: Path) -> None:
    newer = word(intact[1], H_VERSION, 3)
    said = read_everything(a_run(tmp_path / "newer", [intact[0], newer]))
    assert "is a ring of version 3; this onecast reads 1 and 2" in said
    older = [word(data, H_VERSION, 1) for data in intact]
    folder = a_run(tmp_path / "older", older)
    said = read_everything(folder)
    assert "all_reduce #48 (tp, 16 KiB)" in said
    assert "no disagreement" in said, "its numbers are counted otherwise: nothing to compare"
    assert read_run(folder).disagreement() is None
    assert read_run(a_run(tmp_path / "now", intact)).disagreement() is not None


def test_damage_is_said(intact: list[bytes], tmp_path: Path) -> None:
    data = word(word(word(intact[0], H_CAPACITY, 77), H_HEAD, -5), H_NAME_COUNT, 10**6)
    data = word(data, H_RANK, 1)
    problems = read_run(a_run(tmp_path / "run", [data, intact[1]])).problems
    assert [problem.removeprefix("rank-0.ring: ") for problem in problems] == [
        "it says that it is of rank 1",
        "damaged header: capacity is 77, taken as 64",
        "damaged header: -5 records, taken as 73",
        "damaged header: 1000000 names",
    ]
    rows = np.frombuffer(intact[0][RECORDS_OFFSET:], np.int64).reshape(-1, 8).copy()
    rows[3, 7], rows[4, 7], rows[5, 0], rows[6, 1] = 0, 12345, -3, 1
    torn = intact[0][:RECORDS_OFFSET] + rows.tobytes()
    problems = read_run(a_run(tmp_path / "torn", [torn, intact[1]])).problems
    assert problems == [
        "rank-0.ring: 2 records torn or missing", "rank-0.ring: 2 records damaged",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"ranks": {}}', '{"ranks": 3, "now_ns": 1, "reason": "", "left_out": {}}',
     '{"ranks": {"0": {}}, "now_ns": 1, "reason": "", "left_out": {}}', "[" * 100_000,
     '{"ranks": {}, "now_ns": 1e999, "reason": "", "left_out": {}}', "\udcff",
     '{"ranks": {}, "now_ns": -1, "reason": "\\u001b[31m", "left_out": []}'],
)  # fmt: skip
def test_a_damaged_manifest_is_said_and_the_rings_are_shown(
    intact: list[bytes], tmp_path: Path, text: str
) -> None:
    folder = a_run(tmp_path / "run", intact)
    (folder / "kept.json").write_bytes(text.encode(errors="surrogateescape"))
    (folder / "rank-0.graphs").write_text("{}\n")
    said = read_everything(folder)
    assert "kept.json is damaged" in said and "rank-0.graphs is damaged" in said
    assert "\x1b" not in said


def test_a_ring_that_shrinks_while_it_is_read_kills_nobody(
    intact: list[bytes], tmp_path: Path
) -> None:
    folder = a_run(tmp_path / "run", intact)
    reader = RingReader(folder / "rank-0.ring")
    assert reader.rank == 0
    os.truncate(folder / "rank-0.ring", 300)  # a mapping would be a SIGBUS from here on
    assert len(read_ring(folder / "rank-0.ring").rows) == 0
    with pytest.raises(TelemetryError, match="is damaged"):
        (folder / "rank-0.ring").write_bytes(word(intact[0], H_CAPACITY, 1 << 26))
        read_ring(folder / "rank-0.ring")


def test_json_is_json_whatever_the_names_hold(tmp_path: Path) -> None:
    ring = WrittenRing(tmp_path, 0, engine_id="\x1b[2J\u202e\ud7ff\n")
    ring.phase(1, None, "\x00\x9b\u2028name")
    ring.phase(1, None, "é" * 200)  # cut in the middle of a character
    ring.die()
    said = read_everything(tmp_path)
    assert "\x1b" not in said and "\x9b" not in said
    told = json.loads(said.splitlines()[0])
    assert told["engine_id"].startswith("?[2J?")
