"""How every collective becomes visible.

    session = start_session(rank=0, local_rank=0, world_size=1, local_world_size=1,
                            engine_id="demo", settings=TelemetrySettings())
    with session.step(0, batch_size=1), session.phase("model.forward"):
        torch.distributed.all_reduce(tensor)
    print(session.metrics_url)
    session.close()

Works in any torch.distributed program. The sidecar's modules (`sidecar`, `node`, `metrics`, `otlp`,
`trace_file`) are not imported here: workers need neither prometheus_client nor opentelemetry.
"""

from .errors import TelemetryError
from .intercept import CollectiveInstrumentor, Recorder
from .probe import RingProbe
from .ring import RingWriter
from .ring_reader import Drained, RingReader
from .run_directory import make_run_dir, name_run_dir, remove_run_dir
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
    "make_run_dir",
    "name_run_dir",
    "remove_run_dir",
    "start_session",
]
