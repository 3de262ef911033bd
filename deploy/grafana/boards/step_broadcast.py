"""Step broadcast: what the one frame of a step weighs, how it travels, and what it costs."""

from typing import Any

from grafana_foundation_sdk.builders import dashboard as dashboards

from .board import board, put, row
from .panels import Limits, Query, figure, heat, lines
from .promql import buckets, mean, quantile, ratio, sum_rate

_SENT: dict[str, Any] = {"direction": "published", "chosen": ()}
_STEP = "onecast_step_duration_seconds"
_PHASE = "onecast_step_phase_seconds"


def build() -> dashboards.Dashboard:
    return put(
        board(
            "step-broadcast",
            "Step broadcast",
            """The driver sends each step to all ranks as one frame: its size, how many broadcasts
            carry it, and the time of encoding, publishing, waiting and decoding.""",
        ),
        row("Now"),
        *_now(),
        row("Time"),
        *_time(),
        row("Size and number"),
        *_size(),
        row("Distributions"),
        *_heat_maps(),
    )


def _now() -> list[object]:
    frames = sum_rate("onecast_frame_bytes_count", **_SENT)
    return [
        figure(
            "Frames",
            frames,
            "suffix: /s",
            """One a step. Zero while sequences run: the driver is stuck; see Collectives, in
            flight.""",
            decimals=0,
        ),
        figure(
            "Broadcasts per step",
            _broadcasts_per_frame(),
            "none",
            """1 over a process group, 0 over shared memory. Above 1 for long: frames keep
            outgrowing the agreed capacity, or --channel names one of the protocols that frames
            replace.""",
            limits=Limits(1.05, 1.5),
            decimals=2,
        ),
        figure(
            "Frame, mean",
            mean("onecast_frame_bytes", **_SENT),
            "bytes",
            """Grows with sequences and with block tables. Hundreds of KiB: larger blocks
            (--block-size) make shorter tables.""",
        ),
        figure(
            "Metadata, mean",
            mean("onecast_frame_metadata_bytes", **_SENT),
            "bytes",
            """What is neither tensor nor padding; about 50 bytes once layouts are known. Much more
            for long: layouts change from step to step, each is sent in full when it first
            appears.""",
            limits=Limits(200, 1000),
        ),
        figure(
            "Sending, p99",
            quantile(0.99, "onecast_frame_seconds", chosen=(), part="publish"),
            "s",
            """Writing the frame to the ring, or the broadcast. Milliseconds over shared memory: a
            receiver is four frames behind, or cores are short.""",
        ),
        figure(
            "Share of the driver's step",
            ratio(
                sum_rate(f"{_PHASE}_sum", chosen=(), phase="step.publish", rank="0"),
                sum_rate(f"{_STEP}_sum", chosen=(), rank="0"),
            ),
            "percentunit",
            """Above 10%: on one host use shared memory (--channel auto); between hosts look at
            frame size and round trip.""",
            limits=Limits(0.05, 0.1),
            decimals=1,
        ),
    ]


def _broadcasts_per_frame(by: tuple[str, ...] = ()) -> str:
    return ratio(
        sum_rate("onecast_frame_broadcasts_total", by, **_SENT),
        sum_rate("onecast_frame_bytes_count", by, **_SENT),
    )


def _time() -> list[object]:
    frame = "onecast_frame_seconds"
    return [
        lines(
            "Driver: encode and publish, mean",
            [Query(mean(frame, ("part",), chosen=(), part="=~encode|publish"), "{{part}}")],
            "s",
            """encode checks and copies the plan; it grows with sequences and tensors. publish is
            the ring or the broadcast. publish far above encode between hosts: the network; on
            one host: why not shared memory?""",
            stacked=True,
            width=8,
        ),
        lines(
            "Workers: wait, mean, by rank",
            [Query(mean(frame, ("rank",), part="wait"), "rank {{rank}}")],
            "s",
            """From asking for the frame to having it: mostly the time in which the driver samples
            and schedules. Long with a quick driver: raise --spin, or the process sleeps through
            the frame.""",
            width=8,
        ),
        lines(
            "Workers: decode, mean, by rank",
            [Query(mean(frame, ("rank",), part="decode"), "rank {{rank}}")],
            "s",
            """Views of the frame, so tens of microseconds whatever its size. Milliseconds: layouts
            change every step, or the rank is short of a core.""",
            width=8,
        ),
        lines(
            "p99, by part",
            [Query(quantile(0.99, frame, ("part",)), "{{part}}")],
            "s",
            """The slow frames. wait is long whenever the driver is; encode or decode long: a pause
            of the process (garbage collection, another process on its core).""",
            logarithmic=True,
            width=8,
        ),
        lines(
            "Share of a step, by rank",
            [
                Query(
                    ratio(
                        sum_rate(f"{_PHASE}_sum", ("rank",), phase="=~step[.](publish|receive)"),
                        sum_rate(f"{_STEP}_sum", ("rank",)),
                    ),
                    "rank {{rank}}",
                )
            ],
            "percentunit",
            """On rank 0 the cost of sending. On the others waiting for the driver is part of it:
            what they could save is at most the difference to rank 0's schedule, sample and
            commit.""",
            maximum=1,
            width=8,
        ),
        lines(
            "Time between steps' frames",
            [
                Query(quantile(0.5, _STEP, chosen=(), rank="0"), "step, p50"),
                Query(quantile(0.99, _STEP, chosen=(), rank="0"), "step, p99"),
                Query(mean(frame, chosen=(), part="publish"), "of it publish, mean"),
            ],
            "s",
            """The distance between the lines is how little the broadcast matters. When they come
            near each other, steps are too short for this channel: larger batches, or shared
            memory.""",
            exemplars=True,
            logarithmic=True,
            width=8,
        ),
    ]


def _size() -> list[object]:
    return [
        lines(
            "Broadcasts per frame, by channel",
            [Query(_broadcasts_per_frame(("channel",)), "{{channel}}")],
            "none",
            """1 over a process group in steady state, 0 over shared memory. Above 1: see
            "Broadcasts per step".""",
            width=8,
        ),
        lines(
            "Frame size",
            [
                Query(quantile(0.5, "onecast_frame_bytes", **_SENT), "p50"),
                Query(quantile(0.99, "onecast_frame_bytes", **_SENT), "p99"),
                Query(mean("onecast_frame_bytes", **_SENT), "mean"),
            ],
            "bytes",
            """Exact to buckets that double. p99 far above the mean: steps with prompts carry their
            tokens; smaller chunks (--max-batch-tokens) even it out.""",
            logarithmic=True,
            width=8,
        ),
        lines(
            "Metadata's share of a frame",
            [
                Query(
                    ratio(
                        sum_rate("onecast_frame_metadata_bytes_sum", **_SENT),
                        sum_rate("onecast_frame_bytes_sum", **_SENT),
                    ),
                    "metadata",
                )
            ],
            "percentunit",
            """High only for tiny frames. High for large ones: lists or strings travel in the plan
            that should be tensors.""",
            width=8,
        ),
    ]


def _heat_maps() -> list[object]:
    return [
        heat(
            "Frame size",
            buckets("onecast_frame_bytes", **_SENT),
            "bytes",
            """Two bands are normal: decode steps below, steps with prompts above. A band that
            climbs: block tables grow with the sequences.""",
            scheme="Viridis",
        ),
        heat(
            "Workers' wait for the frame",
            buckets("onecast_frame_seconds", part="wait"),
            "s",
            """A narrow band is a steady driver. A tail upwards: the driver stalls now and then
            (tokenizing, a long schedule, swapping).""",
            scheme="Viridis",
        ),
    ]
