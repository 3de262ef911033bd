"""OpenAI request bodies become requests.

Owns the parameters of /v1/completions and /v1/chat/completions: their names, limits and
defaults. Nothing is ignored that could change a text: parameters that are known but not supported,
and parameters nobody knows, are refused by name. Knows nothing of files or of how tokens are made.

Extensions to OpenAI's parameters: top_k, stop_token_ids, ignore_eos; and in `metadata`, which
otherwise changes nothing, the W3C trace context of the caller as `traceparent` and `tracestate`.

A request without a seed gets one derived from its `seed_key` (in a batch file: the custom_id) and
the number of the prompt in its body. So a batch that is run again, or resumed, gives the same
texts, while equal prompts within one body still differ.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .body_fields import BodyFields, RequestError, show
from .chat_messages import parse_messages
from .request import Request, SamplingParams, Sequence, TraceHeaders
from .tokenizer import Tokenizer

COMPLETIONS_URL: Final = "/v1/completions"
CHAT_URL: Final = "/v1/chat/completions"

MAX_CHOICES = 128  # n
MAX_PROMPTS = 2048  # in one body
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 4, 4096  # each of up to so many
MAX_STOP_TOKENS = 1024
MAX_TOKEN_CHARACTERS = 256  # twice the longest token of the vocabularies in use
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512  # entries, characters
DEFAULT_COMPLETION_TOKENS = 16

# Parameters that change nothing here, whatever they hold.
_IGNORED = ("user", "store", "service_tier", "safety_identifier", "prompt_cache_key")

# Known parameters we do not support, and the values that ask for nothing; null is always one.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
_UNSUPPORTED_COMPLETION = _UNSUPPORTED | {"suffix": ("",)}
_UNSUPPORTED_CHAT = _UNSUPPORTED | {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (False, True),  # nothing without tools
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


@dataclass(frozen=True, slots=True)
class BodyContext:
    """What bodies are checked against."""

    tokenizer: Tokenizer
    max_model_len: int  # prompt and output tokens together
    vocab_size: int  # of the model: prompts may be given as token ids
    model: str = ""  # named in responses where the body names no model
    limited_by: str = "context"  # or what else sets max_model_len: "KV cache"


@dataclass(frozen=True, slots=True)
class Call:
    """One body: its requests, one per prompt, and what its response needs to know."""

    request_id: str
    chat: bool
    model: str
    requests: tuple[Request, ...]
    echo: tuple[str, ...] | None  # the text of each prompt, where it is to be repeated

    @property
    def choices(self) -> list[Sequence]:
        """The sequences in the order of the response: all choices of prompt 0, then of 1 ..."""
        return [sequence for request in self.requests for sequence in request.sequences]

    @property
    def finished(self) -> bool:
        return all(request.finished for request in self.requests)


def parse_request(
    url: str, body: Mapping[str, Any], *, request_id: str, seed_key: str, context: BodyContext
) -> Call:
    """Check a body and make its requests, named `request_id`-0, -1 ...

    RequestError names the parameter, and the value and the limit where it has some.
    """
    fields = BodyFields(body)
    for name in _IGNORED:
        fields.take(name)
    model = fields.text("model") or context.model
    trace = _trace_headers(fields)
    if url == COMPLETIONS_URL:
        call = _parse_completion(fields, model, request_id, seed_key, context)
    elif url == CHAT_URL:
        call = _parse_chat(fields, model, request_id, seed_key, context)
    else:
        raise RequestError(
            f"url: {show(url)} is neither {COMPLETIONS_URL} nor {CHAT_URL}", param="url"
        )
    for request in call.requests:
        request.trace = trace
    return call


def _trace_headers(fields: BodyFields) -> TraceHeaders | None:
    """What `metadata` says of the caller's trace. Whether it is well-formed, telemetry finds out:
    W3C has a context that is not be ignored, not refused."""
    metadata = fields.texts_by_name("metadata", MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE)
    traceparent = metadata.get("traceparent")
    if traceparent is None:
        return None
    return TraceHeaders(traceparent, metadata.get("tracestate"))


def _parse_completion(
    fields: BodyFields, model: str, request_id: str, seed_key: str, context: BodyContext
) -> Call:
    fields.refuse(_UNSUPPORTED_COMPLETION)
    prompts = _parse_prompts(fields.take("prompt"), context)
    max_tokens = fields.integer("max_tokens", 1, None, None)
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS, None)
    echo = fields.boolean("echo", False)
    if echo and logprobs is not None:  # nobody computes those of a prompt
        raise _unsupported("echo", "true is not supported together with logprobs")
    best_of = fields.integer("best_of", 1, MAX_CHOICES, None)
    common = _parse_common(fields, context)
    if best_of not in (None, common["n"]):
        raise _unsupported("best_of", f"{best_of} is not supported, only n ({common['n']})")
    fields.refuse_rest()
    requests = []
    for number, (_, ids) in enumerate(prompts):
        name = "prompt" if len(prompts) == 1 else f"prompt[{number}]"
        room = _room(len(ids), max_tokens, name, "max_tokens", context)
        params = SamplingParams(
            **{"seed": _derived_seed(seed_key, number)} | common,
            max_tokens=min(DEFAULT_COMPLETION_TOKENS, room) if max_tokens is None else max_tokens,
            logprobs=logprobs,
        )
        requests.append(Request(f"{request_id}-{number}", ids, params))
    texts = None
    if echo:
        decode = context.tokenizer.decode
        texts = tuple(decode(ids) if text is None else text for text, ids in prompts)
    return Call(request_id, False, model, tuple(requests), texts)


def _parse_chat(
    fields: BodyFields, model: str, request_id: str, seed_key: str, context: BodyContext
) -> Call:
    fields.refuse(_UNSUPPORTED_CHAT)
    messages = parse_messages(fields.take("messages"))
    limit_name = "max_tokens"
    max_tokens = fields.integer(limit_name, 1, None, None)
    newer = fields.integer("max_completion_tokens", 1, None, None)
    if newer is not None:
        if max_tokens not in (None, newer):
            raise RequestError(
                f"max_completion_tokens: {newer} contradicts max_tokens: {max_tokens}",
                param="max_completion_tokens",
            )
        limit_name, max_tokens = "max_completion_tokens", newer
    logprobs = fields.boolean("logprobs", False)
    top_logprobs = fields.integer("top_logprobs", 0, MAX_LOGPROBS, 0)
    if top_logprobs and not logprobs:
        raise RequestError(
            f"top_logprobs: {top_logprobs} needs logprobs to be true", param="top_logprobs"
        )
    common = _parse_common(fields, context)
    fields.refuse_rest()
    try:
        text = context.tokenizer.render_chat(messages)
    except ValueError as error:
        raise RequestError(f"messages: {error}", param="messages") from error
    _check_length(text, "messages", context)
    # The template has written the special tokens already.
    ids = tuple(context.tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise RequestError("messages: the chat template makes no text of them", param="messages")
    room = _room(len(ids), max_tokens, "messages", limit_name, context)
    params = SamplingParams(
        **{"seed": _derived_seed(seed_key, 0)} | common,
        max_tokens=room if max_tokens is None else max_tokens,
        logprobs=top_logprobs if logprobs else None,
    )
    return Call(request_id, True, model, (Request(f"{request_id}-0", ids, params),), None)


def _check_length(text: str, name: str, context: BodyContext) -> None:
    """Refuse what is too long for certain: tokens would take 100 bytes a character to find out."""
    most = context.max_model_len * MAX_TOKEN_CHARACTERS
    if len(text) > most:
        raise RequestError(
            f"{name}: a text of {len(text)} characters is above {most}, {MAX_TOKEN_CHARACTERS} for "
            f"each token of the {context.limited_by} of {context.max_model_len}",
            param=name,
            code="context_length_exceeded",
        )


def _parse_common(fields: BodyFields, context: BodyContext) -> dict[str, Any]:
    """The parameters of both endpoints, as arguments of SamplingParams; seed only if given."""
    params: dict[str, Any] = {
        "n": fields.integer("n", 1, MAX_CHOICES, 1),
        "temperature": fields.number("temperature", 0, 2, 1.0),
        "top_p": fields.number("top_p", 0, 1, 1.0),
        # -1 and 0: off; more than there are is all of them
        "top_k": min(max(0, fields.integer("top_k", -1, None, 0)), context.vocab_size),
        "stop": fields.texts("stop", MAX_STOP_STRINGS, MAX_STOP_CHARACTERS),
        "stop_token_ids": fields.integers(
            "stop_token_ids", 0, context.vocab_size - 1, MAX_STOP_TOKENS
        ),
        "ignore_eos": fields.boolean("ignore_eos", False),
    }
    if params["top_p"] == 0:  # a nucleus without mass is the most likely token alone
        params |= {"top_p": 1.0, "top_k": 1}
    seed = fields.integer("seed", 0, MAX_SEED, None)
    return params if seed is None else params | {"seed": seed}


def _parse_prompts(value: Any, context: BodyContext) -> list[tuple[str | None, tuple[int, ...]]]:
    """(text, token ids) of every prompt; the text is None where the body gives ids."""
    if value is None:
        raise RequestError("prompt: is missing", param="prompt", code="missing_required_parameter")
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        return [_parse_prompt(value, "prompt", context)]
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"prompt: {show(value)} is neither a text nor a list of texts or token ids",
            param="prompt",
            code="invalid_type",
        )
    if len(value) > MAX_PROMPTS:
        raise RequestError(f"prompt: {len(value)} prompts are above {MAX_PROMPTS}", param="prompt")
    return [
        _parse_prompt(prompt, f"prompt[{number}]", context) for number, prompt in enumerate(value)
    ]


def _parse_prompt(
    value: Any, name: str, context: BodyContext
) -> tuple[str | None, tuple[int, ...]]:
    if isinstance(value, str):
        _check_length(value, name, context)
        ids = tuple(context.tokenizer.encode(value))
        if not ids:
            raise RequestError(f"{name}: {show(value)} is no token at all", param=name)
        return value, ids
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"{name}: {show(value)} is neither a text nor a list of token ids",
            param=name,
            code="invalid_type",
        )
    for place, token_id in enumerate(value):
        if type(token_id) is not int:  # true is no token id
            raise RequestError(
                f"{name}[{place}]: {show(token_id)} is not a token id",
                param=f"{name}[{place}]",
                code="invalid_type",
            )
        if not 0 <= token_id < context.vocab_size:
            raise RequestError(
                f"{name}[{place}]: token id {token_id} is outside of the vocabulary, "
                f"0 to {context.vocab_size - 1}",
                param=f"{name}[{place}]",
            )
    return None, tuple(value)


def _room(
    num_prompt: int, max_tokens: int | None, prompt_name: str, limit_name: str, context: BodyContext
) -> int:
    """How many tokens may follow the prompt."""
    room = context.max_model_len - num_prompt
    if room < 1:
        raise RequestError(
            f"{prompt_name}: {num_prompt} tokens leave no room in a "
            f"{context.limited_by} of {context.max_model_len}",
            param=prompt_name,
            code="context_length_exceeded",
        )
    if max_tokens is not None and max_tokens > room:
        raise RequestError(
            f"{limit_name}: {max_tokens} tokens after the {num_prompt} of {prompt_name} are above "
            f"the {context.limited_by} of {context.max_model_len}",
            param=limit_name,
            code="context_length_exceeded",
        )
    return room


def _derived_seed(seed_key: str, number: int) -> int:
    """62 bits that depend on nothing else; seed + n - 1 stays a 63-bit number."""
    digest = hashlib.blake2b(f"{number}\0{seed_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def _unsupported(name: str, why: str) -> RequestError:
    return RequestError(f"{name}: {why}", param=name, code="unsupported_parameter")
