"""Requests: what somebody who asked has to wait for."""

from typing import Any

from grafana_foundation_sdk.builders import dashboard as dashboards

from .board import board, put, row
from .panels import Limits, Query, figure, heat, lines
from .promql import buckets, mean, quantile, ratio, select, sum_rate

_TOTAL = "onecast_request_duration_seconds"
_QUEUE = "onecast_request_queue_seconds"
_FIRST = "onecast_request_time_to_first_token_seconds"
_PER_TOKEN = "onecast_request_time_per_output_token_seconds"
_DRIVER: dict[str, Any] = {"rank": "0"}


def build() -> dashboards.Dashboard:
    return put(
        board(
            "requests",
            "Requests",
            """Queue time, time to the first token, time per further token, and how requests end. A
            series moves when a request ends: what runs for minutes shows minutes later.""",
        ),
        row("Now"),
        *_now(),
        row("Latency"),
        *_latency(),
        row("Distributions"),
        *_heat_maps(),
        row("Load"),
        *_load(),
    )


def _now() -> list[object]:
    return [
        figure(
            "Requests",
            sum_rate("onecast_requests_total"),
            "reqps",
            "That ended, per second. Falls while some wait: see Overview for what the steps do.",
            decimals=1,
        ),
        figure(
            "First token, p50",
            quantile(0.5, _FIRST),
            "s",
            """Queue and prompt together. If most of it is queue: more cache or more replicas; if
            not: larger chunks for prompts (--max-batch-tokens).""",
        ),
        figure(
            "First token, p99",
            quantile(0.99, _FIRST),
            "s",
            """Far above the median: long prompts, or bursts. The points of that time on Overview
            lead to traces of steps, linked with the requests in them.""",
        ),
        figure(
            "Per output token, p50",
            quantile(0.5, _PER_TOKEN),
            "s",
            """About one step. Above it: the sequence was preempted, or prompts of others take
            turns with it; smaller chunks (--max-batch-tokens).""",
        ),
        figure(
            "Queue's share",
            ratio(sum_rate(f"{_QUEUE}_sum"), sum_rate(f"{_TOTAL}_sum")),
            "percentunit",
            """Of the time of requests. A batch that is queued at once spends most of it here. For
            a server: above a third, add capacity or refuse earlier.""",
            limits=Limits(0.33, 0.66),
            decimals=0,
        ),
        figure(
            "Aborted or failed",
            ratio(
                "("
                + sum_rate("onecast_requests_total", finish_reason="!~.*(stop|length).*")
                + " or vector(0))",
                sum_rate("onecast_requests_total"),
            ),
            "percentunit",
            """Aborted by whoever asked, or failed. Above 0: the result lines, or the server's log,
            have the reason.""",
            limits=Limits(0.01, 0.05),
            decimals=1,
        ),
    ]


def _quantiles(histogram: str) -> list[Query]:
    named = ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
    return [Query(quantile(share, histogram), name) for share, name in named]


def _latency() -> list[object]:
    return [
        lines(
            "Time to the first token",
            _quantiles(_FIRST),
            "s",
            """Rises with the queue: capacity. Rises alone: prompts are longer or their chunks too
            small.""",
            logarithmic=True,
        ),
        lines(
            "Time per output token",
            _quantiles(_PER_TOKEN),
            "s",
            """After the first. p99 far from p50: some are preempted (see KV cache), or share steps
            with long prompts: smaller chunks.""",
            logarithmic=True,
        ),
        lines(
            "Time in the queue",
            _quantiles(_QUEUE),
            "s",
            """From arrival to the first step. Grows without end: more comes in than is answered;
            refuse earlier or add a replica.""",
            logarithmic=True,
        ),
        lines(
            "Where a request's time goes, mean",
            [
                Query(mean(_QUEUE), "queue"),
                Query(f"{mean(_FIRST)} - ({mean(_QUEUE)})", "prompt, to the first token"),
                Query(f"{mean(_TOTAL)} - ({mean(_FIRST)})", "further tokens"),
            ],
            "s",
            """Of the requests that ended. Treat the largest layer: queue - capacity; prompt -
            chunk size and prefix cache; further tokens - the step's time, see Overview.""",
            stacked=True,
        ),
    ]


def _heat_maps() -> list[object]:
    return [
        heat(
            title,
            buckets(histogram),
            "s",
            description,
            width=12,
        )
        for title, histogram, description in (
            (
                "Time to the first token",
                _FIRST,
                """Two bands: short and long prompts, or a queue that comes and goes. Those of the
                upper one are in the traces of that time's steps.""",
            ),
            (
                "Duration of requests",
                _TOTAL,
                """Spreads with the length of answers. A band that climbs at equal lengths: steps
                became slower.""",
            ),
        )
    ]


def _load() -> list[object]:
    return [
        lines(
            "Sequences",
            [Query(f"sum by (state) ({select('onecast_sequences', **_DRIVER)})", "{{state}}")],
            "short",
            """waiting above 0 all the time: the engine is full. running below --max-batch-size
            then: blocks are short, see KV cache.""",
            width=6,
        ),
        lines(
            "Requests that ended, by why",
            [Query(sum_rate("onecast_requests_total", ("finish_reason",)), "{{finish_reason}}")],
            "reqps",
            """abort: whoever asked went away, perhaps after waiting too long. An error type: look
            into the result lines.""",
            stacked=True,
            width=6,
        ),
        lines(
            "Answers over HTTP, by status",
            [Query(sum_rate("onecast_http_responses_total", ("status",)), "{{status}}")],
            "reqps",
            """Of a server. 429: the queue is full, 503: it starts or ends; more replicas. 499: the
            client went away first. 400: one of the clients asks for what there is not.""",
            stacked=True,
            width=6,
        ),
        lines(
            "Tokens of an answer, mean",
            [
                Query(
                    ratio(
                        sum_rate("onecast_tokens_total", kind="generated", **_DRIVER),
                        sum_rate("onecast_requests_total", **_DRIVER),
                    ),
                    "generated",
                ),
                Query(
                    ratio(
                        sum_rate("onecast_tokens_total", kind="prompt", **_DRIVER),
                        sum_rate("onecast_requests_total", **_DRIVER),
                    ),
                    "prompt",
                ),
            ],
            "short",
            """Explains durations: twice as long for answers twice as long is no fault. Exact only
            over times longer than a request.""",
            width=6,
        ),
    ]
