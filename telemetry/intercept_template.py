"""The wrappers of what is called all the time, written out: an operation, and the wait for it.

Owns the source of those wrappers. An operation's is compiled per method, as a dataclass's
`__init__` is: with the method's own parameters nothing is packed into tuples and dictionaries, and
what is known of the method (which argument is the payload, whether it is a list) is no question any
more. It takes the usual call: all parameters of the method's first signature, one tensor, of a
dtype seen before on this group. Everything else goes to `general`, see `intercept_calls`. None is
taken for an argument that was not given: no parameter of these methods can be None but a time-out,
whose default it is.

About 1 us for a call and its wait, of which 0.1 are clocks, 0.15 the store of the record and 0.1
the tensor's dtype and size; with calls of `begin` and `end` and weak references it was over 2.
"""

import re
from collections.abc import Callable
from typing import Any

from .ring import H_HEAD

_UNUSUAL = (KeyError, ValueError, AttributeError, RuntimeError, TypeError)
_SIGNATURE = re.compile(r"(?:\(|, )(\w+): ")

_SOURCE = """
def call(handle, {signature}):
    if {unusual}:
        return general(handle, *positional({usual}), **keywords({usual}, {others}))
    try:
        next_numbers, metas, size = known[id(handle)]
        {payload}
        meta = metas[value.dtype]
        nbytes = value.nbytes{times}
        {captured}
    except UNUSUAL:
        return general(handle, {usual})
    {issued}
    ticket, sequence = next_numbers()
    slot = ticket - 1 & mask
    words[H_HEAD] = ticket  # before the slot changes: a reader a lap behind must know
    begin_ns = now()
    open_record(
        mapping, records + (slot << 6), begin_ns, step[0], meta, sequence, nbytes, ticket
    )
    try:
        work = original(handle, {usual})
    except BaseException as error:
        refused(handle, ticket, error)
        {dropped}
        raise
    {finished}
    if work is None:
        if published[slot] == ticket:
            ends[slot] = now()
        return None
    {marked}
    entry = work, ticket, begin_ns, {last}
    # No thread can come in between the next two lines: the interpreter looks for others only
    # where it calls or jumps back.
    previous = latest[0]
    latest[0] = entry
    if previous is not None:
        demote(previous)
    return work
"""

_CAPTURED = "if value.is_cuda and log.open: raise KeyError"  # into a CUDA graph, maybe
_TIMED = {
    "issued": "mark = timer.issued(handle, value) if value.is_cuda else None",
    "dropped": "if mark is not None: timer.dropped(mark)",
    "finished": (
        "if mark is not None: timer.finished(mark, work, step[0], begin_ns, meta, sequence, nbytes)"
    ),
    "marked": "if mark is not None: return opened(work, ticket, begin_ns, {last}, mark)",
}

_WAIT = """
def wait(work, timeout=None):
    entry = latest[0]
    if entry is None or timeout is not None:
        return slow(work) if timeout is None else slow(work, timeout)
    its_work, ticket, begin_ns, options = entry
    if its_work is not work:
        return slow(work)
    latest[0] = None
    hidden = now() - begin_ns
    try:
        result = original(work)
    except BaseException as error:
        raised(work, entry, error)
        raise
    end_ns = now()
    slot = ticket - 1 & mask
    if end_ns - begin_ns < no_lap_ns or published[slot] == ticket:
        if hidden > at_once_ns and getattr(options, "asyncOp", True):
            auxes[slot] = hidden << 8
        ends[slot] = end_ns
    return result
"""

# No two records of a process are written faster one after the other: a slot cannot have passed to
# another record sooner than the whole ring can be written.
_FASTEST_RECORD_NS = 100


def signatures(original: Callable[..., Any]) -> list[list[str]]:
    """The parameter names of each overload, self left out, as pybind11 documents them."""
    lines = (original.__doc__ or "").splitlines()
    found = [_SIGNATURE.findall(line)[1:] for line in lines if "(self: " in line]
    return found[: 1 if len(found) == 1 else None]


def write_out(
    original: Callable[..., Any], payload: int, per_rank: bool, names: dict[str, Any]
) -> Callable[..., Any] | None:
    """The wrapper; None where the documentation of `original` does not say its parameters.

    `names`: what else the source refers to; `timer` and `log` are None where there are none.
    """
    overloads = signatures(original)
    if not overloads or len(overloads[0]) <= max(payload, 1):
        return None
    usual = overloads[0]
    others = list(dict.fromkeys(name for one in overloads[1:] for name in one if name not in usual))
    is_list = f"{usual[payload]}: collections.abc.Sequence" in (original.__doc__ or "") or (
        f"{usual[payload]}: list" in (original.__doc__ or "").lower()
    )
    source = _SOURCE.format(
        signature=", ".join(f"{name}=None" for name in [*usual, *others]),
        unusual=" or ".join([f"{usual[-1]} is None", *(f"{name} is not None" for name in others)]),
        usual=", ".join(usual),
        others=", ".join(f"{name}={name}" for name in others),
        payload=f"[value] = {usual[payload]}" if is_list else f"value = {usual[payload]}",
        times=" * size" if per_rank else "",
        captured=_CAPTURED if names["log"] is not None else "",
        last=usual[-1],
        **{
            place: line.format(last=usual[-1]) if names["timer"] is not None else ""
            for place, line in _TIMED.items()
        },
    )

    def positional(*values: Any) -> list[Any]:
        """What was given up to the first gap."""
        given = [value is not None for value in values]
        return list(values[: given.index(False) if False in given else len(values)])

    def keywords(*values: Any, **more: Any) -> dict[str, Any]:
        named = dict(zip(usual[len(positional(*values)) :], values[len(positional(*values)) :],
                         strict=True))  # fmt: skip
        return {name: value for name, value in (named | more).items() if value is not None}

    scope = {
        **names, "original": original, "UNUSUAL": _UNUSUAL, "H_HEAD": H_HEAD,
        "positional": positional, "keywords": keywords,
    }  # fmt: skip
    return _compile("call", source, scope)


def write_out_wait(original: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """The wrapper of Work.wait, for the latest Work; `names` as above."""
    lap_ns = (names["mask"] + 1) * _FASTEST_RECORD_NS
    return _compile("wait", _WAIT, {**names, "original": original, "no_lap_ns": lap_ns})


def _compile(name: str, source: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """The function `name`. `scope` is its globals: a closure's cells are copied at every call."""
    original = scope["original"]
    exec(compile(source, f"<wrapper of {original.__name__}>", "exec"), scope)
    wrapper: Callable[..., Any] = scope[name]
    return wrapper
