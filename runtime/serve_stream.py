"""A call's answer piece by piece: the chunks of OpenAI's streams, as server-sent events.

Owns what of a growing text may be shown already, and the shape of chunks. Knows nothing of sockets.

All texts of a choice, joined, are the text of the whole answer, and so are its log-probabilities:
what a later token could change, or a stop string could cut off, waits.
"""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import msgspec

from .detokenizer import SettledText
from .openai_body import Call
from .openai_response import logprobs_of, shown, usage_of
from .request import SampledToken
from .request import Sequence as Choice
from .tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class ChoiceStream:
    """What of one choice has been shown, and what may be next."""

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        params = choice.request.params
        self._choice = choice
        self._tokenizer = tokenizer
        self._settled = SettledText(tokenizer)
        # Characters at the end that may be the beginning of a stop string.
        self._held = max(map(len, params.stop), default=1) - 1
        self._offsets: list[int] = []  # of the tokens in `_settled`
        self._num_shown = 0  # characters
        self._num_listed = 0  # tokens, in logprobs

    def take(self, text: str | None) -> tuple[str, list[tuple[int, SampledToken]]]:
        """The next piece, perhaps empty, and (offset, token) of what `logprobs` lists with it.

        `text`: all of it, once the choice has ended.
        """
        choice = self._choice
        if text is None:
            for token in choice.output[len(self._offsets) :]:
                self._offsets.append(self._settled.add(token.token_id))
            text = self._settled.text
            end = max(self._num_shown, len(text) - self._held)
            listed: list[tuple[int, SampledToken]] = []
            if choice.request.params.logprobs is not None:
                pairs = list(zip(self._offsets, choice.output, strict=True))[self._num_listed :]
                # Offsets may go back: where bytes turn out to be no character.
                listed = list(takewhile(lambda pair: pair[0] < end, pairs))
        else:
            end = len(text)
            listed = shown(choice, text, self._tokenizer)[self._num_listed :]
        piece = text[self._num_shown : end]
        self._num_shown = end
        self._num_listed += len(listed)
        return piece, listed


class CallStream:
    """The events of one call; `first`, then `more` as often as there is news, then `last`."""

    def __init__(
        self,
        call: Call,
        tokenizer: Tokenizer,
        created_s: int,
        *,
        with_usage: bool,
        prefix_caching: bool,
    ) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._with_usage = with_usage
        self._prefix_caching = prefix_caching
        self._choices = call.choices
        self._streams = [ChoiceStream(choice, tokenizer) for choice in self._choices]
        kind = "chat.completion.chunk" if call.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{call.request_id}",
            "object": kind,
            "created": created_s,
            "model": call.model,
        }

    def first(self) -> Iterator[bytes]:
        """Who speaks, or the prompts that are to be repeated."""
        call = self._call
        for index, choice in enumerate(self._choices):
            if call.chat:
                delta = {"role": "assistant", "content": "", "refusal": None}
                yield self._chunk(index, {"delta": delta, "logprobs": None}, None)
            elif call.echo is not None:
                text = call.echo[index // choice.request.params.n]
                yield self._chunk(index, {"text": text, "logprobs": None}, None)

    def more(self, index: int, text: str | None) -> Iterator[bytes]:
        """What is new of one choice; `text`: all of it, once it has ended."""
        call, choice = self._call, self._choices[index]
        piece, listed = self._streams[index].take(text)
        if not piece and not listed and text is None:
            return
        logprobs = logprobs_of(call, choice, listed, self._tokenizer) if listed else None
        reason = None if text is None else choice.finish_reason
        if not call.chat:
            yield self._chunk(index, {"text": piece, "logprobs": logprobs}, reason)
            return
        if piece or listed:
            delta = {"content": piece}
            yield self._chunk(index, {"delta": delta, "logprobs": logprobs}, None)
        if reason is not None:
            yield self._chunk(index, {"delta": {}, "logprobs": None}, reason)

    def last(self) -> Iterator[bytes]:
        if self._with_usage:
            usage = usage_of(self._call, self._prefix_caching)
            yield event(self._head | {"choices": [], "usage": usage})
        yield DONE

    def _chunk(self, index: int, content: dict[str, Any], reason: str | None) -> bytes:
        choice = {"index": index, **content, "finish_reason": reason}
        usage = {"usage": None} if self._with_usage else {}
        return event(self._head | {"choices": [choice], **usage})
