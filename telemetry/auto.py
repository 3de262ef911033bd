"""Telemetry of a program that knows nothing of it: on, off, and the start in between.

Owns the rule that no error of ours reaches the program: what goes wrong is said once on stderr, and
the program goes on unrecorded. `instrument` and `uninstrument` are neighbours; in between,
`auto_hook` waits for the first process group and calls `start`. No collective call is added. The
rest is loaded only then: most processes of a program are no ranks.

A program of onecast's own runtime has a session of its own and is left alone.
"""

import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from .auto_hook import MODULE, GroupHook, say

if TYPE_CHECKING:
    from .auto_session import AutomaticSession

_RUNTIME = "onecast.runtime.worker"

_lock = threading.Lock()
_hook: GroupHook | None = None
_running: "AutomaticSession | None" = None


def instrument() -> None:
    """Record from the first process group on, or from now if there is one. Twice is once."""
    global _hook
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return
    with _lock:
        if _hook is not None:
            return
        hook = _hook = GroupHook(start)
    module = sys.modules.get(MODULE)
    if module is None or not module.is_initialized():
        hook.install()
        return
    try:
        start(module._get_default_group(), module._get_default_store())
    except Exception as error:
        say(f"nothing is recorded: {type(error).__name__}: {error}")


def uninstrument() -> None:
    """Stop recording and leave everything as `instrument` found it."""
    global _hook, _running
    with _lock:
        hook, _hook = _hook, None
        running, _running = _running, None
    if hook is not None:
        hook.remove()
    if running is not None:
        running.close(wait=False)


def start(group: Any, store: Any) -> None:
    """Start this rank's session; `group` and `store` are those of the default process group.

    Nothing happens where the process is recorded already. Whoever calls this shields the program
    from what it raises: ValueError for variables that cannot be.
    """
    global _running
    from .auto_identity import identify
    from .auto_session import CLOSE_TIMEOUT_S, AutomaticSession
    from .current import current_session
    from .settings import TelemetrySettings

    with _lock:
        if _running is not None or current_session() is not None or _RUNTIME in sys.modules:
            return
        if sys.modules[MODULE].get_backend(group) == "fake":  # it only pretends to communicate
            return
        settings = TelemetrySettings.from_env(close_timeout_s=CLOSE_TIMEOUT_S)
        identity = identify(group.rank(), group.size(), store, os.environ)
        _running = AutomaticSession(identity, settings, group.group_name)
