"""Records made by hand: what a rank's ring would hand out, without the ring."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from onecast.telemetry.ring import COLLECTIVE, pack_meta
from onecast.telemetry.ring_reader import Rows


class Names(list[str]):
    """A rank's name table; `of` gives a name's number, new ones are added."""

    def __init__(self) -> None:
        super().__init__([""])

    def of(self, name: str) -> int:
        if name not in self:
            self.append(name)
        return self.index(name)


def record(
    names: Names,
    kind: int = COLLECTIVE,
    begin: int = 0,
    end: int = 0,
    *,
    name: str = "",
    group: str = "",
    dtype: str = "float32",
    size: int = 0,
    step: int = -1,
    sequence: int = 0,
    nbytes: int = 0,
    aux: int = 0,
) -> list[int]:
    entries = (names.of(text) if text else 0 for text in (name, group, dtype))
    return [begin, end, step, pack_meta(kind, *entries, size), sequence, nbytes, aux, 1]


def collective(
    names: Names,
    sequence: int,
    begin: int,
    end: int,
    *,
    op: str = "all_reduce",
    group: str = "tp\tgroup 1",
    size: int = 2,
    **rest: Any,
) -> list[int]:
    return record(
        names, begin=begin, end=end, name=op, group=group, size=size, sequence=sequence, **rest
    )


def rows(records: Iterable[list[int]]) -> Rows:
    return np.array(list(records), np.int64).reshape(-1, 8)
