"""Chat templates: a conversation becomes the prompt text its model was trained on.

Owns finding the template of a model directory (chat_template.jinja, else the chat_template of
tokenizer_config.json) and rendering it in a sandbox, with the settings, filters and globals that
Hugging Face transformers gives to templates. Knows nothing of tokens, and nothing of which
messages a request may hold.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Templates may write any of these, so they are passed wherever the model directory names one.
_TOKEN_VARIABLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTemplate:
    """The template of one model directory."""

    def __init__(self, source: str, origin: Path, variables: Mapping[str, str]) -> None:
        self._source = source
        self._origin = origin
        self._variables = dict(variables)
        self._compiled: jinja2.Template | None = None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that ends where the assistant begins to speak.

        ValueError: the template does not compile, or refuses these messages.
        """
        try:
            # Compiled at the first chat: a run of plain completions never needs it to be right.
            if self._compiled is None:
                self._compiled = _environment().from_string(self._source)
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
            )
        except Exception as error:  # foreign code: whatever it raises concerns this chat alone
            raise ValueError(f"{self._origin}: {_one_line(error)}") from error


def find_chat_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of `directory`, whose tokenizer_config.json holds `config`; None: it has none.

    ValueError names the file with a template that cannot be read.
    """
    variables = _token_variables(directory, config)
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), file, variables)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: {_one_line(error)}") from error
    source = config.get("chat_template")
    origin = directory / "tokenizer_config.json"
    if isinstance(source, list):
        source = _default_of(source, origin)
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{origin}: chat_template is {type(source).__name__}, not text or a list")
    return ChatTemplate(source, origin, variables)


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in `file`, or {} where there is no such file; ValueError names a broken one."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds {type(value).__name__}, not an object")
    return value


def _default_of(named: list[Any], origin: Path) -> str:
    """The template called "default" of a list of named ones."""
    try:
        templates = {entry["name"]: entry["template"] for entry in named}
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{origin}: chat_template is a list of something else than name and template"
        ) from error
    if not isinstance(templates.get("default"), str):
        names = ", ".join(map(repr, templates))
        raise ValueError(f"{origin}: no chat_template is named 'default', only {names or 'none'}")
    default: str = templates["default"]
    return default


def _token_variables(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    variables: dict[str, str] = {}
    # Older directories name their special tokens in a file of its own.
    older = read_json_object(directory / "special_tokens_map.json")
    for name in _TOKEN_VARIABLES:
        token = config.get(name) or older.get(name)
        if isinstance(token, dict):  # written out with its flags
            token = token.get("content")
        if isinstance(token, str):
            variables[name] = token
    return variables


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter of this name, it does not escape for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
