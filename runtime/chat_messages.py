"""The messages of a chat request, checked and made plain for a template.

Owns which roles and contents there are. Knows nothing of templates or of the other parameters.
"""

from typing import Any

from .body_fields import BodyFields, RequestError, show

ROLES = ("system", "developer", "user", "assistant")


def parse_messages(value: Any) -> list[dict[str, str]]:
    """The conversation as templates expect it: role, content as one text, perhaps a name.

    RequestError names the message that is wrong.
    """
    if value is None:
        raise RequestError(
            "messages: is missing", param="messages", code="missing_required_parameter"
        )
    if not isinstance(value, list) or not value:
        raise _wrong_type("messages", value, "not a list of messages")
    return [_parse_message(entry, f"messages[{number}]") for number, entry in enumerate(value)]


def _parse_message(entry: Any, where: str) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise _wrong_type(where, entry, "not an object")
    fields = BodyFields(entry, where)
    role = fields.text("role")
    if role not in ROLES:
        raise RequestError(
            f"{where}.role: {show(role)} is not one of {', '.join(ROLES)}", param=f"{where}.role"
        )
    message = {"role": role, "content": _content(fields.take("content"), f"{where}.content")}
    speaker = fields.text("name")
    if speaker is not None:
        message["name"] = speaker
    # Assistant messages copied from an earlier response carry these, empty.
    fields.refuse(
        {"refusal": (), "tool_calls": ([],), "function_call": (), "audio": (), "annotations": ([],)}
    )
    fields.refuse_rest()
    return message


def _content(value: Any, where: str) -> str:
    """Text as it is; text parts joined by line breaks, as most templates know only one text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _wrong_type(where, value, "neither a text nor a list of text parts")
    return "\n".join(_text_part(part, f"{where}[{place}]") for place, part in enumerate(value))


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise _wrong_type(where, part, "not an object")
    fields = BodyFields(part, where)
    kind = fields.take("type")
    if kind != "text":
        raise RequestError(
            f'{where}.type: {show(kind)} is not supported, only "text"',
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    text = fields.text("text")
    if text is None:
        raise _wrong_type(f"{where}.text", text, "not a text")
    fields.refuse_rest()
    return text


def _wrong_type(where: str, value: Any, why: str) -> RequestError:
    return RequestError(f"{where}: {show(value)} is {why}", param=where, code="invalid_type")
