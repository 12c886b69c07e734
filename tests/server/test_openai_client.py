"""The official client against a real socket."""

import threading
import time
from collections.abc import Iterator
from functools import partial

import openai
import pytest
import uvicorn
from fastapi import FastAPI
from openai.types.chat import ChatCompletionMessageParam

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from tests.server.gate import Gate
from tests.server.sockets import PATIENCE, eventually
from tests.server.text_engine import TextEngine, service_of, with_chat


@pytest.fixture(scope="module")
def engine() -> TextEngine:
    return TextEngine()


@pytest.fixture(scope="module")
def app(engine: TextEngine) -> FastAPI:
    return create_app(with_chat(service_of(engine)), ServerConfig())


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[openai.OpenAI]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()


STEERING = {"steering": {"interventions": [{"attribute": "topic/sports", "strength": 0.3}], "baseline": True}}


def test_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()][0] == "text"
    assert client.models.retrieve("text").owned_by == "steerserve"


def test_completes_and_steers(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="text", prompt="a", max_tokens=30, seed=3, user="me", extra_body=STEERING)
    [choice] = answer.choices
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 30
    assert choice.model_extra is not None
    assert choice.text == choice.model_extra["baseline"]["text"].upper()
    assert choice.model_extra["steering"] == {"interventions": [{"strength": 0.3}]}
    assert answer._request_id is not None


def test_streams(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="text", prompt="a", max_tokens=30, seed=3, stop=["sea"])
    stream = client.completions.create(
        model="text",
        prompt="a",
        max_tokens=30,
        seed=3,
        stop=["sea"],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == plain.choices[0].text
    assert chunks[-1].usage == plain.usage


MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
]


def test_chats_and_steers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="text",
        messages=MESSAGES,
        max_completion_tokens=30,
        seed=3,
        n=2,
        logprobs=True,
        top_logprobs=2,
        extra_body=STEERING,
    )
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.model_extra is not None
        assert choice.message.content == choice.model_extra["baseline"]["message"]["content"].upper()
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_streams_a_chat(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model="text", messages=MESSAGES, max_tokens=30, seed=3)
    stream = client.chat.completions.create(
        model="text", messages=MESSAGES, max_tokens=30, seed=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == plain.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason
    assert chunks[-1].usage == plain.usage


def test_an_answer_is_sent_back_as_it_came(client: openai.OpenAI) -> None:
    create = partial(client.chat.completions.create, model="text", max_tokens=30, seed=3)
    answer = create(messages=MESSAGES, stop=["e"]).choices[0].message
    with client.chat.completions.stream(model="text", messages=MESSAGES, max_tokens=30, seed=3, stop=["e"]) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert (streamed.content, streamed.parsed) == (answer.content, None)
    asked = {"role": "user", "content": "and then?"}
    plain = create(messages=[*MESSAGES, {"role": "assistant", "content": answer.content}, asked])
    for said in (answer, streamed):
        second = create(messages=[*MESSAGES, said, asked])
        assert (second.choices, second.usage) == (plain.choices, plain.usage)


def test_errors_become_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="text", prompt="a", max_tokens=0)
    assert (bad.value.param, bad.value.code) == ("max_tokens", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="text", messages=[])


def test_closing_a_stream_frees_its_row(client: openai.OpenAI, engine: TextEngine, app: FastAPI) -> None:
    gate = Gate(engine, engine.steps + 3)
    extra = {"diffusion": {"stream_mode": "events"}}
    with client.completions.create(model="text", prompt="a", max_tokens=512, stream=True, extra_body=extra) as stream:
        next(iter(stream))
    eventually(lambda: not app.state.worker._commands.empty())
    gate.open()
    eventually(lambda: len(engine.aborted) == 1)
