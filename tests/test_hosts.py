"""two_hosts: real borders between them, and nothing left of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest
from hosts import NoHosts, TwoHosts, two_hosts


@pytest.fixture
def both():
    try:
        with two_hosts() as made:
            yield made
    except NoHosts as error:
        pytest.skip(f"two hosts cannot be made: {error}")


def running(argument: str) -> list[int]:
    """The processes with this argument."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = file.read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if argument in arguments:
            found.append(int(file.parent.name))
    return found


def ends(pid: int) -> bool:
    """Within a few seconds."""
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def leave_running(both: TwoHosts) -> str:
    """A process that nobody waits for on the first host; its argument."""
    argument = f"{10_000 + os.getpid()}"
    command = f"sleep {argument} > /dev/null 2>&1 &"
    both.start(0, lambda: subprocess.run(["setsid", "sh", "-c", command], check=True) and None)
    deadline = time.monotonic() + 5
    while not running(argument):  # the shell has forked, and is yet to become it
        assert time.monotonic() < deadline, "the process never came"
        time.sleep(0.01)
    return argument


def test_hosts_reach_each_other_over_the_network_and_nothing_else(both):
    listener = both.listen(lambda: socket.create_server((both.address, 0)))
    script = (
        "import json, os, socket\n"
        f"socket.create_connection({listener.getsockname()}, 5)\n"
        "print(json.dumps([pid for pid in os.listdir('/proc') if pid.isdigit()]))\n"
    )
    told: list[str] = []
    with listener:
        command = [sys.executable, "-c", script]
        both.start(2, lambda: told.append(subprocess.check_output(command, text=True)))
        with pytest.raises(OSError):
            socket.create_connection(listener.getsockname(), 0.5)
    assert len(json.loads(told[0])) == 2, "its first process, and the one that tells"


def test_what_was_left_running_on_a_host_ends_with_it():
    try:
        with two_hosts() as both:
            (left,) = running(leave_running(both))
    except NoHosts as error:
        pytest.skip(f"two hosts cannot be made: {error}")
    assert all(ends(pid) for pid in [left, *both.keepers])


def test_hosts_end_with_who_made_them_however_that_ends(both):
    script = (
        "import os, signal, hosts, test_hosts\n"
        "with hosts.two_hosts() as both:\n"
        "    argument = test_hosts.leave_running(both)\n"
        "    print(*test_hosts.running(argument), *both.keepers, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    maker = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path(hosts.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert maker.returncode == -signal.SIGKILL, maker.stderr
    pids = [int(pid) for pid in maker.stdout.split()]
    assert len(pids) == 3
    assert all(ends(pid) for pid in pids)


def test_where_hosts_cannot_be_made_the_reason_is_given(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoHosts, match=r"`unshare` is not there \(Debian: util-linux\)"):
        with two_hosts():
            pass
