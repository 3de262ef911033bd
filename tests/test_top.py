"""`onecast top`: what it draws from a real sidecar's answers, and how it ends."""

import argparse
import codecs
import contextlib
import copy
import fcntl
import http.server
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_runs import ONECAST
from lifetimes import alone, place, sidecar_of
from live_nodes import WrittenNode, serving
from rich.cells import cell_len

from onecast.telemetry import top_command
from onecast.telemetry.live import MAX_BYTES, live_view
from onecast.telemetry.live_steps import OPEN
from onecast.telemetry.top import as_ascii, frame
from onecast.telemetry.top_lanes import cells, longest_wait, newest_drawn, phase_line
from onecast.telemetry.top_source import LiveSource, NotOurs
from onecast.telemetry.top_view import Bars, Detail, Lane, LiveView, read_view
from onecast.telemetry.top_window import Window

__all__ = ["place"]  # a fixture


def view_of(written: WrittenNode) -> LiveView:
    return read_view(json.dumps(live_view(written.node)).encode())


def drawn(view: LiveView, width: int, height: int | None = None) -> list[str]:
    window = Window()
    window.add(view)
    return [line.plain for line in frame(view, window.lately(), width, height)]


def top(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    top_command.add_arguments(parser)
    return top_command.run(parser.parse_args(arguments))


@pytest.fixture
def written(tmp_path: Path) -> WrittenNode:
    return WrittenNode(tmp_path).write_steps(5)


def test_a_frame_of_80_columns_says_all(
    written: WrittenNode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written.enter(1)
    written.node.poll()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with serving(written) as url:
        assert top(url + "/metrics", "--once") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert lines[0].startswith("onecast top · engine-1 · ")
    assert lines[1].startswith("ranks up 4 of 4   steps 5 (0/s)   step p50 8.")
    assert re.fullmatch(r"exposed communication \d+%   since the start", lines[2])
    assert [line[:7] for line in lines if " last " in line and line.endswith("x")] == [
        f"rank {rank} " for rank in range(4)
    ]
    assert any("├model.forward─" in line for line in lines)
    assert any(line.startswith(" ▲ 2 ") for line in lines), "rank 2 came last most often"
    assert any(line.split()[:4] == ["1", "5", "-", "all_reduce"] for line in lines)
    assert any(line.split()[:4] == ["all_reduce", "tp", "4MiB", "80"] for line in lines)
    assert lines[-1] == "nothing dropped   every collective recorded   none failed"


def test_it_fits_any_terminal(tmp_path: Path) -> None:
    written = WrittenNode(tmp_path, ranks=12, hang_s=0.01).write_steps(2, group="数据并行\tu")
    written.enter(3, "all_gather", "tp\tunique-tp")
    time.sleep(0.05)
    written.node.poll()
    view = view_of(written)
    assert view.hangs
    for width in (200, 80, 40, 24, 10, 1):
        for height in (None, 100, 50, 24, 10, 3, 1):
            lines = drawn(view, width, height)
            assert all(cell_len(line) <= width for line in lines), (width, height)
            assert height is None or len(lines) <= height
            assert lines[0].startswith("▲ HANG" if width > 5 else ("▲", "…"))
    assert any("more ranks" in line for line in drawn(view, 80, 40)), "it says what it leaves out"
    low = "\n".join(drawn(view, 80, 24))
    assert all(f"rank {rank:>2} " in low for rank in range(3))
    narrow = "\n".join(drawn(view, 40))
    for word in ("steps 2", "p99", "Stragglers", "Latency", "all_gather", "none failed"):
        assert word in narrow
    ascii_only = [as_ascii(line, "ascii").plain for line in _texts(view)]
    assert "".join(ascii_only).isascii()
    assert [len(line) for line in ascii_only] == [len(line.plain) for line in _texts(view)]


def _texts(view: LiveView) -> list[Any]:
    window = Window()
    window.add(view)
    return frame(view, window.lately(), 80)


def test_lanes_show_who_waited_and_for_whom(written: WrittenNode) -> None:
    found = newest_drawn(view_of(written).kept)
    assert found is not None
    step, detail = found
    marks = {
        lane.rank: [cell.mark for cell in cells(lane, step.duration_ns, 200)]
        for lane in detail.lanes
    }
    assert {len(row) for row in marks.values()} == {200}
    waits = {rank: row.count("wait") for rank, row in marks.items()}
    for rank in (0, 1, 3):
        assert waits[rank] > 20 > waits[2], "rank 2 lets the others wait, and waits for nobody"
    assert all(row.count("step") > 50 for row in marks.values())
    worst = longest_wait(detail)
    assert worst is not None
    assert (worst.for_rank, worst.group) == (2, "tp")
    assert worst.rank != 2 and worst.wait_ns > 300_000


def test_a_cell_says_how_much_of_it_went_where() -> None:
    columns = {
        # transfer of half a cell; all of one waited; short, nothing known of others; never ended
        "begin": [200, 100, 230, 170],  # each since the one before: 200, 300, 530, 700
        "took": [50, 100, 1, 200],
        "wait": [0, 100, -1, -1],
        "flags": [0, 0, 0, OPEN],
    }
    bars = Bars(**columns, kind=[0] * 4, sequence=[1] * 4)
    lane = Lane(0, 100, 1000, None, [], bars, (0, 0))
    assert "".join(cell.glyph for cell in cells(lane, 1000, 10)) == " ·▅▓·▁·!!·"
    assert "".join(cell.glyph for cell in cells(lane, 1000, 2)) == "░!"
    phases = [(0, 100, 900, 0), (1, 300, 500, 0), (1, 850, 20, 0)]
    detail = Detail([], ["model", "in\nner and long"], [], 0)
    lane = Lane(0, 0, 1000, None, phases, bars, (0, 0))
    assert phase_line(detail, lane, 1000, 20) == "  ├mod├in?ner a┤───┤"


def test_names_from_the_program_are_plain_text(tmp_path: Path) -> None:
    hostile = "\x1b[31m[red]x[/bold]\n\r\x07\u202e\u200b\t"
    written = WrittenNode(tmp_path)
    written.node.engine_id = hostile
    options = {"ops": (hostile, "o" * 300), "group": f"g{hostile}\tu", "phase": hostile}
    written.write_steps(3, **options)
    written.enter(1, hostile, f"{hostile}\tu")
    written.node.poll()
    shown = drawn(view_of(written), 80)
    assert all(line.isprintable() for line in shown)
    text = "\n".join(shown)
    assert text.count("?[31m[red]x[/bold]???") >= 3, "as it is written: no markup"
    assert all(cell_len(line) <= 80 for line in shown)


def test_numbers_are_of_the_last_seconds(written: WrittenNode) -> None:
    window = Window()
    window.add(view_of(written))
    assert window.lately().span_s is None
    time.sleep(0.002)
    before = window.view
    written.write_steps(4, late_rank=0, late_ns=3_000_000, collectives=4)
    window.add(view_of(written))
    lately = window.lately()
    assert lately.span_s == pytest.approx((window.view.now_ms - before.now_ms) / 1000)
    assert lately.steps_s == pytest.approx(4 / lately.span_s)
    assert lately.p50_s == pytest.approx(0.0048, rel=0.1)
    assert window.lately(whole=True).p50_s == pytest.approx(0.0087, rel=0.1)
    assert window.lately(whole=True).steps_s == lately.steps_s
    assert sum(one.count for one in lately.latency) == 4 * 4 * 4
    assert [one.count == 0 for one in lately.latency] == sorted(
        one.count == 0 for one in lately.latency
    )
    assert sum(one.last for one in lately.stragglers) == 16
    assert lately.stragglers[0].last >= 4
    window.add(before)  # fewer steps: another run
    assert window.lately().span_s is None


def test_it_finds_the_run_of_this_user(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert top("--once") == 1
    assert capsys.readouterr().err.count("\n") == 1
    first = alone(run_dir=str(place / "onecast-1"))
    try:
        (place / "onecast-torn").mkdir()
        (place / "onecast-torn" / "sidecar.json").write_text("{")
        (place / "onecast-link").symlink_to(first.run_dir or "")
        assert top("--once") == 0
        assert capsys.readouterr().out.startswith("onecast top · alone · ")
        second = alone(run_dir=str(place / "onecast-2"))
        try:
            assert top("--once") == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.count("\n") == 3 and err.startswith("onecast top: 2 runs ")
            for session in (first, second):
                assert f"onecast top {sidecar_of(session.run_dir).url}" in err
        finally:
            second.close()
        with monkeypatch.context() as other:
            other.setattr(os, "getuid", lambda: 12345)
            assert top("--once") == 1, "only those of this user"
    finally:
        first.close()
        (place / "onecast-torn" / "sidecar.json").unlink(missing_ok=True)
        (place / "onecast-torn").rmdir()
        (place / "onecast-link").unlink()


def test_without_a_terminal_it_prints_frames_until_the_sidecar_is_gone(
    written: WrittenNode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(top_command, "_GIVE_UP_S", 0.2)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(written))
        threading.Timer(0.8, stack.close).start()
        assert top(url, "--interval", "0.25") == 0
    out = capsys.readouterr().out
    assert out.count("onecast top · engine-1") >= 3
    assert "the sidecar does not answer" in out
    assert out.splitlines()[-1].startswith("The sidecar is gone: its run may have ended (no answer")


class Terminal:
    """`onecast top` in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(80, 24)
        self.process = subprocess.Popen(
            [str(ONECAST), "top", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm-256color"},
        )
        os.close(slave)
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, condition: Callable[[str], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(self.text):
            left_s = deadline - time.monotonic()
            assert left_s > 0, self.text
            if select.select([self.master], [], [], left_s)[0]:
                self._read()

    def end(self) -> int:
        """The exit status, once all that it said is in `text`."""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while select.select([self.master], [], [], 20)[0]:
                self._read()
        return self.process.wait(20)

    def _read(self) -> None:
        self.text += self._decoder.decode(os.read(self.master, 1 << 16))

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


ALTERNATE, NORMAL = "\x1b[?1049h", "\x1b[?1049l"


def test_in_a_terminal_it_follows_its_size_and_leaves_the_last_frame(written: WrittenNode) -> None:
    with contextlib.ExitStack() as served, contextlib.ExitStack() as terminals:
        url = served.enter_context(serving(written))
        terminal = terminals.enter_context(Terminal(url, "--interval", "0.25"))
        patient = terminals.enter_context(Terminal(url, "--interval", "600"))
        for each in (terminal, patient):
            each.until(lambda text: ALTERNATE in text and "├model.forward" in text)
        patient.until(lambda text: "rank 0 \x1b" in text)
        patient.resize(40, 24)
        patient.until(lambda text: "\n0 \x1b" in text)  # labels are short there; long before 600 s
        patient.process.send_signal(signal.SIGTERM)
        assert patient.end() == 128 + signal.SIGTERM
        assert NORMAL in patient.text, "the terminal is as it was"
        served.close()
        assert terminal.end() == 0
    after = terminal.text.rpartition(NORMAL)[2]
    assert "onecast top" in after and "none failed" in after
    assert "The sidecar is gone: its run may have ended" in after.replace("\r\n", " ")


@pytest.mark.parametrize("drawn", [ALTERNATE, "none failed"])
def test_ctrl_c_leaves_it_whenever_it_comes(written: WrittenNode, drawn: str) -> None:
    with serving(written) as url, Terminal(url) as terminal:
        terminal.resize(80, 50)
        terminal.until(lambda text: drawn in text)
        os.write(terminal.master, b"\x03")
        assert terminal.end() == 0
    assert NORMAL in terminal.text
    assert "Traceback" not in terminal.text


@contextmanager
def answering(status: int, body: bytes, **headers: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, b"<html>\x1b[31m", "answers no live view"),
        (200, b"[]", "answers no live view"),
        (200, b'{"format": 2}', "its format is 2; this onecast reads 1"),
        (200, b'{"format": 1}', "answers no live view"),
        (200, b"[" * 9 * MAX_BYTES, "answers no live view"),
        (404, b"no", "status 404"),
        (302, b"", "status 302"),
        (503, b"", "is busy"),
    ],
)
def test_an_answer_that_is_not_ours_is_one_line(
    status: int, body: bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(status, body, Location="http://127.0.0.1:1/") as url:
        for more in ((), ("--once",)):
            assert top(url, *more) == 1
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1 and err[:-1].isprintable()
            assert url in err and says in err


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("ftp://localhost", 2),
        ("http://", 2),
        ("http://[", 2),
        ("http://localhost:99999", 2),
        ("http://localhost:1/else", 2),
        ("http://me@localhost:1", 2),
        ("http://local\x1b[31mhost:1", 2),
        ("http://127.0.0.1:1", 1),
        ("127.0.0.1:1", 1),
        (f"http://{'a' * 80}:1", 1),
    ],
)
def test_a_bad_url_is_one_line(url: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert top(url, "--once") == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err[:-1].isprintable()


def test_a_host_that_drips_does_not_keep_it() -> None:
    class Dripping(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b" ")
                    time.sleep(0.02)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    source = LiveSource(f"http://127.0.0.1:{server.server_address[1]}", timeout_s=0.2)
    try:
        with pytest.raises(top_command.NoAnswer, match=r"not the whole of it within 0\.2 s"):
            source.read()
    finally:
        server.shutdown()
        server.server_close()


def test_whatever_a_field_holds_it_is_refused_or_drawn(tmp_path: Path) -> None:
    written = WrittenNode(tmp_path, ranks=2).write_steps(1, collectives=2)
    written.enter(0)
    written.node.poll()
    whole = json.loads(json.dumps(live_view(written.node)))
    refused = shown = 0
    for path in _leaves(whole):
        for value in (None, -1, 2**62, 10**400, 1e300, "x\x1b", [], {}, True):
            changed = copy.deepcopy(whole)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = value
            try:
                view = read_view(json.dumps(changed).encode())
            except ValueError:
                refused += 1
                continue
            for line in drawn(view, 60, 30):
                assert cell_len(line) <= 60 and line.isprintable()
            shown += 1
    assert refused > 100 and shown > 100


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:2]
    if path:
        yield path
    for key, inner in items:
        yield from _leaves(inner, (*path, key))


def test_what_the_sidecar_serves_is_what_it_reads(written: WrittenNode) -> None:
    with serving(written) as url:
        view = LiveSource(url).read()
        assert view.engine_id == "engine-1" and len(view.kept) == 5
        with urllib.request.urlopen(f"{url}/live.json") as answer:
            assert read_view(answer.read()).steps == view.steps
    with answering(200, b"{}") as other, pytest.raises(NotOurs):
        LiveSource(other).read()
