"""`onecast serve` on two ranks, asked by OpenAI's own client: the answers of `generate`."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from cli_runs import completion, generate_args, read_results, run, write_batch
from serve_runs import Serving, ask, completion_body, connect, serving

CHAT = [{"role": "user", "content": "Speak of David."}]
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 24},
    "choices": {"n": 3, "seed": 4, "temperature": 0.8, "max_tokens": 16},
    "logprobs": {"logprobs": 2, "seed": 9, "temperature": 1.0, "max_tokens": 10},
    "stopped": {"stop": [" the"], "max_tokens": 40},
    "prompts": {"prompt": ["In the beginning", "And God said"], "echo": True},
}
CHATTED: dict[str, Any] = {
    "messages": CHAT,
    "max_completion_tokens": 12,
    "logprobs": True,
    "top_logprobs": 2,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving("--metrics-port=0") as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Serving) -> Any:
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `generate` answers to the same bodies."""
    folder = tmp_path_factory.mktemp("batch")
    lines = [completion(name, **body) for name, body in ASKED.items()]
    chat = {"model": "demo", **CHATTED}
    lines.append(
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat}
    )
    output = folder / "out.jsonl"
    status, _, err = run(
        *generate_args(write_batch(folder / "in.jsonl", lines), output, "--num-blocks=256")
    )
    assert status == 0, err
    return {r["custom_id"]: r["response"]["body"]["choices"] for r in read_results(output)}


def _body(name: str) -> dict[str, Any]:
    return completion(name, **ASKED[name])["body"]


def _shown(choices: Any) -> list[dict[str, Any]]:
    """Without what floating point of another batch may change in the last digit."""
    plain = json.loads(json.dumps(choices))
    for choice in plain:
        choice["logprobs"] = _rounded(choice["logprobs"])
    return plain  # type: ignore[no-any-return]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 3) if isinstance(value, float) else value


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ASKED))
def test_the_openai_client_gets_the_answers_of_generate_whole_and_streamed(
    server: Serving, client: Any, generated: dict[str, Any], name: str
) -> None:
    body = _body(name)
    whole = client.completions.create(**body).model_dump(exclude_unset=True)
    assert _shown(whole["choices"]) == _shown(generated[name])
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    options = {"include_usage": True}
    for chunk in client.completions.create(**body, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert [texts[c["index"]] for c in generated[name]] == [c["text"] for c in generated[name]]
    assert [reasons[c["index"]] for c in generated[name]] == [
        c["finish_reason"] for c in generated[name]
    ]
    assert usage.completion_tokens == whole["usage"]["completion_tokens"]


@pytest.mark.slow
def test_the_openai_client_chats(server: Serving, client: Any, generated: dict[str, Any]) -> None:
    asked = {"model": "demo", **CHATTED}
    whole = client.chat.completions.create(**asked).model_dump(exclude_unset=True)
    assert _shown(whole["choices"]) == _shown(generated["chat"])
    text, entries = "", []
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        entries += choice.logprobs.content if choice.logprobs else []
    (expected,) = generated["chat"]
    assert text == expected["message"]["content"]
    assert [e.token for e in entries] == [e["token"] for e in expected["logprobs"]["content"]]


def test_many_clients_at_once_get_what_each_would_get_alone(server: Serving) -> None:
    prompts = [f"Chapter {number}, verse" for number in range(12)]
    bodies = [completion_body(prompt, seed=3, temperature=0.7) for prompt in prompts]
    alone = [ask(server.url, "/v1/completions", body).json["choices"] for body in bodies]
    together: dict[int, Any] = {}

    def one(index: int) -> None:
        body = bodies[index] | {"stream": index % 2 == 1}
        answer = ask(server.url, "/v1/completions", body)
        if body["stream"]:
            pieces = [event["choices"][0]["text"] for event in answer.events]
            together[index] = "".join(pieces)
        else:
            together[index] = answer.json["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[index] for index in range(len(bodies))] == [c[0]["text"] for c in alone]


def test_a_client_that_leaves_frees_what_its_request_had(server: Serving) -> None:
    connection = connect(server.url)
    body = completion_body(max_tokens=400, n=4, seed=1, temperature=1.0, ignore_eos=True)
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}).encode())
    assert connection.getresponse().read(10)
    connection.sock.close()
    connection.close()
    # All of the cache is needed for this one.
    full = completion_body(max_tokens=300, n=8, seed=1, temperature=1.0, ignore_eos=True)
    answer = ask(server.url, "/v1/completions", full)
    assert [c["finish_reason"] for c in answer.json["choices"]] == ["length"] * 8
