"""The plain numbers a session publishes: gauges and running totals, one 64-bit word each.

The name is what `session.set_value` takes; metric and labels are what `/metrics` shows. A total
is set to its running sum, not incremented: the runtime keeps the count, telemetry shows it.
"""

from typing import NamedTuple


class Value(NamedTuple):
    name: str
    metric: str  # without the prefix onecast_
    labels: dict[str, str]
    counter: bool


# What a server of requests answers; 499: the client had gone before the answer's end.
HTTP_STATUSES = (200, 400, 404, 405, 408, 413, 429, 499, 500, 503)


def _values() -> list[Value]:
    found = []
    for pool in ("device", "host"):
        for state in ("used", "free"):
            labels = {"pool": pool, "state": state}
            found.append(Value(f"kv_blocks.{pool}.{state}", "kv_blocks", labels, False))
    for direction in ("swap_in", "swap_out", "copy"):
        labels = {"direction": direction}
        found.append(Value(f"kv_blocks_moved.{direction}", "kv_blocks_moved", labels, True))
        found.append(Value(f"kv_bytes_moved.{direction}", "kv_bytes_moved", labels, True))
    for state in ("waiting", "running", "swapped"):
        found.append(Value(f"sequences.{state}", "sequences", {"state": state}, False))
    for kind in ("prompt", "generated"):
        found.append(Value(f"tokens.{kind}", "tokens", {"kind": kind}, True))
    for result in ("hit", "computed"):
        labels = {"result": result}
        found.append(Value(f"prefix_cache_tokens.{result}", "prefix_cache_tokens", labels, True))
    for kind in ("swap", "recompute"):
        found.append(Value(f"preemptions.{kind}", "preemptions", {"kind": kind}, True))
    for pool in ("device", "host"):
        found.append(Value(f"kv_blocks_evicted.{pool}", "kv_blocks_evicted", {"pool": pool}, True))
    found.append(Value("step_tokens_limit", "step_tokens_limit", {}, False))
    for status in HTTP_STATUSES:
        found.append(
            Value(f"http_responses.{status}", "http_responses", {"status": str(status)}, True)
        )
    return found


VALUES: tuple[Value, ...] = tuple(_values())
VALUE_INDEX: dict[str, int] = {value.name: index for index, value in enumerate(VALUES)}

METRIC_HELP = {
    "kv_blocks": "Key/value cache blocks by pool and state",
    "kv_blocks_moved": "Key/value cache blocks swapped in, swapped out and copied",
    "kv_bytes_moved": "Bytes of this rank's part of the blocks swapped in, swapped out and copied",
    "kv_blocks_evicted": "Cached blocks whose content was given up so that they could be reused",
    "preemptions": "Sequences taken off the device: swapped to the host, or to be computed again",
    "step_tokens_limit": "Most tokens that one step may compute",
    "http_responses": "Answers of the HTTP server to completions and chats, by status",
    "sequences": "Sequences (choices of requests) by state",
    "tokens": "Tokens of prompts computed and tokens generated",
    "prefix_cache_tokens": "Tokens of admitted sequences found in the prefix cache, or computed",
}
