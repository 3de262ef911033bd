"""Hosts made of namespaces, joined by a virtual cable: for ranks that must not share one.

A helper of the tests, not a test. Each host has a network, processes and a /proc of its own, so
that ranks on two of them reach one another over TCP alone. Nothing here has a name outside of them:
sessions cannot collide, and all of it goes with the processes inside, which the kernel ends with
the first of them. That one reads from a pipe, and ends when the test process does, however that may
end. Needs root, and the commands `unshare` and `nsenter` (util-linux) and `ip` (iproute2).

    with two_hosts() as hosts:               # raises NoHosts, with the reason
        run_ranks(function, 4, hosts=hosts)  # ranks 0 and 1 on the first, 2 and 3 on the second

    10.0.0.1 link0  <------ veth ------>  link0 10.0.0.2
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

_COMMANDS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2"}
_UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc")
_LINK = "link0"
_ADDRESSES = ("10.0.0.1", "10.0.0.2")
_TIMEOUT_S = 10.0  # for any of the commands
_CLONE_FS = 0x200


class NoHosts(Exception):
    """They cannot be made here; the text says why."""


class Host:
    """One host: the namespaces of a process that does nothing but keep them."""

    def __init__(self, address: str) -> None:
        self.address = address
        # `cat` is the first process of its pid namespace; it ends with its input.
        self._keeper = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._keeper.pid
        assert self._keeper.stdout is not None and self._keeper.stderr is not None
        if self._keeper.stdout.readline() != "ready\n":
            reason = self._keeper.stderr.read().strip()
            self.close()
            raise NoHosts(f"namespaces are not allowed here: {reason}")

    def run(self, *command: str) -> None:
        _run("nsenter", f"--net=/proc/{self.pid}/ns/net", *command)

    def call(self, function: Callable[[], Any], *namespaces: str) -> Any:
        """Call the function in a thread that is in these namespaces, and what it starts too."""
        results: list[Any] = []
        errors: list[BaseException] = []

        def enter_and_call() -> None:
            try:
                self._enter(*namespaces)
                results.append(function())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=enter_and_call)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        """End all that runs here."""
        # Its child, the first process, ends with its input, and the kernel ends all others. The
        # keeper itself follows once they are reaped, by those who started them.
        try:
            self._keeper.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.communicate()
            raise

    def _enter(self, *namespaces: str) -> None:
        """For this thread alone."""
        libc = ctypes.CDLL(None, use_errno=True)
        _check(libc.unshare(_CLONE_FS))  # the root directory goes with the mounts
        folder = Path(f"/proc/{self.pid}/ns")
        files = [os.open(folder / kind, os.O_RDONLY) for kind in namespaces]
        try:
            for file in files:
                _check(libc.setns(file, 0))
        finally:
            for file in files:
                os.close(file)


class TwoHosts:
    """What `run_ranks` takes as its hosts; each has `ranks_per_host` of the ranks."""

    def __init__(self, hosts: list[Host], ranks_per_host: int) -> None:
        self._hosts = hosts
        self._ranks_per_host = ranks_per_host
        self.address = hosts[0].address
        self.keepers = [host.pid for host in hosts]

    def environment(self, rank: int) -> Mapping[str, str]:
        return {"GLOO_SOCKET_IFNAME": _LINK}

    def listen(self, function: Callable[[], Any]) -> Any:
        return self._hosts[0].call(function, "net")

    def on_network(self, host: int, function: Callable[[], Any]) -> Any:
        """Call the function as a program that reaches what a host reaches; what it returns."""
        return self._hosts[host].call(function, "net")

    def addresses(self) -> list[str]:
        return [host.address for host in self._hosts]

    def cut(self, host: int) -> None:
        """Take this end of the cable down: no packet passes until `mend`."""
        self._hosts[host].run("ip", "link", "set", _LINK, "down")

    def mend(self, host: int) -> None:
        self._hosts[host].run("ip", "link", "set", _LINK, "up")

    def start(self, rank: int, function: Callable[[], None]) -> None:
        host = self._hosts[rank // self._ranks_per_host]
        # In the order of being entered: after the mounts the files of the others are not there.
        host.call(function, "net", "pid_for_children", "mnt")


@contextlib.contextmanager
def two_hosts(ranks_per_host: int = 2) -> Iterator[TwoHosts]:
    """Two hosts that reach each other. Raises NoHosts where that is not possible."""
    for command, package in _COMMANDS.items():
        if shutil.which(command) is None:
            raise NoHosts(f"the command `{command}` is not there (Debian: {package})")
    # Started with the first process if it does not run yet, it would be on that one's host, and a
    # host ends only when all that was started there is reaped.
    resource_tracker.ensure_running()
    with contextlib.ExitStack() as stack:
        hosts = []
        for address in _ADDRESSES:
            hosts.append(Host(address))
            stack.callback(hosts[-1].close)
        one, other = hosts
        there = ("type", "veth", "peer", "name", _LINK, "netns", str(other.pid))
        _run("ip", "link", "add", "name", _LINK, "netns", str(one.pid), *there)
        for host in hosts:
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", _LINK)
            host.run("ip", "link", "set", _LINK, "up")
        yield TwoHosts(hosts, ranks_per_host)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode != 0:
        raise NoHosts(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
