"""`opentelemetry-instrument`'s way in: the only file that knows opentelemetry.instrumentation.

Loaded through the entry point `opentelemetry_instrumentor`, in every Python process of a program.
"""

from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]
    BaseInstrumentor,
)

from .auto import instrument, uninstrument


class TorchDistributedInstrumentor(BaseInstrumentor):  # type: ignore[misc, unused-ignore]
    """Records every collective of torch.distributed, from the first process group on.

    All settings come from OTEL_* and ONECAST_* variables (`environment` lists them).
    """

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("torch >= 2.11",)

    def _instrument(self, **kwargs: Any) -> None:
        instrument()

    def _uninstrument(self, **kwargs: Any) -> None:
        uninstrument()
