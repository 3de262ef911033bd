"""Which session records this process, for code that did not start it.

Owns that one reference, and nothing of the session. A closed session is never found here.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .session import Session

_open: list["Session"] = []
_automatic: "Session | None" = None


def current_session() -> "Session | None":
    """The session that records this process; of several the latest. None: there is none.

    In a program run by `opentelemetry-instrument` or `onecast telemetry run` there is one as soon
    as torch's default process group is there: `step`, `phase` and `record` work on it as on
    one's own, and from its first `step` on the program says what a step is.
    """
    return _open[-1] if _open else None


def opened(session: "Session") -> None:
    _open.append(session)


def closed(session: "Session") -> None:
    global _automatic
    if session in _open:
        _open.remove(session)
    if _automatic is session:
        _automatic = None


def opened_for_others(session: "Session") -> None:
    """It was not the program that started this one."""
    global _automatic
    _automatic = session


def automatic_session() -> "Session | None":
    """The session that records this process without its doing, if there is one."""
    return _automatic
