"""Worlds of ranks that start in a tenth of a second: forked from a process that has torch already.

A helper of tests that need very many worlds, and of those that kill ranks: ranks end on their own,
each in its time, and the test sees how. `onecast.comm.testing.run_ranks` is for all others.

    with Zygote() as zygote, zygote.start(exchange, 3, 7) as world:  # exchange(rank, 7) in each
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
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

STARTED_S = 60.0  # what importing torch may take on a busy machine
_PR_SET_PDEATHSIG = 1
_GROUP_TIMEOUT = timedelta(seconds=12)


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
        # Theirs until they are reaped: a test may send signals to any at any time.
        self.pids = zygote.fork((function, size, self._store.port, self._folder, args))
        self._alive = True

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Nothing of it stays; an error is told how the ranks were."""
        if error is not None and self._alive:
            try:
                self.join(0)
            except AssertionError as why:
                error.add_note(str(why))
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def join(self, timeout_s: float) -> list[Ended]:
        """Wait for all to end. A rank that fails or hangs is an AssertionError with its stacks."""
        failures = []
        hung = self._zygote.await_end(self.pids, timeout_s)
        for pid in hung:
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGUSR1)
        if hung:
            time.sleep(1)  # for the stacks
        codes = self.kill()
        ends: list[Ended] = []
        for rank, pid in enumerate(self.pids):
            if pid in hung:
                stacks = Path(self._folder, f"stacks-{rank}").read_text()
                failures.append(f"rank {rank} was running after {timeout_s:g} s:\n{stacks}")
            path = Path(self._folder, f"result-{rank}")
            state, value = pickle.loads(path.read_bytes()) if path.exists() else ("none", None)
            if state == "failed":
                failures.append(f"rank {rank} failed:\n{value}")
            ends.append(Ended(codes[pid], value))
        shutil.rmtree(self._folder)
        if failures:
            raise AssertionError("\n".join(failures))
        return ends

    def kill(self) -> dict[int, int]:
        """End and reap what is left of it; all exit codes by pid. A second call does nothing."""
        if self._alive:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)  # ours, even if it has ended: it is not reaped yet
            assert not self._zygote.await_end(self.pids, 20), "SIGKILL did not end a rank"
            self._zygote.reap(self.pids)
            self._alive = False
        return {pid: self._zygote.codes[pid] for pid in self.pids}


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
        self._answer: list[int] | None = None

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()  # its ranks are killed
        self._process.wait(20)

    def start(self, function: Callable[..., Any], size: int, *args: Any) -> World:
        return World(self, function, size, args)

    def fork(self, job: tuple[Any, ...]) -> list[int]:
        pids = self._ask(job)
        for pid in pids:
            self.codes.pop(pid, None)  # a number may come again
        return pids

    def reap(self, pids: list[int]) -> None:
        self._ask(pids)

    def await_end(self, pids: list[int], timeout_s: float) -> list[int]:
        """Wait for these to end; those that have not."""
        deadline = time.monotonic() + timeout_s
        while left := [pid for pid in pids if pid not in self.codes]:
            seconds = deadline - time.monotonic()
            if not self._listen(max(seconds, 0)) and seconds <= 0:
                break
        return left

    def _ask(self, question: object) -> list[int]:
        self._answer = None
        self._pipe.send(question)
        deadline = time.monotonic() + STARTED_S
        while self._answer is None:
            assert time.monotonic() < deadline, "the zygote does not answer"
            self._listen(1)
        return self._answer

    def _listen(self, timeout_s: float) -> bool:
        """Take one message, if there is one in time."""
        if not self._pipe.poll(timeout_s):
            return False
        heard = self._pipe.recv()
        if isinstance(heard, list):
            self._answer = heard
        else:
            pid, code = heard
            self.codes[pid] = code
        return True


# ---- in the zygote, and in its children


def serve(pipe: Connection) -> None:
    """Fork and reap what is asked for and tell what ends, until the pipe's other end is closed."""
    import onecast.comm  # noqa: F401 - so that ranks have it

    children: set[int] = set()
    watched: dict[int, int] = {}  # pidfd: pid
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            for one in multiprocessing.connection.wait([pipe, *watched]):
                if isinstance(one, int):
                    os.close(one)
                    pid = watched.pop(one)
                    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                    assert end is not None
                    exited = end.si_code == os.CLD_EXITED
                    pipe.send((pid, end.si_status if exited else -end.si_status))
                    continue
                question = pipe.recv()
                if isinstance(question, list):
                    for pid in question:
                        os.waitpid(pid, 0)
                    children.difference_update(question)
                    pipe.send(question)
                    continue
                function, size, *rest = question
                pids = []
                for rank in range(size):
                    pid = os.fork()
                    if pid == 0:
                        pipe.close()
                        for fd in watched:
                            os.close(fd)
                        be_rank(function, rank, size, *rest)
                    pids.append(pid)
                    watched[os.pidfd_open(pid)] = pid
                children.update(pids)
                pipe.send(pids)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)


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
            # Gloo may still be connecting to a rank that is killed, and waits for all of this then.
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=_GROUP_TIMEOUT
            )
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
