"""Which rank broke a run, from what the elastic agent saw of all that ended.

Owns the choice of the root cause among failures and its sentence. Knows nothing of launching.

When one rank goes, the others fail too: they lose their connection to it, and those that still
wait are ended by the agent. So, most telling first:

    its own error           an exception that is no lost connection; a time-out is one, and a node
                            that cannot be reached
    killed by a signal      but not by SIGTERM, which is how the agent ends ranks
    ended by SIGTERM
    lost a peer             an exception that only says that another rank has gone
"""

import signal
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_OWN_ERROR, _KILLED, _TERMINATED, _LOST_PEER = range(4)
_INTERRUPTED = 128 + signal.SIGINT
# How a broken connection is worded by comm, Gloo and NCCL.
_LOST = ("PeerLost", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
_LOST_NCCL = ("ncclRemoteError", "remote process exited")


def root_cause(failures: Mapping[int, ProcessFailure]) -> tuple[str, bool]:
    """One sentence on the rank that broke the run, and whether running again could help."""
    rank, failure = min(failures.items(), key=_suspicion)
    who = f"rank {rank} (pid {failure.pid})"
    if failure.exitcode < 0:
        return f"{who} was killed by {failure.signal_name()}", True
    if failure.exitcode == _INTERRUPTED:
        return f"{who} was stopped by SIGINT", True
    text = _message(failure)
    kind, separator, reason = text.partition(": ")
    if separator and kind == "ValueError":  # bad input: the same on every rank
        return reason, False
    unanswered = [
        str(other)
        for other, ended in failures.items()
        if other != rank and ended.exitcode == -signal.SIGKILL
    ]
    if unanswered and _timed_out(text):
        text += f" (rank {', '.join(unanswered)} did not answer, nor end when asked to)"
    return f"{who} failed: {text}", kind != "FloatingPointError"


def _suspicion(item: tuple[int, ProcessFailure]) -> tuple[int, int, int]:
    rank, failure = item
    if failure.exitcode < 0:
        kind = _TERMINATED if failure.exitcode == -signal.SIGTERM else _KILLED
    else:
        kind = _LOST_PEER if _lost_peer(_message(failure)) else _OWN_ERROR
    return kind, failure.timestamp, rank


def _lost_peer(text: str) -> bool:
    if text.startswith("NodeLost") or _timed_out(text):
        return False
    return any(words in text for words in (*_LOST, *_LOST_NCCL))


def _timed_out(text: str) -> bool:
    return "timed out" in text.lower() or text.startswith(("ReceiveTimeout", "AllReduceTimeout"))


def _message(failure: ProcessFailure) -> str:
    """What the worker's error handler wrote, or the agent's own words where it wrote nothing."""
    message = failure.message
    text = message["message"] if isinstance(message, dict) else message
    return " ".join(str(text).split())
