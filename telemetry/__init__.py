"""How every collective becomes visible.

    import os, torch, torch.distributed as dist
    from onecast.telemetry import TelemetrySettings, start_session

    dist.init_process_group("gloo")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")    # as torchrun sets them
    session = start_session(**{name.lower(): int(os.environ[name]) for name in names},
                            engine_id="demo", settings=TelemetrySettings.from_env())
    with session.step(0, batch_size=1), session.phase("model.forward"):
        dist.all_reduce(torch.ones(4))
    print(session.metrics_url)      # on the first rank of a node, which has the sidecar
    session.close()

Works in any torch.distributed program. `from_env` reads the OTEL_* variables. The sidecar's modules
(`sidecar`, `node`, `metrics`, `otlp`, `trace_file`) are not imported here: workers need neither
prometheus_client nor opentelemetry.
"""

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
    "make_run_dir",
    "name_run_dir",
    "remove_run_dir",
    "start_session",
]
