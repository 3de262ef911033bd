"""Run a function on real ranks: spawned processes that share a torch.distributed world.

Owns the life of those processes: start, result, failure, hang and reaping. Refuses to know what
the function does. For tests and benchmarks; nothing else in onecast imports it.

    def exchange(rank: int, value: int) -> int:      # at the top level of an importable module
        ...
    assert run_ranks(exchange, 2, 7) == [7, 7]

Functions, arguments and results are pickled, as `multiprocessing` does: they travel between a test
and its own children, never between ranks.
"""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

_GRACE_S = 10.0  # what the other ranks get to finish once one has failed
_LEAVE_S = 20.0  # what a rank gets to tear its process group down and exit
_DUMP_S = 2.0  # what a hung rank gets to write its stacks


class RankFailed(Exception):
    """A rank raised or died.

    `rank`: the first that did; `details`: its traceback (or its signal), then the others';
    `results`: what the others returned.
    """

    def __init__(self, rank: int, details: str, results: Mapping[int, Any]) -> None:
        super().__init__(f"rank {rank} failed\n{details}")
        self.rank = rank
        self.details = details
        self.results = dict(results)


class RanksHung(RankFailed):
    """Nobody failed, but `ranks` were still running at the deadline; the text has their stacks."""

    def __init__(self, ranks: list[int], details: str, results: Mapping[int, Any]) -> None:
        super().__init__(ranks[0], details, results)
        self.args = (f"ranks {ranks} hung\n{details}",)
        self.ranks = ranks


class Hosts(Protocol):
    """Where ranks run that do not run here."""

    address: str  # of the rendezvous, which every rank can reach

    def environment(self, rank: int) -> Mapping[str, str]:
        """What is set for this rank there."""

    def listen(self, function: Callable[[], Any]) -> Any:
        """Call what comes to listen at the address; what it returns."""

    def start(self, rank: int, function: Callable[[], None]) -> None:
        """Call what starts the process of this rank, so that it starts there."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    backend: str = "gloo",
    env: Mapping[str, str] | None = None,
    hosts: Hosts | None = None,
) -> list[Any]:
    """Call `function(rank, *args)` on `world_size` new processes; their results in rank order.

    `torch.distributed` is initialised in each (on a port the system chose), torch runs on one
    thread, and RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are set as torchrun sets them,
    `env` on top. A rank whose function has returned stays until all have, so that its leaving
    disturbs nobody. No process survives this call. `hosts`: where the ranks run, None for here.

    Raises RankFailed with the traceback (or the signal) of the first rank that failed, RanksHung
    with the stacks of all that were still running after `timeout_s`.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}, at least 1 is needed")
    context = _context(fork=hosts is None)
    hosts = hosts if hosts is not None else _OneHost()
    address = hosts.address
    store = hosts.listen(
        lambda: dist.TCPStore(address, 0, is_master=True, wait_for_workers=False),  # type: ignore[attr-defined]
    )
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="onecast-ranks-") as folder:
        try:
            for rank in range(world_size):
                here, there = context.Pipe()
                stacks = Path(folder, f"stacks-{rank}")
                setup = (rank, world_size, address, store.port, backend, timeout_s, str(stacks))
                settings = {
                    **_rank_environment(rank, world_size),
                    **hosts.environment(rank),
                    **(env or {}),
                }
                process = context.Process(
                    target=_rank_main, args=(there, setup, settings, function, args)
                )
                with _environment(settings):
                    if context.get_start_method() == "forkserver":
                        _start_server()
                    hosts.start(rank, process.start)
                there.close()
                ranks.append(_Rank(rank, process, here, stacks))
            _collect(ranks, time.monotonic() + timeout_s)
            return _results(ranks, timeout_s)
        finally:
            for one in ranks:
                one.reap()


def _context(fork: bool) -> Any:
    """How processes are started: forked from a server that has imported torch, or spawned.

    To import torch takes each spawned process two seconds of a core. The server is this process's
    own, uses no thread and no device, and ends with it; a rank on another host cannot come from it.
    """
    context = multiprocessing.get_context("forkserver" if fork else "spawn")
    if fork:
        context.set_forkserver_preload(["torch", "torch.distributed", __name__])
    return context


def _start_server() -> None:
    """Start the server of `_context` if it does not run, without SIGINT until it has imported.

    Ctrl-C in a terminal goes to it too, and it ignores that only once it has imported torch. Ranks
    are given the signal back.
    """
    multiprocessing.resource_tracker.ensure_running()  # it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _OneHost:
    """This one."""

    address = "127.0.0.1"

    def environment(self, rank: int) -> Mapping[str, str]:
        return {"GLOO_SOCKET_IFNAME": "lo"}  # a container's host name need not resolve

    def listen(self, function: Callable[[], Any]) -> Any:
        return function()

    def start(self, rank: int, function: Callable[[], None]) -> None:
        function()


class _Rank:
    """One child: its process, its pipe and what is known of it."""

    def __init__(self, rank: int, process: Any, pipe: Connection, stacks: Path) -> None:
        self.rank = rank
        self.process = process
        self.pipe = pipe
        self.stacks = stacks
        self.dumps_stacks = False  # the child has registered its signal handler
        self.state = "running"  # then "returned" or "failed"
        self.value: Any = None  # what it returned, or the text of its failure
        self.order = (0.0, False)  # of failures: when it was heard of, and the dead of a time first

    def listen(self, now_s: float) -> None:
        """Take what the pipe holds; its end without a result is a death."""
        self.order = now_s, True
        try:
            kind, value = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.order = now_s, False
            self.process.join(_LEAVE_S)
            code = self.process.exitcode
            cause = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"code {code}"
            kind, value = "failed", f"the process ended with {cause} before its function returned"
        if kind == "ready":
            self.dumps_stacks = True
        else:
            self.state, self.value = kind, value

    def dump(self) -> str:
        """The stacks of a hung rank, from its own faulthandler."""
        if not self.dumps_stacks:
            return "no stack: it was still importing"
        os.kill(self.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + _DUMP_S
        size = -1
        while time.monotonic() < deadline and (size <= 0 or size != self.stacks.stat().st_size):
            size = self.stacks.stat().st_size
            time.sleep(0.05)
        return self.stacks.read_text() or "no stack: it did not answer the signal"

    def reap(self) -> None:
        """Kill what is left of the child and of the processes that it started, and wait for it."""
        if self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # it left in this very moment
                os.kill(self.process.pid, signal.SIGKILL)
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
        self.process.close()
        self.pipe.close()


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Listen until every rank has returned or failed, or the time is up."""
    while running := [one for one in ranks if one.state == "running"]:
        if any(one.state == "failed" for one in ranks):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        left = deadline - time.monotonic()
        pipes = {one.pipe: one for one in running}
        heard = multiprocessing.connection.wait(list(pipes), max(left, 0))
        if not heard and left <= 0:
            return
        now_s = time.monotonic()
        for pipe in heard:
            assert isinstance(pipe, Connection)
            pipes[pipe].listen(now_s)


def _results(ranks: list[_Rank], timeout_s: float) -> list[Any]:
    """What the ranks returned, once all of them have left in order; or the error to raise."""
    returned = {one.rank: one.value for one in ranks if one.state == "returned"}
    hung = [one for one in ranks if one.state == "running"]
    notes = [f"--- rank {one.rank} was still running:\n{one.dump()}" for one in hung]
    failed = sorted((one for one in ranks if one.state == "failed"), key=lambda one: one.order)
    if failed:
        texts = [f"--- rank {one.rank} failed too:\n{one.value}" for one in failed[1:]]
        raise RankFailed(failed[0].rank, "\n".join([failed[0].value, *texts, *notes]), returned)
    if hung:
        text = "\n".join([f"not finished after {timeout_s:g} s", *notes])
        raise RanksHung([one.rank for one in hung], text, returned)
    for one in ranks:
        with contextlib.suppress(BrokenPipeError):  # its exit code, below, says why
            one.pipe.send_bytes(b"leave")
    for one in ranks:
        one.process.join(_LEAVE_S)
        code = one.process.exitcode
        if code is None:
            text = f"returned, but did not exit within {_LEAVE_S:g} s\n{one.dump()}"
            raise RanksHung([one.rank], text, returned)
        if code != 0:
            raise RankFailed(one.rank, f"returned, then exited with code {code}", returned)
    return [one.value for one in ranks]


def _rank_environment(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """os.environ with `values`, for a child to inherit: it must hold before torch is imported."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- in the child


def _rank_main(
    pipe: Connection,
    setup: tuple[int, int, str, int, str, float, str],
    settings: Mapping[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    rank, world_size, address, port, backend, timeout_s, stacks = setup
    os.setsid()  # what this rank starts is reaped with it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `_start_server`
    os.environ.update(settings)  # a server that forks has an environment from before
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        file = open(stacks, "w")
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        pipe.send_bytes(pickle.dumps(("ready", None)))
    except (FileNotFoundError, BrokenPipeError):  # whoever wanted this rank was stopped meanwhile
        os._exit(1)
    with file:
        try:
            torch.set_num_threads(1)
            timeout = timedelta(seconds=timeout_s)
            store = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout
            )
            _meet(store, world_size)
            message = pickle.dumps(("returned", function(rank, *args)))
        except BaseException:
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
            os._exit(1)  # at once: peers must not wait for a rank that has failed
        pipe.send_bytes(message)
        pipe.recv_bytes()  # "leave"; the parent bounds this wait
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)


def _meet(store: Any, world_size: int) -> None:
    """Wait until every rank has connected: one that fails at once must not be a peer's failure."""
    if store.add("onecast/joined", 1) == world_size:
        store.set("onecast/all joined", b"")
    store.wait(["onecast/all joined"])


def _leave_with_parent() -> None:
    """A parent that was killed reaps nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
