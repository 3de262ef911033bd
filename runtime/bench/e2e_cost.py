"""What a message costs by how many broadcasts and bytes it is: a model, fitted to points.

Owns the terms, the least squares, the errors that are stated with them, and the predictions for the
real protocols beside what they were measured to take. Knows nothing of how anything was sent.

    microseconds one way = round x rounds           what must be there before the next can be sent
                         + further x broadcasts that travel beside the first of their round
                         + KiB x KiB
                         + message and tensor of the encoding, pickled or framed

Fitted by least squares on relative errors, so that short messages count as much as long ones. A
quarter of the points is kept from the fit.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .e2e_ablation import HELD_OUT, POINTS, RUNS, Launch, Message, Point, ProtocolRun
from .e2e_channels import CACHED, FIXED, FUSED, SHM, TWO
from .figures import Row, p99

ROUND, FURTHER, KIB = "round", "further broadcast", "KiB"
_TERMS = {
    ROUND: "us per round of broadcasts",
    FURTHER: "us per broadcast beside the first of its round",
    KIB: "us per KiB",
    "pickled message": "us per message, metadata pickled and unpickled",
    "pickled tensor": "us per tensor of it",
    "framed message": "us per message, framed and unframed",
    "framed tensor": "us per tensor of it",
}
FORMULA = "the sum of each term's value times how often it occurs"
_ROUNDS = {TWO: 3, FIXED: 2, CACHED: 2, FUSED: 1, SHM: 0}


class Features(NamedTuple):
    """How often each term occurs, in their order."""

    rounds: float
    further: float
    kib: float
    pickled_messages: float = 0
    pickled_tensors: float = 0
    framed_messages: float = 0
    framed_tensors: float = 0


def features_of(point: Point) -> Features:
    return Features(
        point.rounds,
        point.broadcasts - point.rounds,
        point.broadcasts * point.each_bytes / 1024,
        bool(point.pickled), point.pickled, bool(point.framed), point.framed,
    )  # fmt: skip


def features_of_protocol(channel: str, message: Message) -> Features:
    """What is sent before the tensors makes a round of its own."""
    rounds = _ROUNDS[channel]
    kib = message.nbytes / 1024 if rounds else 0
    further = max(message.broadcasts - rounds, 0)
    if channel in (FUSED, SHM):
        return Features(rounds, further, kib, framed_messages=1, framed_tensors=message.tensors)
    return Features(rounds, further, kib, pickled_messages=1, pickled_tensors=message.tensors)


def fit(features: Sequence[Features], measured_us: Sequence[float]) -> list[float]:
    """The value of each term, 0 or more, such that the sum of squared relative errors is least.

    A term that comes out below 0 costs nothing that can be told from noise: it is left out, and the
    others are fitted anew. ValueError for fewer messages than terms.
    """
    matrix, measured = np.array(features, dtype=float), np.array(measured_us, dtype=float)
    if len(matrix) < len(_TERMS):
        raise ValueError(f"{len(matrix)} measurements for {len(_TERMS)} terms")
    scaled, ones = matrix / measured[:, None], np.ones(len(measured))
    values = np.zeros(len(_TERMS))
    kept = np.arange(len(_TERMS))
    while True:
        found = np.linalg.lstsq(scaled[:, kept], ones, rcond=None)[0]
        if (found >= 0).all():
            values[kept] = found
            return [float(value) for value in values]
        kept = np.delete(kept, found.argmin())


def predict(values: Sequence[float], features: Features) -> float:
    return sum(value * count for value, count in zip(values, features, strict=True))


def make_ablation(launches: Sequence[Launch]) -> Row:
    """The points, the model with its errors, the protocols beside its predictions, and the gain."""
    medians = {name: _summary(name, launches) for name in launches[0].one_way_us}
    fitted = [point for point in POINTS if point not in HELD_OUT]
    values = fit(
        [features_of(point) for point in fitted],
        [medians[point.name]["median_us"] for point in fitted],
    )
    points = [
        {
            "name": point.name,
            "broadcasts": point.broadcasts,
            "rounds": point.rounds,
            "bytes": point.broadcasts * point.each_bytes,
            "pickled": point.pickled,
            "framed": point.framed,
            **medians[point.name],
            "held_out": point in HELD_OUT,
            "predicted_us": predict(values, features_of(point)),
        }
        for point in POINTS
    ]
    terms = [
        {"name": name, "unit": unit, "value": value}
        for (name, unit), value in zip(_TERMS.items(), values, strict=True)
    ]
    errors = {
        name: _errors([point for point in points if point["held_out"] is kept])
        for name, kept in (("fit", False), ("held_out", True))
    }
    messages = launches[0].messages
    return {
        "ranks": 2,
        "backend": "gloo",
        "points": points,
        "model": {"terms": terms, "formula": FORMULA, **errors},
        "protocols": [
            _protocol(run, messages[run.name], medians[run.name], values) for run in RUNS
        ],
        "gain": _gains(messages, medians, values),
    }


def _summary(name: str, launches: Sequence[Launch]) -> Row:
    of_launch = [one.one_way_us[name] for one in launches]
    pooled = [value for values in of_launch for value in values]
    medians = [statistics.median(values) for values in of_launch]
    return {
        "median_us": statistics.median(pooled),
        "p99_us": p99(pooled),
        "n": len(pooled),
        "spread": [min(medians), max(medians)],
    }


def _errors(points: Sequence[Row]) -> Row:
    errors = [_error(point["predicted_us"], point["median_us"]) for point in points]
    return {
        "median_error": statistics.median(errors),
        "max_error": max(errors),
        "points": len(errors),
    }


def _error(predicted: float, measured: float) -> float:
    return abs(predicted - measured) / measured


def _protocol(run: ProtocolRun, message: Message, found: Row, values: Sequence[float]) -> Row:
    predicted = predict(values, features_of_protocol(run.channel, message))
    return {
        "channel": run.channel,
        "workload": run.workload,
        "broadcasts": message.broadcasts,
        "rounds": _ROUNDS[run.channel],
        "bytes": message.nbytes,
        "metadata_bytes": message.metadata_bytes,
        "tensors": message.tensors,
        "measured_us": found["median_us"],
        "spread": found["spread"],
        "n": found["n"],
        "predicted_us": predicted,
        "error": _error(predicted, found["median_us"]),
    }


def _gains(
    messages: Mapping[str, Message], medians: Mapping[str, Row], values: Sequence[float]
) -> list[Row]:
    """How the model divides what each protocol gains over two-broadcasts."""
    gains = []
    for run in RUNS:
        before = ProtocolRun(TWO, run.workload)
        if run == before:
            continue
        parts = [
            value * (old - new)
            for value, old, new in zip(
                values,
                features_of_protocol(TWO, messages[before.name]),
                features_of_protocol(run.channel, messages[run.name]),
                strict=True,
            )
        ]
        gains.append(
            {
                "workload": run.workload,
                "from": TWO,
                "to": run.channel,
                "measured_us": medians[before.name]["median_us"] - medians[run.name]["median_us"],
                "predicted_us": sum(parts),
                "fewer broadcasts us": sum(parts[:2]),
                "fewer bytes us": parts[2],
                "cheaper encoding us": sum(parts[3:]),
            }
        )
    return gains
