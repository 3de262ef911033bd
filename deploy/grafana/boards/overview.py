"""Overview: is it up, how fast is it, and where does a step's time go?"""

from typing import Any

from grafana_foundation_sdk.builders import dashboard as dashboards

from .board import board, put, row
from .panels import Limits, Query, figure, lines
from .promql import in_range, mean, quantile, ratio, select, sum_rate

_DRIVER: dict[str, Any] = {"rank": "0"}
_WORKERS: dict[str, Any] = {"rank": "!=0"}


def build() -> dashboards.Dashboard:
    return put(
        board(
            "overview",
            "Overview",
            "Throughput, steps and where their time goes. Begin here; the other boards go deeper.",
        ),
        row("Now"),
        *_now(),
        row("Throughput"),
        *_throughput(),
        row("Where a step's time goes"),
        *_steps(),
        row("What it may be waiting for"),
        *_pressure(),
    )


def _now() -> list[object]:
    step = "onecast_step_duration_seconds"
    publish = {"phase": "step.publish", **_DRIVER}
    return [
        figure(
            "Ranks that run",
            f"sum({select('onecast_up')})",
            "none",
            """Fewer than the world size: a rank has died or never started. `onecast flight` shows
            what each rank did last; the launcher's log has its exit status.""",
            limits=Limits(1, 1, falling=True),
            width=3,
        ),
        figure(
            "Tokens generated",
            sum_rate("onecast_tokens_total", kind="generated", **_DRIVER),
            "suffix: tok/s",
            """Falls while requests wait: look at the step's time below. Falls because none wait:
            there is nothing to do.""",
            decimals=0,
            width=3,
        ),
        figure(
            "Steps",
            sum_rate(f"{step}_count", **_DRIVER),
            "suffix: steps/s",
            """Steps of all engines that are chosen. Zero with sequences running: see Collectives,
            in flight.""",
            decimals=0,
            width=3,
        ),
        figure(
            "Step, p99",
            quantile(0.99, step, **_DRIVER),
            "s",
            """Far above the median: single steps are slow. Their traces are kept: follow an
            exemplar of "Step duration" and see which phase grew.""",
            width=3,
        ),
        figure(
            "Sending the frame",
            ratio(
                sum_rate("onecast_step_phase_seconds_sum", **publish),
                sum_rate(f"{step}_sum", **_DRIVER),
            ),
            "percentunit",
            """Share of the driver's step spent on the one broadcast. Above 10%: see the board Step
            broadcast; on one host use the shared-memory channel, else look at the frame's size.""",
            limits=Limits(0.05, 0.1),
            decimals=1,
            width=3,
        ),
        figure(
            "Exposed waiting",
            ratio(
                sum_rate("onecast_step_exposed_communication_seconds_sum"),
                sum_rate(f"{step}_sum"),
            ),
            "percentunit",
            """Exposed communication: share of the steps in which ranks did nothing but wait for
            collectives. High: see Collectives, whether one rank is late or the transfer itself
            is slow.""",
            limits=Limits(0.3, 0.5),
            decimals=0,
            width=3,
        ),
        figure(
            "Trouble found",
            " + ".join(
                f"({in_range(name)})"
                for name in (
                    "onecast_hangs_total",
                    "onecast_desyncs_total",
                    "onecast_collective_errors_total",
                    "onecast_worker_restarts_total",
                )
            ),
            "none",
            """Hangs, desyncs, failed collectives and restarts of the ranks in the time shown.
            Above 0: the sidecar's log and /hangs.json name the ranks and what each waits for;
            `onecast flight` shows the first disagreement.""",
            limits=Limits(1, 1),
            instant=True,
            width=3,
        ),
        figure(
            "Lost by telemetry",
            in_range("onecast_telemetry_dropped_total", reason="!=trace_file_full"),
            "short",
            """Records, steps and spans lost in the time shown. Above 0: the reason is the series'
            label `reason`; an OTLP endpoint that is slow or down is the usual one. Metrics stay
            exact but for signal="records".""",
            limits=Limits(1, 1000),
            instant=True,
            width=3,
        ),
    ]


def _throughput() -> list[object]:
    return [
        lines(
            "Tokens per second",
            [Query(sum_rate("onecast_tokens_total", ("kind",), **_DRIVER), "{{kind}}")],
            "suffix: tok/s",
            """Prompt tokens come in bursts, generated ones steadily. Generated tokens that drop
            whenever a prompt is computed: make chunks smaller (--max-batch-tokens). Steps far
            below their limit while sequences wait: make them larger.""",
        ),
        lines(
            "Requests that ended",
            [Query(sum_rate("onecast_requests_total", ("finish_reason",)), "{{finish_reason}}")],
            "reqps",
            """By why they ended. `abort` or an error type: the result lines say why. Only
            `length`: max_tokens cuts answers off.""",
        ),
    ]


def _steps() -> list[object]:
    step, phases = "onecast_step_duration_seconds", "onecast_step_phase_seconds_sum"
    return [
        lines(
            "Step duration",
            [
                Query(quantile(q, step, **_DRIVER), name)
                for q, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
            ],
            "s",
            """The driver's steps; the points are steps with a trace. When p99 leaves p50 behind,
            click the highest point: the trace shows the phase, rank and collective.""",
            exemplars=True,
            logarithmic=True,
            width=8,
        ),
        lines(
            "Driver: mean time per step, by phase",
            [_per_step(phases, _DRIVER)],
            "s",
            """What rank 0 does in a step. model.forward should be nearly all. `schedule` large:
            too many sequences are queued in small blocks; step.publish large: see Step
            broadcast; kv.swap_* large: see KV cache.""",
            stacked=True,
            width=8,
        ),
        lines(
            "Workers: mean time per step, by phase",
            [_per_step(phases, _WORKERS)],
            "s",
            """What the other ranks do. step.receive is the time in which they wait for the driver:
            it should be about what the driver spends on schedule, sample and commit. More: the
            channel is slow.""",
            stacked=True,
            width=8,
        ),
        lines(
            "Share of a step spent waiting for collectives",
            [
                Query(
                    ratio(
                        sum_rate("onecast_step_exposed_communication_seconds_sum", ("rank",)),
                        sum_rate(f"{step}_sum", ("rank",)),
                    ),
                    "rank {{rank}}",
                )
            ],
            "percentunit",
            """Ranks far apart: the one that waits least is the one the others wait for; see
            arrival skew on Collectives. All high: the transfer is slow, or there are too many
            ranks for this model.""",
            maximum=1,
        ),
        lines(
            "Tokens in a step",
            [
                Query(
                    ratio(
                        sum_rate("onecast_tokens_total", **_DRIVER),
                        sum_rate(f"{step}_count", **_DRIVER),
                    ),
                    "tokens per step",
                ),
                Query(f"max({select('onecast_step_tokens_limit')})", "limit"),
            ],
            "short",
            """How full steps are. Far below the limit with sequences waiting: the cache is full
            (see KV cache). Always at the limit: prompts are cut into chunks; a higher
            --max-batch-tokens takes fewer steps for them, at the price of slower ones.""",
            logarithmic=True,
        ),
    ]


def _per_step(phases: str, ranks: dict[str, Any]) -> Query:
    """Seconds of a mean step by phase: they add up to its duration."""
    steps = sum_rate("onecast_step_duration_seconds_count", **ranks)
    whole = ratio(sum_rate(phases, ("phase",), **ranks), steps, "ignoring (phase) group_left ()")
    return Query(whole, "{{phase}}")


def _pressure() -> list[object]:
    used = select("onecast_kv_blocks", state="used", **_DRIVER)
    blocks = select("onecast_kv_blocks", **_DRIVER)
    return [
        lines(
            "Sequences",
            [Query(f"sum by (state) ({select('onecast_sequences', **_DRIVER)})", "{{state}}")],
            "short",
            """`waiting` grows: more comes in than is answered. `swapped` above 0 for long: the
            cache is too small for what runs; see KV cache.""",
            width=8,
        ),
        lines(
            "Key/value cache in use",
            [Query(f"sum by (pool) ({used}) / sum by (pool) ({blocks})", "{{pool}}")],
            "percentunit",
            """`device` near 100% is good as long as nothing swaps. With swaps: more --num-blocks,
            or fewer sequences at a time (--max-batch-size).""",
            maximum=1,
            width=8,
        ),
        lines(
            "Time in the queue and to the first token",
            [
                Query(mean("onecast_request_queue_seconds"), "queue, mean"),
                Query(mean("onecast_request_time_to_first_token_seconds"), "first token, mean"),
            ],
            "s",
            """The gap between the two is computing the prompt. Queue large: too little cache or
            too small a batch. Gap large: long prompts in small chunks. See Requests.""",
            width=8,
        ),
    ]
