"""Runs of `onecast` on two hosts, two ranks each. A helper of the tests, not a test.

with NodeRun(hosts, folder, "torchrun", batch, output, "--timeout-s=3") as run:
    hosts.cut(1)
    ...
    assert run.finish() == [0, 0], run.story()
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from cli_runs import DEMO, ONECAST
from hosts import TwoHosts

PORT = 29500  # of the rendezvous: the hosts' networks are theirs alone
TORCHRUN = Path(sys.executable).with_name("torchrun")


class NodeRun:
    """A run on all hosts; its processes end with this `with`."""

    def __init__(
        self,
        hosts: TwoHosts,
        folder: Path,
        launcher: str,
        *options: str,
        max_restarts: int = 0,
    ) -> None:
        """`launcher`: "torchrun", "generate", "generate c10d" or "serve"."""
        self._logs = [folder / f"node-{node}.log" for node in range(2)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for node, address in enumerate(hosts.addresses()):
            command = _command(launcher, hosts.address, node, address, max_restarts)
            self._start(hosts, node, [*command, f"--model={DEMO}", *options])

    def _start(self, hosts: TwoHosts, node: int, command: list[str]) -> None:
        environment = {
            **os.environ,
            **hosts.environment(2 * node),
            # No name server answers there, and torch says so for each connection.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        with self._logs[node].open("wb") as log:

            def start() -> None:
                self._processes[node] = subprocess.Popen(
                    command, env=environment, cwd="/tmp", stdout=log, stderr=log
                )

            hosts.start(2 * node, start)

    def texts(self) -> list[str]:
        """What each node has said so far."""
        return [log.read_text(errors="replace") for log in self._logs]

    def story(self) -> str:
        """The same, for a person."""
        return "\n".join(f"node {node}:\n{text}" for node, text in enumerate(self.texts()))

    def runs(self) -> bool:
        return all(process.poll() is None for process in self._processes.values())

    def stop(self, node: int) -> None:
        self._processes[node].terminate()

    def finish(self, timeout_s: float = 120) -> list[int]:
        """The exit status of each node."""
        return [self._processes[node].wait(timeout_s) for node in range(2)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


def _command(launcher: str, meet_at: str, node: int, address: str, max_restarts: int) -> list[str]:
    endpoint = f"{meet_at}:{PORT}"
    if launcher == "torchrun":
        return [
            *(str(TORCHRUN), "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2"),
            *(f"--master-addr={meet_at}", f"--master-port={PORT}"),
            *(f"--max-restarts={max_restarts}", "-m", "onecast.runtime.worker"),
        ]
    command, _, backend = launcher.partition(" ")
    where = [f"--node-rank={node}"]
    if backend == "c10d":
        where = ["--rdzv-backend=c10d", f"--local-addr={address}"]
    return [
        *(str(ONECAST), command, "--tp=4", "--nnodes=2", f"--rdzv-endpoint={endpoint}"),
        *(*where, f"--max-restarts={max_restarts}"),
    ]
