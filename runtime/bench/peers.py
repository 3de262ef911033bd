"""What others do with the same work, for `onecast bench e2e --peer NAME`.

Owns the option, the rows and ratios of what was measured, the lines about what could not be, and
the tables. How a peer is run is in `peer_transformers` and `peer_queues`; no peer is imported here.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from onecast.comm.testing import RankFailed

from . import peer_queues, peer_transformers
from .figures import REPORTED, Row, make_figure, summarize
from .peer_transformers import CONTENDERS, GENERATE, ONECAST, PEER, Contender, PeerTurn
from .terminal import open_console, short

PEERS = (PEER, *peer_queues.MODULES)

BATCH = 32  # of the ratios
RATIO = f"tokens_per_s_vs_transformers_batch{BATCH}_cpu"
_TARGET = ">= 1.5"

DEFINITIONS = {
    "tokens/s": "tokens drawn over the time from the call with the prompts to the last token; each "
    "turn is one value, and the contenders take turns on the same cores",
    "equal tokens": "sequences of which every token is what transformers' generate draws",
    RATIO: "onecast over the fastest that transformers does on at most as many cores, in the same "
    "round; the smaller of one core (TP 1) and two cores (TP 2)",
    "one way us": "from the call on rank 0 to the mapping in hand on rank 1, a decode step of 64 "
    "sequences (W2), in a busy loop",
}
TEXTS = {
    RATIO: "the smaller of the next two",
    f"{RATIO}_1_core": "TP 1 / its fastest",
    f"{RATIO}_2_cores": "TP 2 / its fastest",
    f"{RATIO}_1_thread_each": "TP 2 / its fastest of 1 thread",
}


def add_peer_option(parser: argparse.ArgumentParser) -> None:
    """`--peer NAME`, any number of times; `options.peer` is the list of names."""
    parser.add_argument(
        "--peer",
        action="append",
        choices=PEERS,
        default=[],
        help="also measure what that does with the same work, where it is installed; repeatable",
    )


def measure_peers(
    names: Sequence[str], model: Path, *, drawn: int = 48, quick: bool = False
) -> Row:
    """What goes to `report["peers"]`: rows, ratios, and one line for each peer that was left out.

    `model`: the checkpoint that all of them load; `drawn`: tokens of each sequence.
    """
    found: Row = {"rows": [], "ratios": [], "skipped": [], "versions": {}}
    for name in dict.fromkeys(names):
        if name == PEER:
            _measure_transformers(found, model, drawn, rounds=2 if quick else 9)
        else:
            _measure_queue(found, name, steps=100 if quick else 1000)
    found["definitions"] = DEFINITIONS
    return found


def _skip(found: Row, peer: str, why: str, how: str | None = None) -> None:
    found["skipped"].append({"peer": peer, "how": how, "why": why})


# ---- transformers


def _measure_transformers(found: Row, model: Path, drawn: int, rounds: int) -> None:
    why = peer_transformers.missing()
    if why is not None:
        return _skip(found, PEER, why)
    seen = peer_transformers.launch(model, BATCH, drawn, rounds)
    for contender, failure in seen.failed:
        how = f"{contender.how}, {contender.cores} cores"
        _skip(found, PEER, f"it does not run here: {failure}", how)
    found["versions"] |= seen.versions
    found["rows"] += make_rows(seen.turns)
    found["ratios"] += make_ratios(seen.turns)


def make_rows(turns: Sequence[PeerTurn]) -> list[Row]:
    """One row for each contender that had turns."""
    reference = next((turn.tokens for turn in turns if turn.contender.how == GENERATE), None)
    rows = []
    for contender in CONTENDERS:
        own = [turn for turn in turns if turn.contender == contender]
        if own:
            rates = [turn.tokens_per_s for turn in own]
            rows.append(
                {
                    "peer": contender.program,
                    "how": contender.how,
                    "batch": len(own[0].tokens),
                    "processes": contender.processes,
                    "threads": contender.threads,
                    "cores": contender.cores,
                    "tokens_per_s": _spread(rates),
                    "equal": None if reference is None else compare(own, reference),
                }
            )
    return rows


def _spread(values: Sequence[float]) -> Row:
    return {**summarize(values), "spread": [min(values), max(values)]}


def compare(turns: Sequence[PeerTurn], reference: Sequence[Sequence[int]]) -> Row:
    """How many sequences are the reference's in every turn, and the first place of the others.

    Sums of another order are rounded otherwise, and two tokens that are nearly as likely may change
    places.
    """
    places = []
    for sequence, expected in enumerate(reference):
        for turn in turns:
            pairs = zip(turn.tokens[sequence], expected, strict=True)
            places.append((sequence, next((n for n, (a, b) in enumerate(pairs) if a != b), None)))
    differing = {sequence for sequence, place in places if place is not None}
    return {
        "sequences": len(reference) - len(differing),
        "of": len(reference),
        "first_difference": min((p for _, p in places if p is not None), default=None),
    }


def make_ratios(turns: Sequence[PeerTurn]) -> list[Row]:
    """Each over the fastest way of transformers, in the same round; spreads are over rounds."""
    one, two = (
        _paired(turns, cores, [c for c in CONTENDERS if c.program == PEER and c.cores <= cores])
        for cores in (1, 2)
    )
    threads = _paired(turns, 2, [c for c in CONTENDERS if c.program == PEER and c.threads == 1])
    if not (one and two and threads):
        return []
    worst = min(one, two, key=statistics.median)
    figures = {
        RATIO: (_TARGET, worst),
        f"{RATIO}_1_core": (REPORTED, one),
        f"{RATIO}_2_cores": (REPORTED, two),
        f"{RATIO}_1_thread_each": (REPORTED, threads),
    }
    return [
        make_figure(name, target, statistics.median(values), values)
        for name, (target, values) in figures.items()
    ]


def _paired(turns: Sequence[PeerTurn], cores: int, against: Sequence[Contender]) -> list[float]:
    """onecast on so many cores over the one whose median is highest, round by round."""
    rates: dict[Contender, dict[int, float]] = {}
    for turn in turns:
        rates.setdefault(turn.contender, {})[turn.round] = turn.tokens_per_s
    own = next(c for c in CONTENDERS if c.program == ONECAST and c.cores == cores)
    there = [one for one in against if one in rates]
    if own not in rates or not there:
        return []
    best = max(there, key=lambda one: statistics.median(rates[one].values()))
    return [rates[own][n] / rates[best][n] for n in rates[own] if n in rates[best]]


# ---- queues


def _measure_queue(found: Row, peer: str, steps: int) -> None:
    why = peer_queues.missing(peer)
    if why is not None:
        return _skip(found, peer, why)
    try:
        seen = peer_queues.launch(peer, steps)
    except RankFailed as failure:  # another version than this knows, or one for other machines
        last = failure.details.strip().splitlines()[-1]
        return _skip(found, peer, f"its queue cannot be used: {last}")
    medians = {way: statistics.median(values) for way, values in seen.items()}
    for way, values in seen.items():
        row: dict[str, Any] = {"peer": way.peer or ONECAST, "beside": peer, "how": way.how}
        found["rows"].append(
            {**row, "one_way_us": {**summarize(values), "spread": _thirds(values)}}
        )
    own = next(way for way in seen if way.peer is None)
    for way, values in seen.items():
        if way.peer is not None:
            name = f"one_way_{peer}_{way.how.replace(' ', '_')}_vs_shared_memory"
            thirds = [a / b for a, b in zip(_parts(values), _parts(seen[own]), strict=True)]
            found["ratios"].append(make_figure(name, REPORTED, medians[way] / medians[own], thirds))


def _parts(values: Sequence[float]) -> list[float]:
    """The medians of the first, the middle and the last third."""
    size = max(len(values) // 3, 1)
    return [statistics.median(values[n * size : (n + 1) * size]) for n in range(3)]


def _thirds(values: Sequence[float]) -> list[float]:
    parts = _parts(values)
    return [min(parts), max(parts)]


# ---- tables


def print_peers(peers: Mapping[str, Any]) -> None:
    """What was measured, and a line for each that was left out; ratios stand with all others."""
    console = open_console(120)
    rates = [row for row in peers["rows"] if "tokens_per_s" in row]
    if rates:
        console.print(_rate_table(rates))
    queues = [row for row in peers["rows"] if "one_way_us" in row]
    if queues:
        console.print(_queue_table(queues))
    for line in skip_lines(peers):
        console.print(line, markup=False)


def skip_lines(peers: Mapping[str, Any]) -> list[str]:
    """One for each peer, or way of a peer, that was left out."""
    return [
        f"--peer {one['peer']}: {one['how'] + ': ' if one['how'] else ''}{one['why']}; left out"
        for one in peers["skipped"]
    ]


def _rate_table(rows: Sequence[Row]) -> Table:
    table = Table(
        title=f"Batch {rows[0]['batch']} on the CPU, same checkpoint and prompts: tokens/s"
    )
    table.add_column("", no_wrap=True)
    for column in ("processes x threads", "cores", "median", "low", "high", "equal tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        rate, equal = row["tokens_per_s"], row["equal"]
        table.add_row(
            f"{row['peer']}, {row['how']}",
            f"{row['processes']} x {row['threads']}",
            str(row["cores"]),
            *(short(value) for value in (rate["median"], *rate["spread"])),
            "" if equal is None else f"{equal['sequences']} of {equal['of']}",
        )
    return table


def _queue_table(rows: Sequence[Row]) -> Table:
    table = Table(title="The step of 64 decoding sequences, one way, µs")
    table.add_column("", no_wrap=True)
    for column in ("median", "p99", "low", "high"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        us = row["one_way_us"]
        cells = (us["median"], us["p99"], *us["spread"])
        table.add_row(f"{row['peer']}, {row['how']}", *(short(value) for value in cells))
    return table
