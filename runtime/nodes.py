"""Where a run of several nodes meets: the options of torchrun's rendezvous, checked before it.

Owns those options, in torchrun's own words, and what torch's launcher is told of them. Knows
nothing of torch, nor of what ranks do. Each node is started with the same options and, but for
`c10d`, with a `--node-rank` of its own; there is no launcher of ours across nodes.

    static   each node says its rank; node 0, which has rank 0 and the files, listens at the
             endpoint
    c10d     the rendezvous gives out ranks, in the order of the nodes' addresses; any of them may
             get rank 0, so all must have the files
"""

import argparse
import dataclasses
import uuid
from dataclasses import dataclass
from typing import Any

BACKENDS = ("static", "c10d")
_DEFAULT_ID = "onecast"


@dataclass(frozen=True, slots=True)
class Nodes:
    """How many nodes a run has, which one this is, and where they meet. One node by default.

    ValueError names the option, its value and what it could be.
    """

    nnodes: int = 1
    node_rank: int | None = None
    rdzv_endpoint: str | None = None  # host:port
    rdzv_id: str | None = None
    rdzv_backend: str | None = None  # None: static where the rank is given, else c10d
    local_addr: str | None = None
    max_restarts: int = 0

    def __post_init__(self) -> None:
        if self.nnodes < 1:
            raise ValueError(f"--nnodes: {self.nnodes} is below 1")
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts: {self.max_restarts} is below 0")
        if self.node_rank is not None and not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                f"--node-rank: {self.node_rank}, but nodes count from 0 to {self.nnodes - 1}"
            )
        if self.rdzv_backend not in (None, *BACKENDS):
            raise ValueError(f"--rdzv-backend: {self.rdzv_backend} is not {' or '.join(BACKENDS)}")
        if self.rdzv_endpoint is None:
            if self.nnodes > 1:
                raise ValueError(
                    f"--nnodes: {self.nnodes} nodes need --rdzv-endpoint HOST:PORT to meet at"
                )
            return
        host, separator, port = self.rdzv_endpoint.rpartition(":")
        if not (separator and host and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(
                f"--rdzv-endpoint: {self.rdzv_endpoint} is not HOST:PORT, a port from 1 to 65535"
            )
        if self.backend == "static" and self.node_rank is None:
            raise ValueError("--rdzv-backend: static needs --node-rank on every node")
        if self.backend == "c10d" and self.node_rank is not None:
            raise ValueError(
                f"--node-rank: {self.node_rank}, but with --rdzv-backend c10d the rendezvous gives "
                "out ranks"
            )

    @property
    def backend(self) -> str:
        if self.rdzv_backend is not None:
            return self.rdzv_backend
        return "c10d" if self.node_rank is None else "static"

    @property
    def may_have_rank_0(self) -> bool:
        """Whether this node may be the one that reads the input and writes the results."""
        return not self.node_rank

    def ranks_per_node(self, tp: int) -> int:
        """ValueError: `tp` ranks cannot be shared out alike."""
        if tp % self.nnodes:
            raise ValueError(f"--tp: {tp} ranks do not divide by --nnodes {self.nnodes}")
        return tp // self.nnodes

    def rendezvous(self, join_timeout_s: float) -> dict[str, Any]:
        """What `torch.distributed.launcher.api.LaunchConfig` is to be given of this."""
        timeout_s = max(1, int(join_timeout_s))
        common = {"min_nodes": self.nnodes, "max_nodes": self.nnodes}
        common["max_restarts"] = self.max_restarts
        if self.rdzv_endpoint is None:
            return common | {
                "run_id": uuid.uuid4().hex,
                "rdzv_backend": "c10d",
                "rdzv_endpoint": "127.0.0.1:0",
                "local_addr": "127.0.0.1",
            }
        return common | {
            "run_id": self.rdzv_id or _DEFAULT_ID,
            "rdzv_backend": self.backend,
            "rdzv_endpoint": self.rdzv_endpoint,
            "rdzv_configs": self._rendezvous_configs(timeout_s),
            "local_addr": self.local_addr,
        }

    def _rendezvous_configs(self, timeout_s: int) -> dict[str, Any]:
        if self.backend == "static":
            return {"rank": self.node_rank, "timeout": timeout_s}
        # A link that is down for less than that does not end the agent, which looks at the
        # rendezvous all the time.
        configs: dict[str, Any] = {"join_timeout": timeout_s, "read_timeout": timeout_s}
        assert self.rdzv_endpoint is not None
        if self.local_addr == self.rdzv_endpoint.rpartition(":")[0]:
            configs["is_host"] = True  # torch asks the name of the machine only
        return configs


def add_node_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of `Nodes`, named as torchrun names them."""
    group = parser.add_argument_group(
        "several nodes", "start the same command on each of them, as with torchrun"
    )
    add = group.add_argument
    add("--nnodes", type=int, default=1, metavar="N", help="nodes; --tp counts ranks of all (1)")
    add("--node-rank", type=int, metavar="N", help="this node, from 0; it decides who has rank 0")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where nodes meet; with --node-rank: node 0")
    add("--rdzv-id", metavar="ID", help=f"the run's name, the same everywhere ({_DEFAULT_ID})")
    add("--rdzv-backend", choices=BACKENDS, help="static with --node-rank, else c10d")
    add("--local-addr", metavar="HOST", help="this node as others reach it, if not by its name")
    add(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="how often ranks are started again after a failure; they go on with what is missing "
        "from the output (%(default)s)",
    )


def nodes_of(options: argparse.Namespace) -> Nodes:
    """The checked options; the defaults where a command has none of them."""
    names = {field.name for field in dataclasses.fields(Nodes)}
    return Nodes(**{name: value for name, value in vars(options).items() if name in names})
