"""How a record is told to people: calls, sizes, durations and lists of ranks, as plain words.

Owns the wording that hangs, disagreements and the flight table share. Trusts nothing it is given:
names come out of files that a dying process wrote, so an index without a name and a character
that a terminal would obey are shown as such.
"""

from collections.abc import Iterable, Sequence

from .ring import META, NBYTES, SEQUENCE, meta_dtype, meta_group, meta_name


def printable(text: str) -> str:
    """`text` with every character that is not printable as "?" (tabs stay: they part groups)."""
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in text)


def name_at(names: Sequence[str], index: int) -> str:
    return names[index] if 0 <= index < len(names) else f"name {index}?"


def label_of(entry: str) -> str:
    """The label in a group's name entry "label\\tunique name"."""
    return entry.partition("\t")[0]


def unique_of(entry: str) -> str:
    """The unique name in a group's entry; the entry itself if it has no two parts."""
    label, _, unique = entry.partition("\t")
    return unique or label


def size_text(nbytes: int) -> str:
    """16384 -> "16 KiB"."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def seconds_text(duration_ns: int) -> str:
    """12_000_000_000 -> "12.0 s"; minutes and more stay seconds: they are compared."""
    return f"{duration_ns / 1e9:.1f} s"


def duration_text(duration_ns: int) -> str:
    """1_230_000 -> "1.23 ms": with the unit that fits."""
    value = duration_ns / 1000
    if abs(value) < 999.5:
        return f"{value:.3g} us"
    return f"{value / 1e3:.3g} ms" if abs(value) < 999.5e3 else f"{value / 1e6:.1f} s"


def ranks_text(ranks: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"; [3] -> "rank 3"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = [
        str(first) if first == last else f"{first}{', ' if last == first + 1 else '-'}{last}"
        for first, last in runs
    ]
    several = len(runs) > 1 or any(first != last for first, last in runs)
    return f"rank{'s' if several else ''} {', '.join(parts)}"


def call_text(row: Sequence[int], names: Sequence[str], *, group: bool = True) -> str:
    """A COLLECTIVE record: "all_reduce #360 (tp, 16 KiB)"; without group: "all_reduce (16 KiB)"."""
    meta = int(row[META])
    details = [size_text(int(row[NBYTES]))] if row[NBYTES] else []
    number = ""
    if group:
        details.insert(0, label_of(name_at(names, meta_group(meta))))
        number = f" #{int(row[SEQUENCE])}"
    inside = f" ({', '.join(details)})" if details else ""
    return f"{name_at(names, meta_name(meta))}{number}{inside}"


def dtype_text(row: Sequence[int], names: Sequence[str]) -> str:
    """The dtype of a COLLECTIVE record; empty where it has none."""
    index = meta_dtype(int(row[META]))
    return name_at(names, index) if index else ""
