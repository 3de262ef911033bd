"""The HTTP server's process over real HTTP; the test is rank 0, and decides what is drawn."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import DEMO, run, wait_for
from serve_runs import Answer, ask, completion_body, connect

from onecast.runtime.admission import SchedulerConfig
from onecast.runtime.front_end import FrontEnd, FrontEndLost
from onecast.runtime.serve_config import ServeConfig
from onecast.runtime.serve_messages import (
    STATUSES,
    Abort,
    Answered,
    Ask,
    Drain,
    Drained,
    Ended,
    News,
    Progress,
    Serving,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LIMITS = SchedulerConfig(
    block_size=16,
    num_blocks=64,
    num_host_blocks=0,
    max_batch_tokens=64,
    max_batch_size=2,
    max_model_len=256,
)


class Engine:
    """Rank 0's part."""

    def __init__(self) -> None:
        config = ServeConfig(
            model=DEMO, port=0, served_model_name="demo", max_batch_size=2, max_queue=2
        )
        self.front_end = FrontEnd.start(config)
        self.url = self.front_end.url
        self._heard: list[Any] = []
        self.answered: dict[int, int] = {}  # those there were, by status

    def serve(self) -> "Engine":
        self.front_end.send(Serving(LIMITS))
        wait_for(lambda: ask(self.url, "/ready").status == 200, "readiness")
        return self

    def hear(self, kind: type) -> Any:
        """The next message, which must be of `kind`."""

        def heard() -> bool:
            self._receive()
            return bool(self._heard)

        wait_for(heard, kind.__name__)
        message = self._heard.pop(0)
        assert isinstance(message, kind), message
        return message

    def await_answers(self, by_status: dict[int, int]) -> None:
        def told() -> bool:
            self._receive()
            return self.answered == by_status

        wait_for(told, f"answers {by_status}")

    def _receive(self) -> None:
        self.front_end.wait(0.05)
        for message in self.front_end.receive():
            if isinstance(message, Answered):
                by_status = message.by_status
                assert tuple(by_status) == STATUSES
                self.answered = {status: count for status, count in by_status.items() if count}
            else:
                self._heard.append(message)

    def tell(self, call: int, choice: int, ids: list[int], ended: Ended | None = None) -> None:
        self.front_end.send(Progress([News(call, choice, ids, None, ended)]))

    def finish(self, asked: Ask) -> None:
        for choice in range(sum(prompt.params.n for prompt in asked.prompts)):
            self.tell(asked.call, choice, [5, 6], Ended("the end", "length", 0))


@pytest.fixture
def starting() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.front_end.close()


@pytest.fixture
def engine(starting: Engine) -> Engine:
    return starting.serve()


class Client(threading.Thread):
    """Asks beside the test."""

    def __init__(self, url: str, path: str, body: Any, **more: Any) -> None:
        super().__init__()
        self._args = url, path, body
        self._more = more
        self._answer: Answer | None = None
        self.start()

    def run(self) -> None:
        self._answer = ask(*self._args, **self._more)

    def answer(self) -> Answer:
        self.join(30)
        assert self._answer is not None, "no answer within 30 s"
        return self._answer


def test_it_is_alive_but_not_ready_before_the_engine_is(starting: Engine) -> None:
    assert ask(starting.url, "/health").json == {"status": "ok"}
    ready = ask(starting.url, "/ready")
    assert (ready.status, ready.json) == (503, {"status": "starting"})
    refused = ask(starting.url, COMPLETIONS, completion_body())
    assert refused.status == 503 and int(refused.headers["retry-after"]) > 0
    assert refused.json["error"]["type"] == "server_error"


def test_a_model_is_named_after_the_directory_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "my-model"
    link.symlink_to(DEMO)
    assert ServeConfig(model=link).model_name == "my-model"
    assert ServeConfig(model=tmp_path / "x" / ".." / "my-model").model_name == "my-model"
    monkeypatch.chdir(tmp_path)
    assert ServeConfig(model=Path("my-model/")).model_name == "my-model"
    assert ServeConfig(model=Path()).model_name == tmp_path.name


def test_a_model_needs_a_name_that_json_has() -> None:
    with pytest.raises(ValueError, match=r"^--served-model-name: 'm\\udcff' is not UTF-8"):
        ServeConfig(model=DEMO, served_model_name="m\udcff")


def test_one_port_cannot_have_two_servers() -> None:
    status, _, err = run("serve", f"--model={DEMO}", "--port=8765", "--metrics-port=8765")
    assert (status, err) == (2, "onecast: --port, --metrics-port: both are 8765\n")


def test_the_model_is_listed_by_the_name_it_is_served_under(engine: Engine) -> None:
    (card,) = ask(engine.url, "/v1/models").json["data"]
    assert card["id"] == "demo" and ask(engine.url, "/v1/models/demo").json == card
    unknown = ask(engine.url, "/v1/models/other")
    assert (unknown.status, unknown.json["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (COMPLETIONS, b"{", 400, "not JSON"),
        (COMPLETIONS, b"\xff", 400, "not JSON"),
        (COMPLETIONS, b"[1]", 400, "not an object"),
        (COMPLETIONS, completion_body(max_tokens=-3), 400, "max_tokens: -3 is below 1"),
        (COMPLETIONS, completion_body(max_tokens=9999), 400, "256"),
        (COMPLETIONS, completion_body(colour="red"), 400, "colour: unknown parameter"),
        (COMPLETIONS, completion_body(stream="yes"), 400, 'stream: "yes" is not true or false'),
        (COMPLETIONS, completion_body(stream_options={}), 400, "needs stream: true"),
        (COMPLETIONS, completion_body(n=3), 400, "at most 2 sequences run at once"),
        (COMPLETIONS, completion_body(["a"] * 5), 400, "5 choices are asked for; at most 4"),
        (COMPLETIONS, completion_body(model="other"), 404, "not served here"),
        (CHAT, {"model": "demo"}, 400, "messages"),
        ("/v1/nothing", {}, 404, "POST /v1/nothing"),
        ("/v1/models", {}, 405, "POST /v1/models"),
    ],
)
def test_what_cannot_be_done_is_refused_as_openai_does(
    shared_engine: Engine, path: str, body: Any, status: int, words: str
) -> None:
    answer = ask(shared_engine.url, path, body)
    assert answer.status == status, answer.text
    error = answer.json["error"]
    assert words in error["message"], error
    assert error["type"] == "invalid_request_error"
    assert {"param", "code"} <= error.keys()


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Engine]:
    engine = Engine().serve()
    yield engine
    engine.front_end.close()


def test_beyond_the_queue_requests_are_turned_away_until_others_have_ended(engine: Engine) -> None:
    clients = [Client(engine.url, COMPLETIONS, completion_body(n=2)) for _ in range(2)]
    first, second = engine.hear(Ask), engine.hear(Ask)
    refused = ask(engine.url, COMPLETIONS, completion_body())
    assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json["error"]["code"] == "rate_limit_exceeded"
    engine.finish(first)
    late = Client(engine.url, COMPLETIONS, completion_body(n=2))
    third = engine.hear(Ask)
    assert third.call == 2, "what was turned away has never been told of"
    engine.finish(second)
    engine.finish(third)
    assert [client.answer().status for client in (*clients, late)] == [200, 200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_sequences_with_it(engine: Engine, stream: bool) -> None:
    connection = connect(engine.url)
    body = completion_body(stream=stream, n=2, max_tokens=50)
    connection.request("POST", COMPLETIONS, json.dumps(body).encode())
    asked = engine.hear(Ask)
    assert asked.stream == stream
    engine.tell(asked.call, 0, [5])
    engine.tell(asked.call, 1, [6], Ended("word", "stop", 0))
    connection.close()
    assert engine.hear(Abort).call == asked.call
    # Its place is free again: as many as there may be are taken.
    clients = [Client(engine.url, COMPLETIONS, completion_body(n=2)) for _ in range(2)]
    for asked in [engine.hear(Ask), engine.hear(Ask)]:
        engine.finish(asked)
    assert [client.answer().status for client in clients] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_rank_0_is_told_how_many_answers_there_were_by_status(
    starting: Engine, stream: bool
) -> None:
    assert ask(starting.url, COMPLETIONS, completion_body()).status == 503
    engine = starting.serve()
    engine.await_answers({503: 1})
    served = Client(engine.url, COMPLETIONS, completion_body(stream=stream, n=2))
    asked = engine.hear(Ask)
    left = connect(engine.url)
    body = json.dumps(completion_body(stream=stream, n=2)).encode()
    left.request("POST", COMPLETIONS, body)
    engine.tell(engine.hear(Ask).call, 0, [5])
    assert ask(engine.url, COMPLETIONS, completion_body()).status == 429
    left.close()
    engine.hear(Abort)
    engine.finish(asked)
    assert served.answer().status == 200
    assert ask(engine.url, CHAT, b"{").status == 400
    assert ask(engine.url, COMPLETIONS, completion_body(model="other")).status == 404
    assert ask(engine.url, "/v1/models").status == 200  # of bodies alone
    engine.await_answers({503: 1, 200: 1, 429: 1, 499: 1, 400: 1, 404: 1})


def test_headers_join_the_callers_trace_and_come_before_metadata(engine: Engine) -> None:
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    body = completion_body(metadata={"traceparent": "other"})
    headers = {"traceparent": parent, "tracestate": "v=1"}
    client = Client(engine.url, COMPLETIONS, body, headers=headers)
    asked = engine.hear(Ask)
    assert [(p.traceparent, p.tracestate) for p in asked.prompts] == [(parent, "v=1")]
    engine.finish(asked)
    assert client.answer().status == 200


def test_asked_to_stop_it_finishes_what_runs_and_takes_nothing_new(engine: Engine) -> None:
    running = Client(engine.url, COMPLETIONS, completion_body())
    asked = engine.hear(Ask)
    engine.front_end.send(Drain())
    engine.hear(Drained)
    assert ask(engine.url, "/health").status == 200
    ready = ask(engine.url, "/ready")
    assert (ready.status, ready.json) == (503, {"status": "draining"})
    refused = ask(engine.url, COMPLETIONS, completion_body())
    assert refused.status == 503 and "retry-after" in refused.headers
    engine.finish(asked)
    assert running.answer().json["choices"][0]["text"] == "the end"


def test_a_body_that_is_whole_only_after_the_engine_is_gone_is_turned_away(engine: Engine) -> None:
    connection = connect(engine.url)
    body = json.dumps(completion_body()).encode()
    connection.putrequest("POST", COMPLETIONS)
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[:-1])
    time.sleep(0.2)  # its head must be read while the engine is still there
    end = threading.Thread(target=engine.front_end.close)
    end.start()
    time.sleep(0.2)
    connection.send(body[-1:])
    response = connection.getresponse()
    assert (response.status, response.getheader("retry-after")) == (503, "5")
    connection.close()
    end.join(2)
    assert not end.is_alive(), "it waits for an answer that nobody gives"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_leaves_unfinished_ends_as_an_error(engine: Engine, stream: bool) -> None:
    client = Client(engine.url, COMPLETIONS, completion_body(stream=stream))
    engine.tell(engine.hear(Ask).call, 0, [5])
    engine.front_end.close()
    answer = client.answer()
    assert "engine_stopped" in answer.text
    assert answer.status == (200 if stream else 503)
    assert "[DONE]" not in answer.text


def test_its_process_ends_when_rank_0_is_gone() -> None:
    engine = Engine()
    engine.front_end._socket.close()
    engine.front_end._process.wait(30)


def test_rank_0_learns_that_the_process_is_gone() -> None:
    engine = Engine()
    engine.front_end._process.kill()
    engine.front_end._process.wait(30)
    with pytest.raises(FrontEndLost, match="has ended"):
        engine.hear(Ask)
    engine.front_end.close()


@pytest.mark.slow  # it waits for a server that may be about to let go
def test_an_address_that_is_taken_is_told_by_its_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--host, --port: .*{port}"):
            FrontEnd.start(ServeConfig(model=DEMO, port=port))
