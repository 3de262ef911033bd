"""How a benchmark ends that cannot write its report, or is told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onecast.runtime.bench import e2e, step, terminal

ONECAST = Path(sys.executable).parent / "onecast"


@pytest.mark.parametrize(
    ("bench", "arguments", "told"),
    [
        (step, ["--json", "/proc/x.json"], "no file can be made at '/proc/x.json': "),
        (step, ["--json", "/proc/version"], "no file can be made at '/proc/version': "),
        (e2e, ["--report", "/proc"], "no file can be made in '/proc': "),
        (e2e, ["--report", ""], "no folder can be made at ''"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_measured(bench, arguments, told, capsys):
    with pytest.raises(SystemExit) as refused:
        bench.main(["--quick", *arguments])
    assert refused.value.code == 2
    assert told in capsys.readouterr().err


def test_looking_leaves_no_file_and_keeps_one_that_is_there(tmp_path):
    there = tmp_path / "report.json"
    there.write_text("{}")
    assert terminal.new_file(str(there)) == there
    assert terminal.new_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    assert e2e.made_folder(str(tmp_path)) == tmp_path
    assert [*tmp_path.iterdir()] == [there] and there.read_text() == "{}"


def test_a_disk_that_is_full_in_the_end_is_told_in_a_line(capsys):
    status = terminal.deliver({"bench": "x"}, Path("/dev/full"), lambda report: print("table"))
    assert (status, *capsys.readouterr()) == (
        1, "table\n", "onecast: --json: /dev/full: No space left on device\n"
    )  # fmt: skip


def start(tmp_path):
    """A bench in a session of its own, at the start of its ranks, with its temporary folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    process = subprocess.Popen(
        [ONECAST, "bench", "step", "--quick"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.readline() == "launch 1 of 1\n"
    return process, folder


@pytest.mark.parametrize(
    ("name", "delay_s"),
    [("SIGINT", 0.3), ("SIGINT", 0.8), ("SIGINT", 3.0), ("SIGTERM", 0.8), ("SIGHUP", 3.0)],
)
def test_told_to_stop_it_says_so_in_a_line_and_leaves_nothing(name, delay_s, tmp_path):
    process, folder = start(tmp_path)
    time.sleep(delay_s)
    number = signal.Signals[name]
    os.killpg(process.pid, number) if name == "SIGINT" else process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert told == f"onecast: bench step was stopped by {name}\n"
    assert process.returncode == 128 + number
    assert not [*folder.iterdir()]


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_rank_is_told_in_a_line(tmp_path):
    process, _ = start(tmp_path)
    ranks = []
    deadline = time.monotonic() + 30
    while len(ranks) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        ranks = [rank for child in children_of(process.pid) for rank in children_of(child)]
    os.kill(max(ranks), signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    reason = "the process ended with signal SIGKILL before its function returned"
    assert told == f"onecast: bench step: rank 1 failed: {reason}\n"
    assert process.returncode == 1


_RECEIVER = """
import sys
from onecast.runtime.bench.telemetry_receiver import Receiver
try:
    with Receiver():
        print("up", flush=True)
        sys.stdin.read()
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_ends_the_receiver_of_spans_in_silence():
    process = subprocess.Popen(
        [sys.executable, "-c", _RECEIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "up\n"
    time.sleep(1.0)  # it comes to its own wait
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 130
