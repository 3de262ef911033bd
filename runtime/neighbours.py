"""The other nodes of a run, and which of them cannot be reached any more.

Owns one listening socket on each node, its door, that nobody ever accepts from: the kernel answers
for it as long as the node is on the network, whatever its processes do. Asked only when a run has
broken, because a lost connection or a time-out does not say which node it was; costs nothing
before. Knows nothing of what broke. With one node there is none of this.

A door that could not be reached at the beginning either (a firewall) says nothing later.
"""

import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from .config import RankEnvironment
from .roll_call import name_ranks

TIMEOUT_S = 2.0  # for an answer of the kernel of another node
_THREADS = 32
_BACKLOG = 1024  # all ranks of a run may knock at once


class NodeLost(Exception):
    """Other nodes cannot be reached; the text names them, their ranks, and the first symptom."""


class Door:
    """What a node is found by; only its local rank 0 opens one. `address` is told to all ranks."""

    def __init__(self, environment: RankEnvironment) -> None:
        self._socket: socket.socket | None = None
        self.address = ""
        if environment.local_rank == 0 and environment.world_size > environment.local_world_size:
            host = _own_host(environment)
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            self._socket = socket.create_server(
                ("", 0), family=family, backlog=_BACKLOG, dualstack_ipv6=family == socket.AF_INET6
            )
            self.address = f"{host} {self._socket.getsockname()[1]}"

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


class Neighbours:
    """The nodes of the others. `addresses` are those of `Door`, by rank; "" where there is none."""

    def __init__(self, addresses: list[str], own_rank: int) -> None:
        nodes: list[list[int]] = []
        for rank, address in enumerate(addresses):
            if address:
                nodes.append([])
            if nodes:
                nodes[-1].append(rank)
        self._nodes = {
            number: (addresses[ranks[0]], ranks)
            for number, ranks in enumerate(nodes)
            if own_rank not in ranks
        }
        silent = self._knock(self._nodes)
        self._nodes = {n: node for n, node in self._nodes.items() if n not in silent}

    def lost(self) -> str | None:
        """Which nodes cannot be reached, and why; None: all can. A few seconds at most."""
        silent = self._knock(self._nodes)
        if not silent:
            return None
        told = []
        for number, why in silent.items():
            address, ranks = self._nodes[number]
            host = address.partition(" ")[0]
            told.append(f"node {number} ({host}, {name_ranks(ranks)}) cannot be reached: {why}")
        return "; ".join(told)

    def _knock(self, numbers: Iterable[int]) -> dict[int, str]:
        """The nodes that do not answer, with the reason."""
        numbers = list(numbers)
        if not numbers:
            return {}
        with ThreadPoolExecutor(min(_THREADS, len(numbers))) as pool:
            answers = pool.map(lambda number: _why_silent(self._nodes[number][0]), numbers)
            return {n: why for n, why in zip(numbers, answers, strict=True) if why is not None}


def _why_silent(address: str) -> str | None:
    """None: its kernel answers; that nobody listens there any more is an answer too."""
    host, port = address.split(" ")
    begin = time.monotonic()
    try:
        socket.create_connection((host, int(port)), TIMEOUT_S).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return None
    except TimeoutError:
        return f"no answer in {time.monotonic() - begin:.1f} s"
    except OSError as error:  # no route, no such network, no such name
        return error.strerror or str(error)
    return None


def _own_host(environment: RankEnvironment) -> str:
    """The address of this node by which it reaches rank 0's; that one is known by its name."""
    if environment.node == 0:
        return environment.master_addr
    where = socket.getaddrinfo(
        environment.master_addr, environment.master_port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(where[0], socket.SOCK_DGRAM) as probe:
        probe.connect(where[4])  # sends nothing: the kernel only chooses a route
        return str(probe.getsockname()[0])
