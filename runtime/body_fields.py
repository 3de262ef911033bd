"""The parameters of a JSON body, taken out one by one and checked on the way.

Owns the checks of type and range, what their messages look like, and the error that carries them
to the user in OpenAI's form. Knows nothing of which parameters there are.
"""

import math
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

_Default = TypeVar("_Default")
_SHOWN_CHARACTERS = 60


class RequestError(ValueError):
    """A request that cannot be carried out: which parameter, and why in one line."""

    status_code: Final = 400

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = "invalid_value"
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The body of OpenAI's answer to such a request."""
        return error_body(str(self), "invalid_request_error", param=self.param, code=self.code)


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object; `kind` is "invalid_request_error" or "server_error"."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class BodyFields:
    """What is left of one JSON object. null counts as absent, as it does at OpenAI.

    Every method raises RequestError; `where` is put before the names ("messages[0]").
    """

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._rest = dict(body)
        self._prefix = f"{where}." if where else ""

    def take(self, name: str) -> Any:
        """Any value, unchecked."""
        return self._rest.pop(name, None)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong_type(name, value, "not true or false")
        return value

    def integer(self, name: str, least: int, most: int | None, default: _Default) -> int | _Default:
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int:  # true is no number
            raise self._wrong_type(name, value, "not an integer")
        self._check_range(name, value, least, most)
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or (isinstance(value, float) and math.isnan(value)):
            raise self._wrong_type(name, value, "not a number")
        self._check_range(name, value, least, most)
        return float(value)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong_type(name, value, "not a text")
        return value

    def texts(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        """One text or a list of up to `most`, none of them empty, of up to `longest` characters."""
        value = self.take(name)
        if value is None:
            return ()
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self._wrong_type(name, value, "neither a text nor a list of texts")
        if len(texts) > most:
            raise self._wrong(name, f"{len(texts)} texts are above {most}")
        if not all(texts):
            raise self._wrong(name, "a text in it is empty")
        for text in texts:
            if len(text) > longest:
                raise self._wrong(name, f"a text of {len(text)} characters is above {longest}")
        return tuple(texts)

    def texts_by_name(
        self, name: str, most: int, longest_name: int, longest_text: int
    ) -> dict[str, str]:
        """An object of up to `most` texts; lengths in characters."""
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong_type(name, value, "not an object")
        if len(value) > most:
            raise self._wrong(name, f"{len(value)} entries are above {most}")
        for key, text in value.items():
            if len(key) > longest_name:
                raise self._wrong(
                    name, f"the name {show(key)} has {len(key)} characters, above {longest_name}"
                )
            if not isinstance(text, str):
                raise self._wrong_type(f"{name}.{key}", text, "not a text")
            if len(text) > longest_text:
                raise self._wrong(
                    f"{name}.{key}", f"{len(text)} characters are above {longest_text}"
                )
        return value

    def integers(self, name: str, least: int, most: int, longest: int) -> tuple[int, ...]:
        """A list of up to `longest` numbers, each from `least` to `most`."""
        value = self.take(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(entry) is int for entry in value):
            raise self._wrong_type(name, value, "not a list of integers")
        if len(value) > longest:
            raise self._wrong(name, f"{len(value)} entries are above {longest}")
        for entry in value:
            self._check_range(name, entry, least, most)
        return tuple(value)

    def refuse(self, unsupported: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse known parameters, but for values that ask for nothing."""
        for name, harmless in unsupported.items():
            value = self.take(name)
            if value is None or any(_equal(value, accepted) for accepted in harmless):
                continue
            only = " or ".join(map(show, harmless))
            raise RequestError(
                f"{self._prefix}{name}: {show(value)} is not supported"
                + (f", only {only}" if only else ""),
                param=f"{self._prefix}{name}",
                code="unsupported_parameter",
            )

    def refuse_rest(self) -> None:
        """Refuse what nobody has taken: no such parameter is known."""
        for name in self._rest:
            shown = f"{self._prefix}{name}"[:_SHOWN_CHARACTERS]
            raise RequestError(f"{shown}: unknown parameter", param=shown, code="unknown_parameter")

    def _check_range(self, name: str, value: float, least: float, most: float | None) -> None:
        if value < least:
            raise self._wrong(name, f"{show(value)} is below {least}")
        if most is not None and value > most:
            raise self._wrong(name, f"{show(value)} is above {most}")

    def _wrong(self, name: str, why: str) -> RequestError:
        return RequestError(f"{self._prefix}{name}: {why}", param=f"{self._prefix}{name}")

    def _wrong_type(self, name: str, value: Any, why: str) -> RequestError:
        return RequestError(
            f"{self._prefix}{name}: {show(value)} is {why}",
            param=f"{self._prefix}{name}",
            code="invalid_type",
        )


def show(value: Any) -> str:
    """A value as the user wrote it, in JSON, cut where it is long."""
    try:
        text = msgspec.json.encode(value).decode()
    except RecursionError:  # it was read with more of the stack left
        return "a deeply nested value"
    if isinstance(value, float) and not math.isfinite(value):
        text = repr(value)  # JSON has no name for it
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _equal(value: Any, accepted: Any) -> bool:
    # False == 0, but "stream": 0 and "presence_penalty": false are mistakes.
    return isinstance(value, bool) == isinstance(accepted, bool) and bool(value == accepted)
