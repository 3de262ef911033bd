"""onecast's Grafana dashboards, as code: each module builds one board."""

from . import collectives, kv_cache, overview, requests, step_broadcast
from .board import as_json

BOARDS = {
    "overview": overview.build,
    "collectives": collectives.build,
    "step-broadcast": step_broadcast.build,
    "kv-cache": kv_cache.build,
    "requests": requests.build,
}

__all__ = ["BOARDS", "as_json"]
