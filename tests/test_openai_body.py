"""Request bodies are checked by name, value and limit; responses have OpenAI's shape."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, save

from onecast.runtime.body_fields import RequestError
from onecast.runtime.detokenizer import Detokenizer
from onecast.runtime.openai_body import (
    CHAT_URL,
    COMPLETIONS_URL,
    MAX_TOKEN_CHARACTERS,
    BodyContext,
    Call,
    parse_request,
)
from onecast.runtime.openai_response import response_body
from onecast.runtime.request import SampledToken, SamplingParams, Status, TraceHeaders
from onecast.runtime.tokenizer import Tokenizer

CONTEXT_TOKENS = 100
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}"
    "{% if m.name is defined %}({{ m.name }}){% endif %}<|im_end|>{% endfor %}"
    "{% if messages[-1].content == 'bad' %}{{ raise_exception('bad words') }}{% endif %}"
)
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> BodyContext:
    directory: Path = save(byte_level(), tmp_path_factory.mktemp("model"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tokenizer = Tokenizer(directory)
    return BodyContext(tokenizer, CONTEXT_TOKENS, tokenizer.vocab_size + 8, "tiny")


def completion(context: BodyContext, **body: Any) -> Call:
    body = {"model": "m", "prompt": "Say", **body}
    return parse_request(COMPLETIONS_URL, body, request_id="r", seed_key="a", context=context)


def chat(context: BodyContext, **body: Any) -> Call:
    body = {"model": "m", "messages": USER, **body}
    return parse_request(CHAT_URL, body, request_id="r", seed_key="a", context=context)


def params(call: Call) -> SamplingParams:
    return call.requests[0].params


def error_of(parse: Any, context: BodyContext, **body: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(context, **body)
    error = caught.value
    assert "\n" not in str(error) and len(str(error)) < 240
    assert error.body() == {
        "error": {
            "message": str(error),
            "type": "invalid_request_error",
            "param": error.param,
            "code": error.code,
        }
    }
    return error


def test_defaults_are_those_of_openai(context: BodyContext) -> None:
    call = completion(context)
    seed = params(call).seed
    assert params(call) == SamplingParams(max_tokens=16, n=1, temperature=1.0, seed=seed)
    assert params(chat(context)) == SamplingParams(
        max_tokens=CONTEXT_TOKENS - len(chat(context).requests[0].prompt_token_ids), seed=seed
    ), "a chat may use the whole context"
    nothing = dict.fromkeys(("max_tokens", "n", "temperature", "top_p", "stop", "seed", "stream"))
    assert params(completion(context, **nothing)) == params(call), "null means the default"
    without_model = parse_request(
        COMPLETIONS_URL, {"prompt": "Say"}, request_id="r", seed_key="a", context=context
    )
    assert (call.model, without_model.model) == ("m", "tiny")


def test_every_parameter_reaches_the_sampler(context: BodyContext) -> None:
    common = {
        "n": 3,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "seed": 11,
        "stop": ["a", "bc"],
        "stop_token_ids": [4, 5],
        "ignore_eos": True,
        "user": "someone",
        "metadata": {"a": "1"},
    }
    expected = SamplingParams(
        max_tokens=5,
        n=3,
        temperature=0.0,
        top_p=0.5,
        top_k=7,
        seed=11,
        stop=("a", "bc"),
        stop_token_ids=(4, 5),
        ignore_eos=True,
        logprobs=2,
    )
    assert params(completion(context, **common, max_tokens=5, logprobs=2, best_of=3)) == expected
    more = {"logprobs": True, "top_logprobs": 2, "response_format": {"type": "text"}}
    assert params(chat(context, **common, max_completion_tokens=5, **more)) == expected
    assert params(chat(context, **common, max_tokens=5, **more)) == expected
    assert params(chat(context, logprobs=True)).logprobs == 0
    assert params(completion(context, stop="x")).stop == ("x",)
    assert params(completion(context, top_k=-1)).top_k == 0
    assert params(completion(context, top_k=10**30)).top_k == context.vocab_size, "all of them"
    zero_mass = params(completion(context, top_p=0))
    assert (zero_mass.top_p, zero_mass.top_k) == (1.0, 1), "the most likely token alone"


def test_the_trace_context_in_metadata_reaches_every_request(context: BodyContext) -> None:
    metadata = {"traceparent": "00-ab", "tracestate": "a=1", "other": "x"}
    call = completion(context, prompt=["a", "dog"], metadata=metadata)
    assert [request.trace for request in call.requests] == [TraceHeaders("00-ab", "a=1")] * 2
    (request,) = chat(context, metadata={"traceparent": "00-ab"}).requests
    assert request.trace == TraceHeaders("00-ab")
    for nothing in ({}, {"tracestate": "a=1"}, None):
        (request,) = completion(context, metadata=nothing).requests
        assert request.trace is None


@pytest.mark.parametrize(
    ("metadata", "param", "told"),
    [
        ("x", "metadata", "is not an object"),
        ({"a": 1}, "metadata.a", "1 is not a text"),
        ({"traceparent": None}, "metadata.traceparent", "null is not a text"),
        ({"k" * 65: "v"}, "metadata", "65 characters, above 64"),
        ({"a": "v" * 513}, "metadata.a", "513 characters are above 512"),
        ({str(n): "v" for n in range(17)}, "metadata", "17 entries are above 16"),
    ],
)
def test_metadata_is_texts_by_name(
    context: BodyContext, metadata: Any, param: str, told: str
) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        completion(context, metadata=metadata)
    assert caught.value.param == param


def test_each_prompt_of_a_body_is_a_request(context: BodyContext) -> None:
    encode = context.tokenizer.encode
    ids = encode("dog")
    for prompt, expected in [
        ("fox", [encode("fox")]),
        (["fox", "dog"], [encode("fox"), ids]),
        (ids, [ids]),
        ([ids, [3]], [ids, [3]]),
        (["fox", ids], [encode("fox"), ids]),
    ]:
        call = completion(context, prompt=prompt, n=2)
        assert [list(r.prompt_token_ids) for r in call.requests] == expected
        assert [r.request_id for r in call.requests] == [f"r-{i}" for i in range(len(expected))]
        assert [(c.request, c.index) for c in call.choices] == [
            (r, k) for r in call.requests for k in range(2)
        ]
        assert call.echo is None
        texts = completion(context, prompt=prompt, echo=True).echo
        assert texts == tuple(map(context.tokenizer.decode, expected))


def test_a_missing_seed_depends_on_the_custom_id_and_the_prompt_alone(
    context: BodyContext,
) -> None:
    def seeds(key: str, **body: Any) -> list[int]:
        call = parse_request(
            COMPLETIONS_URL,
            {"prompt": ["a", "a"], **body},
            request_id="r",
            seed_key=key,
            context=context,
        )
        return [request.params.seed for request in call.requests]

    first, second = seeds("x")
    assert seeds("x", temperature=0.5) == [first, second]
    assert len({first, second, *seeds("y")}) == 4
    assert all(0 <= seed < 2**62 for seed in (first, second))
    assert seeds("x", seed=7) == [7, 7], "each prompt alone would give the same"
    # Resumed runs of later versions must draw the same.
    assert (first, second) == (2476047184556440162, 911637680195883546)


@pytest.mark.parametrize(
    ("body", "message", "param", "code"),
    [
        ({"temperature": -1}, "temperature: -1 is below 0", "temperature", "invalid_value"),
        ({"temperature": 2.5}, "temperature: 2.5 is above 2", "temperature", "invalid_value"),
        ({"temperature": "hot"}, 'temperature: "hot" is not a number', None, "invalid_type"),
        ({"temperature": True}, "temperature: true is not a number", None, "invalid_type"),
        ({"temperature": float("nan")}, "temperature: nan is not a number", None, "invalid_type"),
        ({"temperature": float("inf")}, "temperature: inf is above 2", None, "invalid_value"),
        ({"temperature": 10**400}, "temperature: 1000", None, "invalid_value"),
        ({"top_p": 1.01}, "top_p: 1.01 is above 1", None, "invalid_value"),
        ({"top_p": -0.1}, "top_p: -0.1 is below 0", None, "invalid_value"),
        ({"top_k": -2}, "top_k: -2 is below -1", None, "invalid_value"),
        ({"n": 0}, "n: 0 is below 1", None, "invalid_value"),
        ({"n": 129}, "n: 129 is above 128", None, "invalid_value"),
        ({"n": True}, "n: true is not an integer", None, "invalid_type"),
        ({"n": 1.0}, "n: 1.0 is not an integer", None, "invalid_type"),
        ({"max_tokens": 0}, "max_tokens: 0 is below 1", None, "invalid_value"),
        ({"max_tokens": -3}, "max_tokens: -3 is below 1", None, "invalid_value"),
        ({"seed": -1}, "seed: -1 is below 0", None, "invalid_value"),
        ({"seed": 2**63}, f"seed: {2**63} is above {2**63 - 1}", None, "invalid_value"),
        ({"stop": ["a"] * 5}, "stop: 5 texts are above 4", None, "invalid_value"),
        ({"stop": ""}, "stop: a text in it is empty", None, "invalid_value"),
        ({"stop": ["a", "b" * 4097]}, "stop: a text of 4097 char", None, "invalid_value"),
        ({"stop_token_ids": [5] * 1025}, "stop_token_ids: 1025 entries", None, "invalid_value"),
        ({"stop_token_ids": [2**64]}, f"stop_token_ids: {2**64} is", None, "invalid_value"),
        ({"stop": ["a", 1]}, 'stop: ["a",1] is neither a text', None, "invalid_type"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: -1 is below 0", None, "invalid_value"),
        ({"stop_token_ids": 5}, "stop_token_ids: 5 is not a list", None, "invalid_type"),
        ({"ignore_eos": 1}, "ignore_eos: 1 is not true or false", None, "invalid_type"),
        ({"model": 5}, "model: 5 is not a text", None, "invalid_type"),
        ({"stream": True}, "stream: true is not supported, only false", None, "unsupported"),
        ({"stream": 0}, "stream: 0 is not supported, only false", None, "unsupported"),
        ({"presence_penalty": 0.5}, "presence_penalty: 0.5 is not", None, "unsupported"),
        ({"frequency_penalty": False}, "frequency_penalty: false is not", None, "unsupported"),
        ({"logit_bias": {"5": 1}}, 'logit_bias: {"5":1} is not supported', None, "unsupported"),
        ({"max_token": 5}, "max_token: unknown parameter", None, "unknown_parameter"),
        ({"x" * 500: 1}, "xxx", "x" * 60, "unknown_parameter"),
    ],
)
@pytest.mark.parametrize("parse", [completion, chat])
def test_wrong_parameters_are_named_with_value_and_limit(
    parse: Any, body: dict[str, Any], message: str, param: str, code: str, context: BodyContext
) -> None:
    error = error_of(parse, context, **body)
    assert str(error).startswith(message)
    assert error.param == (param or next(iter(body)))
    assert error.code is not None and error.code.startswith(code)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": None}, "prompt: is missing"),
        ({"prompt": 5}, "prompt: 5 is neither a text nor a list of texts or token ids"),
        ({"prompt": []}, "prompt: [] is neither a text"),
        ({"prompt": ""}, 'prompt: "" is no token at all'),
        ({"prompt": ["a", ""]}, 'prompt[1]: "" is no token at all'),
        ({"prompt": [[3], []]}, "prompt[1]: [] is neither a text nor a list of token ids"),
        ({"prompt": [True]}, "prompt[0]: true is neither"),
        ({"prompt": [3, True]}, "prompt[1]: true is not a token id"),
        ({"prompt": [3, "a"]}, 'prompt[1]: "a" is not a token id'),
        ({"prompt": [[3], [4, -1]]}, "prompt[1][1]: token id -1 is outside of the vocabulary"),
        ({"prompt": ["a"] * 2049}, "prompt: 2049 prompts are above 2048"),
        ({"prompt": [5] * 100}, "prompt: 100 tokens leave no room in a context of 100"),
        ({"prompt": ["a", [5] * 200]}, "prompt[1]: 200 tokens leave no room"),
        ({"prompt": [5] * 90, "max_tokens": 11}, "max_tokens: 11 tokens after the 90 of prompt"),
        ({"max_completion_tokens": 5}, "max_completion_tokens: unknown parameter"),
        ({"messages": USER}, "messages: unknown parameter"),
        ({"logprobs": 21}, "logprobs: 21 is above 20"),
        ({"logprobs": True}, "logprobs: true is not an integer"),
        ({"echo": True, "logprobs": 1}, "echo: true is not supported together with logprobs"),
        ({"best_of": 2}, "best_of: 2 is not supported, only n (1)"),
        ({"suffix": "end"}, 'suffix: "end" is not supported, only ""'),
    ],
)
def test_wrong_completions_are_refused(
    body: dict[str, Any], message: str, context: BodyContext
) -> None:
    assert str(error_of(completion, context, **body)).startswith(message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": None}, "messages: is missing"),
        ({"messages": []}, "messages: [] is not a list of messages"),
        ({"messages": "hi"}, 'messages: "hi" is not a list of messages'),
        ({"messages": ["hi"]}, 'messages[0]: "hi" is not an object'),
        ({"messages": [{"content": "a"}]}, "messages[0].role: null is not one of system, "),
        ({"messages": [*USER, {"role": "tool"}]}, 'messages[1].role: "tool" is not one of'),
        ({"messages": [{"role": "user"}]}, "messages[0].content: null is neither a text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: 5 is neither"),
        ({"messages": [USER[0] | {"mood": 1}]}, "messages[0].mood: unknown parameter"),
        ({"messages": [USER[0] | {"name": 1}]}, "messages[0].name: 1 is not a text"),
        (
            {"messages": [USER[0] | {"tool_calls": [1]}]},
            "messages[0].tool_calls: [1] is not supported, only []",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'messages[0].content[0].type: "image_url" is not supported, only "text"',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text: null is not a text",
        ),
        ({"messages": [{"role": "user", "content": "bad"}]}, "messages: "),
        ({"messages": [{"role": "user", "content": "+" * 200}]}, "messages: 2"),
        ({"max_tokens": 99}, "max_tokens: 99 tokens after the "),
        ({"max_completion_tokens": 99}, "max_completion_tokens: 99 tokens after the "),
        (
            {"max_tokens": 5, "max_completion_tokens": 6},
            "max_completion_tokens: 6 contradicts max_tokens: 5",
        ),
        ({"prompt": "hi"}, "prompt: unknown parameter"),
        ({"echo": True}, "echo: unknown parameter"),
        ({"logprobs": 5}, "logprobs: 5 is not true or false"),
        ({"top_logprobs": 2}, "top_logprobs: 2 needs logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: 21 is above 20"),
        ({"tools": [{}]}, "tools: [{}] is not supported, only []"),
        (
            {"response_format": {"type": "json_object"}},
            'response_format: {"type":"json_object"} is not supported, only {"type":"text"}',
        ),
    ],
)
def test_wrong_chats_are_refused(body: dict[str, Any], message: str, context: BodyContext) -> None:
    assert str(error_of(chat, context, **body)).startswith(message)


def test_lengths_beyond_the_context_have_openais_code(context: BodyContext) -> None:
    for body in ({"prompt": [5] * 100}, {"max_tokens": 100}):
        assert error_of(completion, context, **body).code == "context_length_exceeded"
    call = completion(context, prompt=[5] * 90)
    assert params(call).max_tokens == 10, "a default is no wish: it shrinks to what fits"
    assert params(completion(context, prompt=[5] * 90, max_tokens=10)).max_tokens == 10


def test_texts_too_long_for_any_tokens_are_refused_before_they_are_looked_at(
    context: BodyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = CONTEXT_TOKENS * MAX_TOKEN_CHARACTERS
    told = f"a text of {most + 1} characters is above {most}, 256 for each token of the context"
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", None)
        text = "a" * (most + 1)
        error = error_of(completion, context, prompt=[text])
        assert (error.code, error.param) == ("context_length_exceeded", "prompt[0]")
        assert str(error).startswith(f"prompt[0]: {told}")
        patch.setattr(Tokenizer, "render_chat", lambda *_: text)
        assert str(error_of(chat, context)).startswith(f"messages: {told}")
    assert "characters" not in str(error_of(completion, context, prompt="a" * most))


def test_chats_go_through_the_template(context: BodyContext) -> None:
    call = chat(
        context,
        messages=[
            {"role": "system", "content": "Be brief.", "name": "ops"},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
        ],
    )
    [request] = call.requests
    text = context.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system:Be brief.(ops)<|im_end|><|im_start|>user:a\nb<|im_end|>"
        "<|im_start|>assistant:c<|im_end|>"
    )


def test_a_value_too_deep_to_show_is_refused_like_any_other(context: BodyContext) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert str(error_of(completion, context, n=nested)) == (
        "n: a deeply nested value is not an integer"
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = (
    "model prompt messages max_tokens max_completion_tokens n temperature top_p top_k seed stop "
    "logprobs top_logprobs echo best_of stream logit_bias tools response_format stop_token_ids "
    "ignore_eos user suffix presence_penalty other"
).split()


@settings(max_examples=400, deadline=None)
@given(
    url=st.sampled_from([COMPLETIONS_URL, CHAT_URL]),
    body=st.dictionaries(st.sampled_from(NAMES), json_values, max_size=4),
)
def test_any_body_gives_requests_or_one_clear_error(
    url: str, body: dict[str, Any], context: BodyContext
) -> None:
    start = {"prompt": "Say"} if url == COMPLETIONS_URL else {"messages": USER}
    try:
        call = parse_request(url, start | body, request_id="r", seed_key="a", context=context)
    except RequestError as error:
        assert error.param is not None
        assert str(error).startswith(error.param.split("[")[0].split(".")[0])
        return
    for request in call.requests:
        p = request.params
        assert 1 <= p.max_tokens <= CONTEXT_TOKENS - len(request.prompt_token_ids)
        assert 0 <= p.temperature <= 2 and 0 < p.top_p <= 1 and p.top_k >= 0 and p.n >= 1


def finish(
    call: Call, context: BodyContext, outputs: list[list[SampledToken]], reason: str
) -> list[str]:
    """Give each choice its output; returns the texts as the engine makes them."""
    texts = []
    for choice, output in zip(call.choices, outputs, strict=True):
        choice.output = output
        choice.token_ids += [token.token_id for token in output]
        choice.status, choice.finish_reason = Status.FINISHED, reason
        detokenizer = Detokenizer(context.tokenizer, choice.request.params.stop)
        for token in output:
            if detokenizer.add(token.token_id):
                choice.finish_reason = "stop"
        texts.append(detokenizer.finish())
    assert call.finished
    return texts


def sampled(ids: list[int], top: int = 0) -> list[SampledToken]:
    return [
        SampledToken(i, -0.5 - place, tuple((i + k, -0.5 - place - k) for k in range(top)))
        for place, i in enumerate(ids)
    ]


def test_a_completion_has_openais_shape(context: BodyContext) -> None:
    encode = context.tokenizer.encode
    call = completion(context, prompt=["fox", encode("dog")], n=2, echo=True)
    outputs = [sampled(encode(text)) for text in (" one", " two", " three", " four")]
    texts = finish(call, context, outputs, "length")
    body = response_body(call, texts, context.tokenizer, 1234)
    prompt_tokens = len(encode("fox")) + len(encode("dog"))
    completion_tokens = sum(map(len, outputs))
    assert body == {
        "id": "cmpl-r",
        "object": "text_completion",
        "created": 1234,
        "model": "m",
        "choices": [
            {"index": index, "text": text, "logprobs": None, "finish_reason": "length"}
            for index, text in enumerate(["fox one", "fox two", "dog three", "dog four"])
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def test_a_chat_has_openais_shape(context: BodyContext) -> None:
    call = chat(context)
    texts = finish(
        call, context, [[*sampled(context.tokenizer.encode("Hi!")), SampledToken(3)]], "stop"
    )
    body = response_body(call, texts, context.tokenizer, 1234)
    assert (body["id"], body["object"]) == ("chatcmpl-r", "chat.completion")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]


def test_completion_logprobs_tell_tokens_and_where_they_begin(context: BodyContext) -> None:
    tokenizer = context.tokenizer
    ids = [*tokenizer.encode("a€b"), 1]
    call = completion(context, logprobs=2)
    output = [*sampled(ids[:-1]), SampledToken(1, float("-inf"))]
    b = ids[-2]
    output[-2] = SampledToken(b, -3.0, ((ids[0], -0.1), (ids[1], float("-inf"))))
    texts = finish(call, context, [output], "stop")
    [choice] = response_body(call, texts, tokenizer, 0)["choices"]
    assert choice["text"] == "a€b"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", *(rf"bytes:\x{x}" for x in ("e2", "82", "ac")), "b"]
    assert logprobs["text_offset"] == [0, 1, 1, 1, 2]
    assert logprobs["token_logprobs"] == [-0.5, -1.5, -2.5, -3.5, -3.0]
    assert logprobs["top_logprobs"][-1] == {"a": -0.1, r"bytes:\xe2": -9999.0, "b": -3.0}
    call = completion(context, logprobs=0)
    texts = finish(call, context, [output], "length")
    [choice] = response_body(call, texts, tokenizer, 0)["choices"]
    assert choice["logprobs"]["top_logprobs"] is None
    assert choice["logprobs"]["token_logprobs"][-1] == -9999.0, "JSON has no infinity"
    assert choice["logprobs"]["tokens"][-1] == "</s>"


def test_chat_logprobs_tell_bytes_and_alternatives(context: BodyContext) -> None:
    call = chat(context, logprobs=True, top_logprobs=1)
    euro = context.tokenizer.encode("€")[0]
    texts = finish(call, context, [[SampledToken(euro, -1.0, ((3, -0.5),))]], "length")
    [choice] = response_body(call, texts, context.tokenizer, 0)["choices"]
    assert choice["message"]["content"] == "\ufffd"
    alternative = {"token": "<|im_end|>", "logprob": -0.5, "bytes": list(b"<|im_end|>")}
    assert choice["logprobs"] == {
        "content": [
            {
                "token": r"bytes:\xe2",
                "logprob": -1.0,
                "bytes": [0xE2],
                "top_logprobs": [alternative],
            }
        ],
        "refusal": None,
    }


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab €😀", max_size=12),
    stop=st.text(alphabet="ab €", min_size=1, max_size=3),
)
def test_logprobs_list_the_tokens_of_the_text_and_no_others(
    text: str, stop: str, context: BodyContext
) -> None:
    tokenizer = context.tokenizer
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer, [stop])
    for count, token_id in enumerate(ids, start=1):
        if detokenizer.add(token_id):
            ids = ids[:count]
            break
    else:
        ids = [*ids, 1]
    call = completion(context, stop=stop, logprobs=1)
    texts = finish(call, context, [sampled(ids, top=1)], "stop")
    [choice] = response_body(call, texts, tokenizer, 0)["choices"]
    shown = len(choice["logprobs"]["tokens"])
    joined = b"".join(map(tokenizer.token_bytes, ids[:shown])).decode()
    assert joined.startswith(choice["text"])
    assert shown == 0 or len(tokenizer.decode(ids[: shown - 1]).rstrip("\ufffd")) < len(joined)
    assert response_body(call, texts, tokenizer, 0)["usage"]["completion_tokens"] == len(ids)
    json.dumps(choice, allow_nan=False)
