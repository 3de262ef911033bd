"""The wrapper of an operation that is called all the time, written out for each method.

Owns the source of that wrapper. It is compiled per method, as a dataclass's `__init__` is: with the
method's own parameters nothing is packed into tuples and dictionaries, and what is known of the
method (which argument is the payload, whether it is a list) is no question any more. It takes the
usual call: all parameters of the method's first signature, by position, one tensor, of a dtype seen
before on this group. Everything else goes to `general`, see `intercept_calls`.
"""

import re
from collections.abc import Callable
from typing import Any

from .ring import H_HEAD

_MISSING: Any = object()
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
        {on_gpu}
    except UNUSUAL:
        return general(handle, {usual})
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
        raise
    if work is None:
        if published[slot] == ticket:
            ends[slot] = now()
        return None
    entry = work, ticket, begin_ns, {last}
    # No thread can come in between the next two lines: the interpreter looks for others only
    # where it calls or jumps back.
    previous = latest[0]
    latest[0] = entry
    if previous is not None:
        demote(previous)
    return work
"""


def signatures(original: Callable[..., Any]) -> list[list[str]]:
    """The parameter names of each overload, self left out, as pybind11 documents them."""
    lines = (original.__doc__ or "").splitlines()
    found = [_SIGNATURE.findall(line)[1:] for line in lines if "(self: " in line]
    return found[: 1 if len(found) == 1 else None]


def write_out(
    original: Callable[..., Any], payload: int, per_rank: bool, on_gpu: bool, names: dict[str, Any]
) -> Callable[..., Any] | None:
    """The wrapper; None where the documentation of `original` does not say its parameters.

    `names`: what else the source refers to. `on_gpu`: what lies on a GPU goes to `general` too.
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
        signature=", ".join(f"{name}=MISSING" for name in [*usual, *others]),
        unusual=" or ".join(
            [f"{usual[-1]} is MISSING", *(f"{name} is not MISSING" for name in others)]
        ),
        usual=", ".join(usual),
        others=", ".join(f"{name}={name}" for name in others),
        payload=f"[value] = {usual[payload]}" if is_list else f"value = {usual[payload]}",
        times=" * size" if per_rank else "",
        on_gpu="if value.is_cuda: raise KeyError" if on_gpu else "",
        last=usual[-1],
    )

    def positional(*values: Any) -> list[Any]:
        """What was given up to the first gap."""
        given = [value is not _MISSING for value in values]
        return list(values[: given.index(False) if False in given else len(values)])

    def keywords(*values: Any, **more: Any) -> dict[str, Any]:
        named = dict(zip(usual[len(positional(*values)) :], values[len(positional(*values)) :],
                         strict=True))  # fmt: skip
        return {name: value for name, value in (named | more).items() if value is not _MISSING}

    scope = {
        **names, "original": original, "MISSING": _MISSING, "UNUSUAL": _UNUSUAL, "H_HEAD": H_HEAD,
        "positional": positional, "keywords": keywords,
    }  # fmt: skip
    # Closure cells are reached faster than globals, and another method's are not shared.
    outer = f"def bind({', '.join(scope)}):" + source.replace("\n", "\n    ") + "\n    return call"
    namespace: dict[str, Any] = {}
    exec(compile(outer, f"<wrapper of {original.__name__}>", "exec"), namespace)
    wrapper: Callable[..., Any] = namespace["bind"](**scope)
    return wrapper
