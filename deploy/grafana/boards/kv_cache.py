"""KV cache: who holds the blocks, what moves, how fast, and whether it thrashes."""

from typing import Any

from grafana_foundation_sdk.builders import dashboard as dashboards

from .board import board, put, row
from .panels import Limits, Query, figure, lines
from .promql import quantile, ratio, select, sum_rate

_DRIVER: dict[str, Any] = {"rank": "0"}  # the one that plans: it alone counts blocks
_PHASE = "onecast_step_phase_seconds"
_STEP = "onecast_step_duration_seconds"


def build() -> dashboards.Dashboard:
    return put(
        board(
            "kv-cache",
            "KV cache",
            """Blocks on the device and in host memory, swaps, copies and their bandwidth,
            preemption and the prefix cache.""",
        ),
        row("Now"),
        *_now(),
        row("Blocks"),
        *_blocks(),
        row("What moves"),
        *_moves(),
        row("Prefix cache and preemption"),
        *_reuse(),
    )


def _now() -> list[object]:
    return [
        figure(
            "Device blocks in use",
            _in_use("device"),
            "percentunit",
            """Near 100% is good while nothing swaps. With swaps: more --num-blocks, fewer
            sequences at a time (--max-batch-size), or shorter answers.""",
            decimals=0,
        ),
        figure(
            "Host blocks in use",
            _in_use("host"),
            "percentunit",
            """Near 100%: whoever has to leave the device now is computed again instead of swapped.
            More --num-host-blocks.""",
            limits=Limits(0.8, 0.95),
            decimals=0,
        ),
        figure(
            "Swapped",
            sum_rate("onecast_kv_blocks_moved_total", direction="=~swap_.*", **_DRIVER),
            "suffix: blocks/s",
            """Blocks in both directions. For long at a high rate: thrashing; see "Swaps' share of
            a step".""",
            decimals=0,
        ),
        figure(
            "Swaps' share of a step",
            _swap_share(()),
            "percentunit",
            """Above 5%: sequences push each other out. Fewer at a time (--max-batch-size) or more
            blocks; on a GPU swaps run beside the forward and cost less than they show here.""",
            limits=Limits(0.05, 0.2),
            decimals=1,
        ),
        figure(
            "Prefix cache hits",
            ratio(
                sum_rate("onecast_prefix_cache_tokens_total", result="hit", **_DRIVER),
                sum_rate("onecast_prefix_cache_tokens_total", **_DRIVER),
            ),
            "percentunit",
            """Share of prompt tokens that need not be computed. Low with a common system prompt:
            cached blocks are evicted before they are asked for again, or prompts differ in
            their first block.""",
            decimals=0,
        ),
        figure(
            "Sequences swapped out",
            f"sum({select('onecast_sequences', state='swapped', **_DRIVER)})",
            "none",
            """Waiting in host memory to come back. Above 0 all the time: the cache is too small
            for --max-batch-size.""",
            limits=Limits(1, 16),
        ),
    ]


def _in_use(pool: str) -> str:
    used = select("onecast_kv_blocks", pool=pool, state="used", **_DRIVER)
    return ratio(f"sum({used})", f"sum({select('onecast_kv_blocks', pool=pool, **_DRIVER)})")


def _swap_share(by: tuple[str, ...]) -> str:
    return ratio(
        sum_rate(f"{_PHASE}_sum", by, phase="=~kv[.]swap_.*"), sum_rate(f"{_STEP}_sum", by)
    )


def _blocks() -> list[object]:
    return [
        *(
            lines(
                f"Blocks {where}",
                [_blocks_in(pool, state) for state in ("used", "free")],
                "short",
                description,
                stacked=True,
                width=8,
            )
            for pool, where, description in (
                (
                    "device",
                    "on the device",
                    """Cached blocks count as free. `used` at the top with sequences waiting: the
                    cache is what limits throughput; more --num-blocks, or a smaller dtype.""",
                ),
                (
                    "host",
                    "in host memory",
                    """`used` here is swapped-out work. Full: preempted sequences are computed
                    again; more --num-host-blocks.""",
                ),
            )
        ),
        lines(
            "Sequences",
            [Query(f"sum by (state) ({select('onecast_sequences', **_DRIVER)})", "{{state}}")],
            "short",
            """running far below --max-batch-size while some wait: they wait for blocks. swapped
            and running taking turns: thrashing.""",
            width=8,
        ),
    ]


def _blocks_in(pool: str, state: str) -> Query:
    return Query(f"sum({select('onecast_kv_blocks', pool=pool, state=state, **_DRIVER)})", state)


def _moves() -> list[object]:
    return [
        lines(
            "Blocks moved",
            [
                Query(
                    sum_rate("onecast_kv_blocks_moved_total", ("direction",), **_DRIVER),
                    "{{direction}}",
                )
            ],
            "suffix: blocks/s",
            """swap_out and swap_in alike for long: the same blocks go back and forth. copy is the
            price of n > 1: one block per choice where their texts part.""",
            width=8,
        ),
        lines(
            "Bandwidth of swaps and copies",
            [Query(_bandwidth(), "{{direction}}")],
            "Bps",
            """Bytes over the time of their phase. On the CPU near memcpy's, on a GPU near the
            pinned copy's. Far below: blocks lie scattered one by one; larger --block-size.""",
            width=8,
        ),
        lines(
            "Share of a step spent on blocks, by rank",
            [
                Query(
                    ratio(
                        sum_rate(f"{_PHASE}_sum", ("rank",), phase="=~kv[.].*"),
                        sum_rate(f"{_STEP}_sum", ("rank",)),
                    ),
                    "rank {{rank}}",
                )
            ],
            "percentunit",
            """The same on all ranks, since all move the same blocks. One rank above: its memory is
            slower (NUMA, another process).""",
            width=8,
        ),
        lines(
            "Time of moving blocks in a step, p99",
            [Query(quantile(0.99, _PHASE, ("phase",), phase="=~kv[.].*"), "{{phase}}")],
            "s",
            """Of the steps that move any. Above the median step: single preemptions stall
            everyone; smaller --max-batch-tokens makes them shorter.""",
            logarithmic=True,
        ),
        lines(
            "Bytes moved",
            [
                Query(
                    sum_rate("onecast_kv_bytes_moved_total", ("direction",), **_DRIVER),
                    "{{direction}}",
                )
            ],
            "Bps",
            """Of rank 0; every rank moves its own share of each block. Compare with what the bus
            can do: a tenth of it is thrashing already.""",
        ),
    ]


def _bandwidth() -> str:
    """Bytes by direction over the time of the phase of that name."""
    time = sum_rate(f"{_PHASE}_sum", ("phase",), phase="=~kv[.].*", **_DRIVER)
    by_direction = f'label_replace({time}, "direction", "$1", "phase", "kv[.](.*)")'
    return ratio(
        sum_rate("onecast_kv_bytes_moved_total", ("direction",), **_DRIVER),
        f"sum by (direction) ({by_direction})",
    )


def _reuse() -> list[object]:
    return [
        lines(
            "Prompt tokens found or computed",
            [
                Query(
                    sum_rate("onecast_prefix_cache_tokens_total", result=result, **_DRIVER), result
                )
                for result in ("computed", "hit")
            ],
            "suffix: tok/s",
            """`hit` tokens cost nothing. None with a common prefix: --no-prefix-caching, or too
            few blocks to keep it.""",
            stacked=True,
            width=8,
        ),
        lines(
            "Cached blocks given up",
            [Query(sum_rate("onecast_kv_blocks_evicted_total", ("pool",), **_DRIVER), "{{pool}}")],
            "suffix: blocks/s",
            """Blocks that might have been found again, taken for new ones. Many while the hit
            share is low: more host blocks keep them longer.""",
            width=8,
        ),
        lines(
            "Preemptions",
            [Query(sum_rate("onecast_preemptions_total", ("kind",), **_DRIVER), "{{kind}}")],
            "suffix: /s",
            """Sequences taken off the device to make room. `recompute` means that host memory was
            full too: its work was thrown away. More blocks, or fewer sequences at a time.""",
            width=8,
        ),
    ]
