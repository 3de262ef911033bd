"""Streams in pieces are the whole answer; messages survive any cut of the bytes."""

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_tokenizers import TOKENIZERS, save

from onecast.runtime.detokenizer import Detokenizer
from onecast.runtime.openai_body import Call
from onecast.runtime.openai_response import response_body
from onecast.runtime.request import Request, SampledToken, SamplingParams
from onecast.runtime.serve_messages import (
    Abort,
    Ask,
    Drained,
    Ended,
    News,
    Progress,
    Prompt,
    ToEngine,
    ToServer,
    Unframer,
    frame,
)
from onecast.runtime.serve_stream import DONE, CallStream
from onecast.runtime.tokenizer import Tokenizer

ROUNDS = 300


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = TOKENIZERS[request.param]()
    return Tokenizer(save(made, tmp_path_factory.mktemp("tokenizer")))


def _draw(rng: random.Random, tokenizer: Tokenizer) -> SampledToken:
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(2)]
    return SampledToken(ids[0], -rng.random(), tuple((token_id, -rng.random()) for token_id in ids))


def _events(data: bytes) -> list[Any]:
    return [msgspec.json.decode(line[6:]) for line in data.split(b"\n\n") if line]


def _run(
    rng: random.Random, tokenizer: Tokenizer, *, chat: bool, logprobs: int | None
) -> tuple[Call, list[str], list[Any], bytes]:
    """A call whose choices get random tokens until they end; the events of its stream."""
    stop = rng.choice([(), ("e",), ("th", "the q"), ("\ufffd\ufffd", " S")])
    n = rng.choice([1, 2])
    params = SamplingParams(max_tokens=rng.randint(1, 24), n=n, stop=stop, logprobs=logprobs)
    call = Call("x", chat, "m", (Request("x-0", (1,), params),), None if chat else ("echo ",))
    stream = CallStream(call, tokenizer, 7, with_usage=True, prefix_caching=True)
    sent = list(stream.first())
    open_choices = {i: Detokenizer(tokenizer, stop) for i in range(n)}
    texts = [""] * n
    while open_choices:
        for index, text in list(open_choices.items()):
            choice = call.choices[index]
            choice.output.append(_draw(rng, tokenizer))
            if rng.random() < 0.1:  # a token that ends it, of which nothing shows
                choice.finish_reason = "stop"
                texts[index] = tokenizer.decode([t.token_id for t in choice.output[:-1]])
            elif text.add(choice.output[-1].token_id):
                choice.finish_reason = "stop"
                texts[index] = text.finish()
            elif len(choice.output) == params.max_tokens:
                choice.finish_reason = "length"
                texts[index] = text.finish()
            if choice.finish_reason is not None:
                del open_choices[index]
                sent += stream.more(index, texts[index])
            elif rng.random() < 0.7:  # else the client is slow
                sent += stream.more(index, None)
    return call, texts, sent, b"".join(stream.last())


@pytest.mark.parametrize("chat", [False, True])
def test_all_pieces_together_are_the_answer_and_its_logprobs(
    tokenizer: Tokenizer, chat: bool
) -> None:
    rng = random.Random(1)
    for _ in range(ROUNDS):
        call, texts, sent, last = _run(rng, tokenizer, chat=chat, logprobs=2)
        whole = response_body(call, texts, tokenizer, 7, prefix_caching=True)
        for expected in whole["choices"]:
            chunks = [
                choice
                for event in _events(b"".join(sent))
                for choice in event["choices"]
                if choice["index"] == expected["index"]
            ]
            reasons = [chunk["finish_reason"] for chunk in chunks]
            assert reasons == [None] * (len(chunks) - 1) + [expected["finish_reason"]]
            lists = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
            if chat:
                assert chunks[0]["delta"]["role"] == "assistant"
                pieces = [chunk["delta"].get("content", "") for chunk in chunks]
                assert "".join(pieces) == expected["message"]["content"]
                content = [entry for one in lists for entry in one["content"]]
                assert content == expected["logprobs"]["content"]
            else:
                assert "".join(chunk["text"] for chunk in chunks) == expected["text"]
                for key, values in expected["logprobs"].items():
                    joined: list[Any] = [value for one in lists for value in one[key]]
                    assert joined == values, key
        assert last.endswith(DONE)
        (end,) = _events(last.removesuffix(DONE))
        assert (end["choices"], end["usage"]) == ([], whole["usage"])


def test_text_is_shown_as_soon_as_no_stop_string_can_take_it_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(TOKENIZERS["byte-level"](), tmp_path))
    params = SamplingParams(stop=("STOP",))
    call = Call("x", False, "m", (Request("x-0", (1,), params),), None)
    stream = CallStream(call, tokenizer, 7, with_usage=False, prefix_caching=False)
    shown = []
    for token_id in tokenizer.encode("say STO, no"):
        call.choices[0].output.append(SampledToken(token_id))
        for event in _events(b"".join(stream.more(0, None))):
            shown.append(event["choices"][0]["text"])
    assert "".join(shown) == "say STO,"  # three characters may begin a stop string
    assert len(shown) > 2, shown


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_messages_arrive_whole_however_their_bytes_are_cut(size: int) -> None:
    params = SamplingParams(stop=("a",), logprobs=2)
    asks = [Ask(3, [Prompt("x-0", (1, 2), params, "00-a", None)], True), Abort(3), Drained()]
    news = News(3, 0, [4], [(-0.5, ((4, -0.5), (5, float("-inf"))))], Ended("text", "stop", 16))
    for kind, messages in ((ToEngine, asks), (ToServer, [Progress([news])] * 3)):
        data = b"".join(map(frame, messages))
        unframer = Unframer(kind)
        heard = []
        for start in range(0, len(data), size):
            heard += unframer.feed(data[start : start + size])
        assert heard == messages


def test_bytes_that_are_no_message_are_an_error() -> None:
    with pytest.raises(ValueError, match="the limit is"):
        Unframer(ToEngine).feed(b"\xff" * 8)
    with pytest.raises(ValueError):
        Unframer(ToEngine).feed(frame(Progress([])))
