"""Worlds of ranks that start in a tenth of a second: forked from a process that has torch already.

A helper of tests that need very many worlds, and of those that kill ranks: ranks end on their own,
each in its time, and the test sees how. `onecast.comm.testing.run_ranks` is for all others.

    with Zygote() as zygote:
        world = zygote.start(exchange, 3, 7)        # exchange(rank, 7) in each
        os.kill(world.pids[1], signal.SIGKILL)
        assert world.join(timeout_s=20) == [Ended(0, "what it returned"), Ended(-9, None), ...]

Functions, arguments and results are pickled; a function is found by its module's name, which the
ranks import. No process survives the `with` block, nor the test that began it.
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

STARTED_S = 60.0  # what importing torch may take on a busy machine
_PR_SET_PDEATHSIG = 1


@dataclass
class Ended:
    """How a rank ended: its exit code, minus the signal, and what its function returned."""

    code: int
    value: Any = None


class World:
    """Ranks 0 to n - 1, which can find one another through a store of their own."""

    def __init__(self, zygote: "Zygote", function: Callable[..., Any], size: int, args: Any):
        # Held here: where the store lives in a rank, it dies with that rank.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._zygote = zygote
        self._folder = tempfile.mkdtemp(prefix="onecast-world-")
        self.pids = zygote.fork((function, size, self._store.port, self._folder, args))

    def join(self, timeout_s: float) -> list[Ended]:
        """Wait for all to end. A rank that fails or hangs is an AssertionError with its stacks."""
        hung = self._zygote.await_end(self.pids, timeout_s)
        stacks = {}
        for pid in hung:
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGUSR1)
        if hung:
            time.sleep(1)
        for pid in hung:
            rank = self.pids.index(pid)
            stacks[rank] = Path(self._folder, f"stacks-{rank}").read_text()
        self.kill()
        ends = []
        failures = [f"rank {rank} hung:\n{text}" for rank, text in stacks.items()]
        for rank, pid in enumerate(self.pids):
            path = Path(self._folder, f"result-{rank}")
            state, value = pickle.loads(path.read_bytes()) if path.exists() else ("none", None)
            if state == "failed":
                failures.append(f"rank {rank} failed:\n{value}")
            ends.append(Ended(self._zygote.codes[pid], value))
        shutil.rmtree(self._folder)
        if failures:
            raise AssertionError("\n".join(failures))
        return ends

    def kill(self) -> None:
        """End what is left of it."""
        for pid in self.pids:
            if pid not in self._zygote.codes:
                os.kill(pid, signal.SIGKILL)  # still ours: nobody has reaped it
        assert not self._zygote.await_end(self.pids, 20)


class Zygote:
    """The process that forks. For one thread; several worlds may live at once."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(there.fileno())],
                pass_fds=[there.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
        self._pipe = Connection(here.detach())
        self.codes: dict[int, int] = {}  # of the ranks that have ended, by pid
        self._forked: list[int] | None = None

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()  # its ranks are killed
        self._process.wait(20)

    def start(self, function: Callable[..., Any], size: int, *args: Any) -> World:
        return World(self, function, size, args)

    def fork(self, job: tuple[Any, ...]) -> list[int]:
        self._forked = None
        self._pipe.send(job)
        deadline = time.monotonic() + STARTED_S
        while self._forked is None:
            assert time.monotonic() < deadline, "the zygote does not answer"
            self._listen(1)
        return self._forked

    def await_end(self, pids: list[int], timeout_s: float) -> list[int]:
        """Wait for these to end; those that have not."""
        deadline = time.monotonic() + timeout_s
        while left := [pid for pid in pids if pid not in self.codes]:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                break
            self._listen(seconds)
        return left

    def _listen(self, timeout_s: float) -> None:
        if self._pipe.poll(timeout_s):
            kind, value = self._pipe.recv()
            if kind == "forked":
                self._forked = value
                for pid in value:
                    self.codes.pop(pid, None)  # a number may come again
            else:
                pid, code = value
                self.codes[pid] = code


# ---- in the zygote, and in its children


def serve(pipe: Connection) -> None:
    """Fork what is asked for, reap what has ended, until the other end of the pipe is closed."""
    import onecast.comm  # noqa: F401 - so that ranks have it

    watched: dict[int, int] = {}  # pidfd: pid
    while True:
        for one in multiprocessing.connection.wait([pipe, *watched]):
            if isinstance(one, int):
                pid = watched.pop(one)
                os.close(one)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(BrokenPipeError):  # nobody asks any more
                    pipe.send(("ended", (pid, os.waitstatus_to_exitcode(status))))
                continue
            try:
                function, size, port, folder, args = pipe.recv()
            except EOFError:
                for pid in watched.values():
                    os.kill(pid, signal.SIGKILL)
                for pid in watched.values():
                    os.waitpid(pid, 0)
                return
            pids = []
            for rank in range(size):
                pid = os.fork()
                if pid == 0:
                    pipe.close()
                    for fd in watched:
                        os.close(fd)
                    be_rank(function, rank, size, port, folder, args)
                pids.append(pid)
                watched[os.pidfd_open(pid)] = pid
            pipe.send(("forked", pids))


def be_rank(
    function: Callable[..., Any], rank: int, size: int, port: int, folder: str, args: Any
) -> NoReturn:
    die_with_parent()
    code = 1
    try:
        with open(f"{folder}/stacks-{rank}", "w") as stacks:
            faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
            torch.set_num_threads(1)
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
            result = "returned", function(rank, *args)
            code = 0
    except BaseException:
        result = "failed", traceback.format_exc()
    try:
        unfinished = Path(folder, f"unfinished-{rank}")
        unfinished.write_bytes(pickle.dumps(result))
        unfinished.rename(Path(folder, f"result-{rank}"))
    finally:
        os._exit(code)  # at once, as it was


def die_with_parent() -> None:
    """A parent that was killed reaps nobody."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    assert os.getppid() == parent


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules["zygote"] = sys.modules["__main__"]
    die_with_parent()
    serve(Connection(int(sys.argv[1])))
