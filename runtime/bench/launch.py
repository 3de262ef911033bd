"""One launch: real ranks on this host, over Gloo, every workload and mode in turn.

Owns the matrix of what is measured with how many ranks, and how the stamps of several ranks become
figures. Knows nothing of medians.

One way is until the last reader has the mapping in hand; with more than one reader, "any reader"
pools them all.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from onecast.comm.testing import run_ranks

from .ablation import ABLATION
from .exchanges import Exchanges, Stamps, alternating_turns, paced_turns, tight_turns
from .methods import IDLE, METHODS, PACED, PACED_MORE_RANKS, open_methods
from .shared_page import Gate
from .workloads import WORKLOADS, make_workload

ONE_WAY, ANY_READER, SENDER = "one-way us", "one-way us, any reader", "sender us"
CPU = "waiting CPU percent"
BYTES, METADATA, BROADCASTS = "bytes", "metadata bytes", "broadcasts per step"


class Key(NamedTuple):
    workload: str
    method: str
    ranks: int
    mode: str
    metric: str


class Plan(NamedTuple):
    """How much of it; the numbers of timed exchanges are per method and launch."""

    ranks: int
    tight_steps: int
    paced_steps: int
    untimed_steps: int
    idle_s: float
    timeout_s: float = 1800.0


Figures = dict[Key, list[float]]


def launch(plan: Plan) -> Figures:
    """Start the ranks, measure, and join what they saw."""
    source, *receivers = run_ranks(_measure, plan.ranks, plan, timeout_s=plan.timeout_s)
    figures: Figures = dict(source["figures"])
    for (workload, method, mode), sent in source["stamps"].items():
        stamps = [receiver["stamps"][workload, method, mode] for receiver in receivers]
        for metric, values in _join(sent, stamps).items():
            if values:
                figures[Key(workload, method, plan.ranks, mode, metric)] = values
    for receiver in receivers:
        for key, values in receiver["figures"].items():
            figures.setdefault(key, []).extend(values)
    return figures


def _join(sent: Stamps, received: Sequence[Stamps]) -> dict[str, list[float]]:
    begins = sent.begins
    arrivals = list(zip(*(stamps.ends for stamps in received), strict=True))
    joined = {
        ONE_WAY: [(max(ends) - begin) / 1e3 for begin, ends in zip(begins, arrivals, strict=True)],
        SENDER: [(end - begin) / 1e3 for begin, end in zip(begins, sent.ends, strict=True)],
        CPU: [percent for stamps in received for percent in stamps.cpu_percent],
    }
    if len(received) > 1:
        joined[ANY_READER] = [
            (end - begin) / 1e3
            for begin, ends in zip(begins, arrivals, strict=True)
            for end in ends
        ]
    return joined


def _measure(rank: int, plan: Plan) -> dict[str, Mapping[Any, Any]]:
    """On one rank: the stamps by workload, method and mode, and what is a figure already."""
    stamps: dict[tuple[str, str, str], Stamps] = {}
    figures: Figures = {}
    gate = Gate()
    for workload in WORKLOADS:
        names = METHODS
        if plan.ranks == 2 and workload in ("W1", "W2"):
            names = METHODS + ABLATION
        mapping = make_workload(workload)
        methods = open_methods(names, mapping)
        exchanges = Exchanges(rank, gate, methods, mapping, plan.untimed_steps)
        before = {name: (method.messages, method.broadcasts) for name, method in methods.items()}
        modes = {"tight": exchanges.run(tight_turns(names, plan.tight_steps))}
        if workload == "W2" and plan.ranks == 2:
            modes["alternating"] = exchanges.run(alternating_turns(METHODS, plan.tight_steps))
            modes["paced"] = exchanges.run(paced_turns(PACED, plan.paced_steps), paced=True)
        elif workload == "W2":
            turns = paced_turns(PACED_MORE_RANKS, plan.paced_steps)
            modes["paced"] = exchanges.run(turns, paced=True)
        for mode, of_methods in modes.items():
            for name, stamp in of_methods.items():
                if stamp.ends:
                    stamps[workload, name, mode] = stamp
        if rank == 0:
            for name, method in methods.items():
                messages, broadcasts = before[name]
                steady = {
                    BYTES: method.nbytes,
                    METADATA: method.metadata_bytes,
                    BROADCASTS: (method.broadcasts - broadcasts) / (method.messages - messages),
                }
                for metric, value in steady.items():
                    figures[Key(workload, name, plan.ranks, "steady", metric)] = [value]
        if workload == "W2" and plan.ranks == 2:
            for name in IDLE:
                percent = exchanges.idle(name, plan.idle_s)
                if rank != 0:
                    figures[Key(workload, name, plan.ranks, "idle", CPU)] = [percent]
        for method in methods.values():
            method.close()
    return {"stamps": stamps, "figures": figures}
