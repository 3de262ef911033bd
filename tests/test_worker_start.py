"""A rank that is still importing ends by Ctrl-C as any program does, without a page about it."""

import signal
import subprocess
import sys
from pathlib import Path

from cli_runs import wait_for


def test_ctrl_c_while_a_rank_imports_says_nothing() -> None:
    rank = subprocess.Popen(
        [sys.executable, "-P", "-m", "onecast.runtime.worker"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    maps = Path(f"/proc/{rank.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), "torch to be imported", 60)
    rank.send_signal(signal.SIGINT)
    out, err = rank.communicate(timeout=30)
    assert (rank.returncode, out, err) == (-signal.SIGINT, b"", b"")
