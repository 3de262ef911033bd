"""How every collective becomes visible.

    import os, torch, torch.distributed as dist
    from onecast.telemetry import TelemetrySettings, start_session

    dist.init_process_group("gloo")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")    # as torchrun sets them
    session = start_session(**{name.lower(): int(os.environ[name]) for name in names},
                            engine_id="run 1",  # a new one for each run: trace ids come from it
                            settings=TelemetrySettings.from_env())
    with session.step(0, batch_size=1), session.phase("model.forward"):
        dist.all_reduce(torch.ones(4))
    print(session.metrics_url)
    session.close()

Works in any torch.distributed program, also without a line of code (`onecast telemetry run`).
`environment` lists the variables that `from_env` reads. Names are imported when first used: a
program that opentelemetry-instrument starts imports this package whether it has ranks or not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .current import current_session
    from .ddp_hook import hook_ddp, unhook_ddp
    from .errors import TelemetryError
    from .intercept import CollectiveInstrumentor, Recorder
    from .probe import RingProbe
    from .ring import RingWriter
    from .ring_reader import Drained, RingReader
    from .run_directory import agree_on_run_dir, make_run_dir, name_run_dir, remove_run_dir
    from .session import Session, start_session
    from .settings import TelemetrySettings
    from .values import VALUES

__all__ = [
    "VALUES",
    "CollectiveInstrumentor",
    "Drained",
    "Recorder",
    "RingProbe",
    "RingReader",
    "RingWriter",
    "Session",
    "TelemetryError",
    "TelemetrySettings",
    "agree_on_run_dir",
    "current_session",
    "hook_ddp",
    "make_run_dir",
    "name_run_dir",
    "remove_run_dir",
    "start_session",
    "unhook_ddp",
]

_HOMES = {
    "VALUES": "values",
    "CollectiveInstrumentor": "intercept",
    "Drained": "ring_reader",
    "Recorder": "intercept",
    "RingProbe": "probe",
    "RingReader": "ring_reader",
    "RingWriter": "ring",
    "Session": "session",
    "TelemetryError": "errors",
    "TelemetrySettings": "settings",
    "agree_on_run_dir": "run_directory",
    "current_session": "current",
    "hook_ddp": "ddp_hook",
    "make_run_dir": "run_directory",
    "name_run_dir": "run_directory",
    "remove_run_dir": "run_directory",
    "start_session": "session",
    "unhook_ddp": "ddp_hook",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
    return value
