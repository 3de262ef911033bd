"""Finished sequences become the body of an OpenAI response.

Owns the shape of both endpoints' answers, log-probabilities included. Knows nothing of how the
tokens were made, or of where the body goes.

Tokens that add nothing to the text at its end (the token that ended it, or those of a stop string)
are counted in `usage` but have no entry in `logprobs`. A token that is not whole characters is
shown as `bytes:\\xe2\\x80`. `text_offset` counts from the beginning of the choice's own text.
"""

from collections.abc import Sequence
from typing import Any

from .detokenizer import text_offsets
from .openai_body import Call
from .request import SampledToken
from .request import Sequence as Choice
from .tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON does not have


def response_body(
    call: Call,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    created_s: int,
    *,
    prefix_caching: bool = False,
) -> dict[str, Any]:
    """The answer to a finished call; `texts` belong to `call.choices`, one each.

    With `prefix_caching`, `usage` says how many tokens of the prompts were found in the cache.
    """
    choices = []
    for index, (choice, text) in enumerate(zip(call.choices, texts, strict=True)):
        assert choice.finish_reason in ("stop", "length"), choice.finish_reason
        answer: dict[str, Any] = {"index": index}
        if call.chat:
            answer["message"] = {"role": "assistant", "content": text, "refusal": None}
            answer["logprobs"] = logprobs_of(
                call, choice, shown(choice, text, tokenizer), tokenizer
            )
        else:
            echo = "" if call.echo is None else call.echo[index // choice.request.params.n]
            answer["text"] = echo + text
            answer["logprobs"] = logprobs_of(
                call, choice, shown(choice, text, tokenizer), tokenizer
            )
        answer["finish_reason"] = choice.finish_reason
        choices.append(answer)
    return {
        "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{call.request_id}",
        "object": "chat.completion" if call.chat else "text_completion",
        "created": created_s,
        "model": call.model,
        "choices": choices,
        "usage": usage_of(call, prefix_caching),
    }


def usage_of(call: Call, prefix_caching: bool) -> dict[str, Any]:
    """Tokens of a finished call's prompts and choices."""
    prompt_tokens = sum(len(request.prompt_token_ids) for request in call.requests)
    completion_tokens = sum(len(choice.output) for choice in call.choices)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if prefix_caching:
        # A prompt is looked up once, for the choice that computes it.
        hits = (max(s.num_cached_tokens for s in request.sequences) for request in call.requests)
        usage["prompt_tokens_details"] = {"cached_tokens": sum(hits)}
    return usage


def shown(choice: Choice, text: str, tokenizer: Tokenizer) -> list[tuple[int, SampledToken]]:
    """(offset in the text, token) of the tokens that `logprobs` lists; none if it is not wanted."""
    if choice.request.params.logprobs is None:
        return []
    token_ids = [token.token_id for token in choice.output]
    tokens = list(zip(text_offsets(tokenizer, token_ids), choice.output, strict=True))
    if choice.finish_reason == "length":
        return tokens
    if tokenizer.decode(token_ids[:-1]) == text:  # one token ended it
        return tokens[:-1]
    return [(offset, token) for offset, token in tokens if offset < len(text)]


def logprobs_of(
    call: Call, choice: Choice, listed: Sequence[tuple[int, SampledToken]], tokenizer: Tokenizer
) -> dict[str, Any] | None:
    """What `logprobs` says of some of a choice's tokens, with their offsets; None: not wanted."""
    num_top = choice.request.params.logprobs
    if num_top is None:
        return None
    if call.chat:
        return _chat_logprobs([token for _, token in listed], tokenizer)
    return {
        "tokens": [tokenizer.token_text(token.token_id) for _, token in listed],
        "token_logprobs": [_logprob(token) for _, token in listed],
        "top_logprobs": [_top_by_text(token, tokenizer) for _, token in listed]
        if num_top
        else None,
        "text_offset": [offset for offset, _ in listed],
    }


def _top_by_text(token: SampledToken, tokenizer: Tokenizer) -> dict[str, float]:
    """The most likely tokens and the chosen one. Of tokens with equal text: the likeliest."""
    top: dict[str, float] = {}
    for token_id, logprob in (*token.top_logprobs, (token.token_id, _logprob(token))):
        top.setdefault(tokenizer.token_text(token_id), max(logprob, _LEAST_LOGPROB))
    return top


def _chat_logprobs(tokens: Sequence[SampledToken], tokenizer: Tokenizer) -> dict[str, Any]:
    content = [
        _chat_entry(token.token_id, _logprob(token), tokenizer)
        | {
            "top_logprobs": [
                _chat_entry(token_id, logprob, tokenizer)
                for token_id, logprob in token.top_logprobs
            ]
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, _LEAST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _logprob(token: SampledToken) -> float:
    assert token.logprob is not None, "logprobs were asked for"
    return max(token.logprob, _LEAST_LOGPROB)
