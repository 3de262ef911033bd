"""A batch's lines stand for themselves, and its results survive any death of the process."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecast.runtime import batch_writer
from onecast.runtime.batch_file import (
    BatchLine,
    BatchWriter,
    check_unchanged,
    count_complete,
    count_lines,
    read_batch,
)

BODY = {"model": "m", "prompt": "Say é"}


def entry(custom_id: str = "a", **changes: Any) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": BODY}
    return json.dumps(line | changes).encode()


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answer(line: BatchLine) -> dict[str, Any]:
    return line.problem_result() if line.problem else line.result({"text": line.custom_id})


# Input


def test_good_lines_come_out_in_order_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    chat = entry("c", url="/v1/chat/completions")
    path.write_bytes(entry("a") + b"\r\n" + entry("b 😀") + b"\n" + chat)  # the last has no end
    lines = list(read_batch(path))
    assert [(line.number, line.custom_id, line.url, line.body) for line in lines] == [
        (1, "a", "/v1/completions", BODY),
        (2, "b 😀", "/v1/completions", BODY),
        (3, "c", "/v1/chat/completions", BODY),
    ]
    assert not any(line.problem for line in lines)
    assert count_lines(path) == 3
    assert len({line.key for line in lines}) == 3


@pytest.mark.parametrize(
    ("raw", "custom_id", "code", "message"),
    [
        (b"", None, "empty_line", "is empty"),
        (b" \t\r", None, "empty_line", "is empty"),
        (b"{", None, "invalid_json", "is not JSON: Input data was truncated"),
        (entry()[:-4], None, "invalid_json", "is not JSON: "),
        (entry() + entry(), None, "invalid_json", "is not JSON: "),
        (b'{"custom_id": NaN}', None, "invalid_json", "is not JSON: "),
        (b'{"custom_id": "\\ud800 alone"}', None, "invalid_json", "is not JSON: "),
        (b'{"custom_id": 1e999}', None, "invalid_json", "is not JSON: "),
        (b"[" * 100_000, None, "invalid_json", "is not JSON: maximum recursion depth"),
        (b"\xef\xbb\xbf" + entry(), None, "invalid_json", "begins with a byte order mark"),
        (entry().replace(b"Say", b"S\xe2\x82"), None, "invalid_utf8", "is not UTF-8: "),
        ("{}".encode("utf-16"), None, "invalid_json", "is not JSON: "),
        (b'"text"', None, "invalid_line", '"text" is not an object'),
        (b"null", None, "invalid_line", "null is not an object"),
        (b"{}", None, "missing_custom_id", "custom_id is missing"),
        (entry(custom_id=None), None, "missing_custom_id", "custom_id is missing"),
        (entry(custom_id=5), None, "invalid_custom_id", "custom_id: 5 is not a text, or empty"),
        (entry(custom_id=""), None, "invalid_custom_id", 'custom_id: "" is not a text, or empty'),
        (entry(method="GET"), "a", "invalid_method", 'method: "GET" is not POST'),
        (entry(method=None), "a", "invalid_method", "method: null is not POST"),
        (entry(url="/v1/embeddings"), "a", "invalid_url", 'url: "/v1/embeddings" is not one of'),
        (entry(url=["/v1/completions"]), "a", "invalid_url", 'url: ["/v1/completions"] is not'),
        (entry(body=[1]), "a", "invalid_body", "body: [1] is not an object"),
        (entry(body=None), "a", "invalid_body", "body: null is not an object"),
        (entry(boddy={}), "a", "unknown_key", '"boddy" is not one of custom_id, method, url, body'),
        (entry(body={"prompt": "x" * 5000}), None, "line_too_long", "is longer than 4096 bytes"),
        (b"x" * 4097, None, "line_too_long", "is longer than 4096 bytes"),
        (b"x" * 4096, None, "invalid_json", "is not JSON"),
    ],
)
def test_a_bad_line_is_an_error_of_its_own(
    raw: bytes, custom_id: str | None, code: str, message: str, tmp_path: Path
) -> None:
    max_line_bytes = 200_000 if raw.startswith(b"[[") else 4096
    path = write(tmp_path / "in.jsonl", entry("before"), raw, entry("after"))
    before, bad, after = read_batch(path, max_line_bytes=max_line_bytes)
    assert (before.custom_id, before.problem, after.custom_id, after.problem) == (
        "before",
        None,
        "after",
        None,
    )
    result = bad.problem_result()
    assert result["id"] == f"batch_req_{bad.key}"
    assert (result["custom_id"], result["response"]) == (custom_id, None)
    assert result["error"]["code"] == code
    assert result["error"]["message"].startswith(f"line 2: {message}")


def test_the_second_of_two_equal_custom_ids_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", entry("a"), entry("b"), entry("a"), entry("a", url="/x"))
    lines = list(read_batch(path))
    assert [line.problem and line.problem.message for line in lines[:3]] == [
        None,
        None,
        'line 3: custom_id "a" is that of line 1',
    ]
    assert lines[3].problem is not None and lines[3].problem.code == "invalid_url"
    assert len({line.key for line in lines}) == 4
    resumed = list(read_batch(path, {lines[0].key}))
    assert resumed == lines[1:], "an answered line still counts"


@pytest.mark.parametrize("read", [read_batch, count_lines, lambda path: check_unchanged(path, {})])
def test_a_file_that_is_missing_or_empty_is_named_at_once(read: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl: cannot read .*: No such file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl: the batch file is empty"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        read(tmp_path)


def test_the_input_is_read_as_lines_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    body = {"prompt": "x" * 20_000}
    write(path, *(entry(str(number), body=body) for number in range(500)))  # 10 MB
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_batch(path)) == 500
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_line_longer_than_the_limit_is_not_kept_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", b"x" * 20_000_000, entry("a"))
    tracemalloc.start()
    try:
        long, good = read_batch(path, max_line_bytes=1000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert long.problem is not None and good.custom_id == "a"


# Results


def test_a_result_line_has_openais_shape(tmp_path: Path) -> None:
    [line] = read_batch(write(tmp_path / "in.jsonl", entry("a")))
    assert line.result({"text": "x"}) == {
        "id": f"batch_req_{line.key}",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": f"req_{line.key}", "body": {"text": "x"}},
        "error": None,
    }
    assert line.result({"error": {}}, 400)["response"]["status_code"] == 400


def test_results_are_there_when_write_returns(tmp_path: Path) -> None:
    lines = list(read_batch(write(tmp_path / "in.jsonl", entry("a"), entry("é\n"), b"{")))
    output = tmp_path / "out.jsonl"
    with BatchWriter(output) as writer:
        assert writer.done == {}
        for count, line in enumerate(lines, start=1):
            writer.write(answer(line))
            assert read_results(output) == [answer(line) for line in lines[:count]]
            assert count_complete(output) == count
    writer.close()  # again: nothing happens
    assert count_complete(tmp_path / "none.jsonl") == 0


def test_an_existing_output_is_kept_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    lines = list(read_batch(write(tmp_path / "in.jsonl", entry("a"), b"{")))
    output = tmp_path / "out.jsonl"
    output.touch()  # empty: nothing to lose
    with BatchWriter(output) as writer:
        for line in lines:
            writer.write(answer(line))
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"out\.jsonl: holds results already: --resume"):
        BatchWriter(output)
    assert output.read_bytes() == before
    with BatchWriter(output, resume=True) as writer:
        assert writer.done == {lines[0].key: "a", lines[1].key: None}
    assert output.read_bytes() == before
    with BatchWriter(output, overwrite=True) as writer:
        assert writer.done == {}
    assert output.read_bytes() == b""


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
@pytest.mark.parametrize("content", [entry("a") + b"\n", b"notes", b"\n", b'{"id":"x"}\n', b"\xff"])
def test_a_file_that_holds_something_else_is_never_touched(
    mode: str, content: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "precious"
    output.write_bytes(content)
    with pytest.raises(ValueError, match=r"precious: line 1 is not a result line"):
        BatchWriter(output, **{mode: True})
    assert output.read_bytes() == content


def test_a_broken_line_among_whole_ones_is_named(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    [line] = read_batch(write(tmp_path / "in.jsonl", entry("a")))
    whole = json.dumps(answer(line), separators=(",", ":")).encode() + b"\n"
    output.write_bytes(whole + whole[:20] + b"\n")
    with pytest.raises(ValueError, match=r"out\.jsonl: line 2 is not a result line"):
        BatchWriter(output, resume=True)
    output.write_bytes(whole + whole)
    with pytest.raises(ValueError, match=r"out\.jsonl: line 2 has the same id as an earlier one"):
        BatchWriter(output, resume=True)


def test_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none/out\.jsonl: cannot write .*: No such file"):
        BatchWriter(tmp_path / "none" / "out.jsonl")
    with pytest.raises(ValueError, match=r"cannot write .*: Is a directory"):
        BatchWriter(tmp_path)
    with pytest.raises(ValueError, match=r"/dev/null: cannot write .*: not a regular file"):
        BatchWriter("/dev/null")


def test_two_runs_cannot_write_to_one_file(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with BatchWriter(output):
        begin_s = time.monotonic()
        with pytest.raises(ValueError, match=r"out\.jsonl: another run is writing to it \(waited"):
            BatchWriter(output, resume=True, lock_timeout_s=0.2)
        assert 0.2 <= time.monotonic() - begin_s < 2
    BatchWriter(output, resume=True, lock_timeout_s=0).close()


def test_a_resumed_run_waits_for_the_lock_of_one_that_is_dying(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    writer = BatchWriter(output)
    timer = threading.Timer(0.3, writer.close)
    timer.start()
    BatchWriter(output, resume=True, lock_timeout_s=30).close()
    timer.join()


def test_a_full_disk_leaves_whole_lines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = list(read_batch(write(tmp_path / "in.jsonl", entry("a"), entry("b"))))
    output = tmp_path / "out.jsonl"
    real_write = os.write
    room = 100

    def nearly_full(fd: int, data: Any) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real_write(fd, data[:room])
        room -= written
        return written

    with BatchWriter(output) as writer:
        writer.write(answer(lines[0]))
        monkeypatch.setattr(batch_writer.os, "write", nearly_full)
        with pytest.raises(OSError, match="No space left"):
            writer.write(answer(lines[1]))
        monkeypatch.undo()
        assert read_results(output) == [answer(lines[0])]
        writer.write(answer(lines[1]))
    assert read_results(output) == [answer(line) for line in lines]


def test_a_disk_that_fails_to_sync_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [line] = read_batch(write(tmp_path / "in.jsonl", entry("a")))
    failed = threading.Event()

    def broken(fd: int) -> None:
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    writer = BatchWriter(tmp_path / "out.jsonl")
    monkeypatch.setattr(batch_writer.os, "fsync", broken)
    writer.write(answer(line))
    assert failed.wait(10)
    with pytest.raises(OSError, match=r"Input/output error: .*out\.jsonl"):
        writer.close()


def test_the_disk_is_asked_at_most_every_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [line] = read_batch(write(tmp_path / "in.jsonl", entry("a")))
    synced_s: list[float] = []
    writer = BatchWriter(tmp_path / "out.jsonl")
    monkeypatch.setattr(batch_writer.os, "fsync", lambda fd: synced_s.append(time.monotonic()))
    begin_s = time.monotonic()
    while time.monotonic() < begin_s + 0.7:
        writer.write(answer(line))
    last_write_s = time.monotonic()
    while synced_s[-1] < last_write_s and time.monotonic() < last_write_s + 10:
        time.sleep(0.01)
    assert synced_s[-1] >= last_write_s, "the last line is synced though no other follows"
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(synced_s)]
    assert min(gaps_s) >= batch_writer.SYNC_INTERVAL_S * 0.9
    count = len(synced_s)
    writer.close()
    assert len(synced_s) == count + 1
    assert not any(thread.name == "onecast-fsync" for thread in threading.enumerate())


# Resuming


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes]]:
    """An input of every kind of line, and all of its results."""
    directory = tmp_path_factory.mktemp("finished")
    source = write(directory / "in.jsonl", entry("a"), b"{", entry("b 😀"), b"", entry("a"))
    output = directory / "out.jsonl"
    with BatchWriter(output) as writer:
        for line in read_batch(source):
            writer.write(answer(line))
    yield source, output.read_bytes()


@pytest.mark.parametrize("tail", [b"", b"\0", b"\0" * 50], ids=["", "zero", "zeros"])
def test_a_file_torn_at_any_byte_is_completed(
    finished: tuple[Path, bytes],
    tail: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_writer.os, "fsync", lambda fd: None)  # thousands would take long
    source, complete = finished
    output = tmp_path / "out.jsonl"
    for size in range(len(complete) + 1):
        output.unlink(missing_ok=True)  # truncating it would flush it to the disk
        output.write_bytes(complete[:size] + tail)
        with BatchWriter(output, resume=True) as writer:
            assert len(writer.done) == complete[:size].count(b"\n")
            check_unchanged(source, writer.done)
            for line in read_batch(source, writer.done):
                writer.write(answer(line))
        assert output.read_bytes() == complete


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_results_in_any_order_are_known_again(
    finished: tuple[Path, bytes], data: st.DataObject
) -> None:
    source, complete = finished
    results = data.draw(st.permutations(complete.splitlines(keepends=True)))
    kept = results[: data.draw(st.integers(0, len(results)))]
    output = source.parent / "permuted.jsonl"
    output.write_bytes(b"".join(kept))
    with BatchWriter(output, resume=True) as writer:
        check_unchanged(source, writer.done)
        for line in read_batch(source, writer.done):
            writer.write(answer(line))
    lines = output.read_bytes().splitlines(keepends=True)
    assert lines[: len(kept)] == kept
    assert sorted(lines) == sorted(complete.splitlines(keepends=True))


def test_an_answered_line_that_was_edited_is_noticed(
    finished: tuple[Path, bytes], tmp_path: Path
) -> None:
    source, complete = finished
    output = tmp_path / "out.jsonl"
    output.write_bytes(b"".join(complete.splitlines(keepends=True)[:2]))  # of lines 1 and 2
    original = source.read_bytes().splitlines()
    edited = tmp_path / "in.jsonl"

    def check(*lines: bytes) -> None:
        write(edited, *lines)
        with BatchWriter(output, resume=True) as writer:
            check_unchanged(edited, writer.done)

    check(*original)
    check(*original, entry("more"))
    check(*original[:2], entry("not answered yet"))
    with pytest.raises(ValueError, match=r'in\.jsonl: was changed .*custom_id "a".*1 of 2'):
        check(entry("a", body={}), *original[1:])
    with pytest.raises(ValueError, match=r"was changed .*custom_id null.*1 of 2"):
        check(original[0], b"}", *original[2:])
    with pytest.raises(ValueError, match=r"was changed .*2 of 2"):
        check(b"a line before", *original)
    # A last line that gets its line break is the line it was.
    edited.write_bytes(b"\n".join(original[:2]))
    with BatchWriter(output, resume=True) as writer:
        check_unchanged(edited, writer.done)


def test_after_any_number_of_kills_every_result_is_there_once(tmp_path: Path) -> None:
    count = 400
    source = tmp_path / "in.jsonl"
    lines = [entry(f"request {number}") for number in range(count)]
    lines[7:7] = [b"{", b"", entry("request 3")]
    write(source, *lines)
    output = tmp_path / "out.jsonl"
    script = Path(__file__).with_name("batch_run.py")
    command = [sys.executable, "-P", str(script), str(source), str(output), "0.002"]
    random_delay = random.Random(0)
    kills = 0
    progress = []
    while True:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            if random_delay.random() < 0.7:  # else it may die before or while it resumes
                assert run.stdout.readline() == b"running\n"
            try:
                assert run.wait(timeout=random_delay.uniform(0.0, 0.14)) == 0
                break
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                kills += 1
        progress.append(count_complete(output))
        assert kills < 200, "no progress"
    assert kills >= 5 and len(set(progress)) >= 4, "the kills came too early or too late"
    results = read_results(output)
    expected = [answer(line)["id"] for line in read_batch(source)]
    assert sorted(result["id"] for result in results) == sorted(expected)
    answers = {r["custom_id"]: r["response"]["body"]["answer"] for r in results if r["response"]}
    assert answers == {f"request {n}": [f"request {n}"] * 50 for n in range(count)}
