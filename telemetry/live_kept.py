"""The kept steps as the live view lists them: each in outline, the latest ones in detail.

Owns how many details there is room for, and that each is worked out once, however many ask: a busy
engine keeps more steps between two looks than anybody can look at.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .kept_step import KeptStep
from .live_steps import step_detail, step_outline

_AROUND = 20  # bytes of JSON around an outline and a detail


@dataclass(slots=True)
class _Seen:
    kept: KeptStep
    outline: dict[str, Any]
    outline_bytes: int
    detail: dict[str, Any] | None = None
    detail_bytes: int = 0


class KeptViews:
    """Of one node. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[int, _Seen] = {}  # by step

    def of(
        self,
        kept: Sequence[KeptStep],
        names: Mapping[int, Sequence[str]],
        clock_offset_ns: int,
        room: int,
    ) -> list[dict[str, Any]]:
        """The steps in their order, in at most `room` bytes of JSON."""
        with self._lock:
            seen = [self._look(one, names, clock_offset_ns) for one in kept]
            self._seen = {one.kept.step: one for one in seen}
            room -= sum(one.outline_bytes + _AROUND for one in seen)
            found = []
            for one in reversed(seen):
                if room > 0 and one.detail is None:
                    one.detail = step_detail(one.kept, names)
                    one.detail_bytes = len(json.dumps(one.detail))
                room -= one.detail_bytes
                whole = room > 0 and one.detail is not None
                found.append({**one.outline, "detail": one.detail} if whole else one.outline)
            return found[::-1]

    def _look(
        self, kept: KeptStep, names: Mapping[int, Sequence[str]], clock_offset_ns: int
    ) -> _Seen:
        known = self._seen.get(kept.step)
        if known is not None and known.kept is kept:
            return known
        outline = step_outline(kept, names, clock_offset_ns)
        return _Seen(kept, outline, len(json.dumps(outline)))
