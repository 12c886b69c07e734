import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from steerserve.errors import RequestError
from steerserve.server.protocol.chat import ChatRequest
from steerserve.server.protocol.parsing import parse
from tests.server.text_engine import TextEngine, service_of, serving, template, with_chat

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def chat() -> Iterator[TestClient]:
    engine = TextEngine()
    with serving(engine, service=with_chat(service_of(engine))) as client:
        yield client


def answered(client: TestClient, **fields: Any) -> dict[str, Any]:
    body = {"model": "text", "messages": HELLO, "seed": 3, "max_tokens": 40} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def streamed(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "text", "messages": HELLO, "seed": 3, "max_tokens": 40, "stream": True} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_answers_the_rendered_prompt(chat: TestClient) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    answer = answered(chat, messages=messages, n=2)
    prompt = "system: be kind\nuser: one\ntwo\nassistant:"
    assert prompt == template([{"role": "system", "content": "be kind"}, {"role": "user", "content": "one\ntwo"}])
    plain = chat.post("/v1/completions", json={"model": "text", "prompt": prompt, "seed": 3, "max_tokens": 40, "n": 2})
    assert (answer["object"], answer["id"][:9]) == ("chat.completion", "chatcmpl-")
    for choice, text in zip(answer["choices"], plain.json()["choices"], strict=True):
        assert choice["message"] == {"role": "assistant", "content": text["text"], "refusal": None}
        assert (choice["index"], choice["finish_reason"]) == (text["index"], text["finish_reason"])
    assert answer["usage"] == plain.json()["usage"]


def test_steers_as_completions_do(chat: TestClient) -> None:
    steering = {"interventions": [{"attribute": "topic/sports", "strength": 1.0}], "baseline": True}
    answer = answered(chat, steering=steering)
    [choice] = answer["choices"]
    assert choice["message"]["content"] == choice["baseline"]["message"]["content"].upper()
    assert choice["steering"] == {"interventions": [{"strength": 1.0}]}


BODIES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 40),
        "diffusion": st.fixed_dictionaries({"steps": st.integers(1, 40)}),
        "stop": st.lists(st.sampled_from(["e", "the s", "st", "a▯", " "]), max_size=3),
    }
)


@settings(max_examples=30)
@given(BODIES)
def test_joined_deltas_are_the_plain_answer(chat: TestClient, body: dict[str, Any]) -> None:
    plain = answered(chat, **body)
    chunks = streamed(chat, **body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for choice in plain["choices"]:
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in mine) == choice["message"]["content"]
        assert all("role" not in one["delta"] for one in mine[1:])
        assert mine[-1] == {key: choice[key] for key in choice if key != "message"} | {"delta": {}}
        assert {one["finish_reason"] for one in mine[:-1]} == {None}


@settings(max_examples=15)
@given(BODIES)
def test_the_last_delta_of_replace_is_the_plain_answer(chat: TestClient, body: dict[str, Any]) -> None:
    plain = answered(chat, **body)
    chunks = streamed(chat, **body | {"diffusion": body["diffusion"] | {"stream_mode": "replace"}})
    for choice in plain["choices"]:
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert mine[-1]["delta"].get("content", "") == choice["message"]["content"]


def test_log_probabilities_in_chats_words(chat: TestClient) -> None:
    [choice] = answered(chat, logprobs=True, top_logprobs=3)["choices"]
    content = choice["logprobs"]["content"]
    joined = b"".join(bytes(token["bytes"]) for token in content)
    assert joined.decode("utf-8", "replace") == choice["message"]["content"]
    assert any(byte > 0x7F for byte in joined)
    for token in content:
        assert token["logprob"] == -0.5
        # Of an engine whose tokens are bytes, the first of the alternatives being the token itself.
        assert [len(one["bytes"]) for one in token["top_logprobs"]] == [1, 1, 1]
        assert {name: token[name] for name in ("token", "logprob", "bytes")} == token["top_logprobs"][0]
        assert [one["logprob"] for one in token["top_logprobs"]] == [-0.5, -1.0, -2.0]
    assert answered(chat, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert answered(chat)["choices"][0]["logprobs"] is None


def test_a_model_without_a_template_says_so(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", json={"model": "text", "messages": HELLO})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["message"]) == (
        "messages",
        "this model has no chat template; use /v1/completions",
    )


def test_what_the_template_or_the_engine_refuses_is_the_messages_fault(chat: TestClient) -> None:
    messages = [{"role": "user", "content": "refused"}]
    response = chat.post("/v1/chat/completions", json={"model": "text", "messages": messages})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_preview_takes_a_conversation(chat: TestClient) -> None:
    answer = chat.post("/v1/steering/preview", json={"model": "text", "messages": HELLO, "max_tokens": 8}).json()
    assert [plan["steps"] for plan in answer["plans"]] == [8]


def answered_with(**fields: Any) -> dict[str, Any]:
    """A conversation whose second message has these fields beside, or in place of, its own."""
    return {"messages": [*HELLO, {"role": "assistant", "content": "a"} | fields]}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": None}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", 'got "hi"'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a string or a list"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "at least 1 item"),
        (
            {"messages": [*HELLO, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[1].content[0].image_url",
            "known: type, text",
        ),
        (answered_with(tool_calls=[{"id": "x"}]), "messages[1].tool_calls", 'or send [], got [{"id": "x"}]'),
        (answered_with(refusal="no"), "messages[1].refusal", 'leave it out or send "", got "no"'),
        (answered_with(audio={"id": "x"}), "messages[1].audio", 'or send {}, got {"id": "x"}'),
        (answered_with(tool_calls=False), "messages[1].tool_calls", "or send [], got false"),
        (answered_with(reasoning_content="so"), "messages[1].reasoning_content", 'got "so"'),
        (answered_with(tool_call_id=None), "messages[1].tool_call_id", "known: role, content, name, refusal"),
        (answered_with(content=None), "messages[1].content", "required"),
        ({"prompt": "a"}, "prompt", "not a known field"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", 'send "none" or send "auto"'),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema", "known: type"),
        ({"logprobs": 3}, "logprobs", "got 3"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, "top_logprobs", '"logprobs": true'),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        (
            {"steering": {"interventions": [{"attribute": "a", "strenght": 1}]}},
            "steering.interventions[0].strenght",
            "",
        ),
    ],
)
def test_error_names_field_value_and_what_is_allowed(fields: dict[str, Any], param: str, said: str) -> None:
    body = {"model": "text", "messages": HELLO} | fields
    with pytest.raises(RequestError) as caught:
        parse(json.dumps(body).encode(), ChatRequest)
    assert caught.value.param == param
    assert said in str(caught.value)


def test_what_asks_for_nothing_passes() -> None:
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "store": False,
        "metadata": {},
        "service_tier": "auto",
        "ignore_eos": True,
        "stop": None,
        "max_completion_tokens": 8,
    }
    parse(json.dumps({"model": "text", "messages": HELLO} | neutral).encode(), ChatRequest)


@pytest.mark.parametrize(
    "fields",
    [
        # OpenAI's own answers, those of its client's helpers, of vLLM, and of litellm.
        {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
        {"refusal": None, "parsed": None, "tool_calls": []},
        {"refusal": None, "annotations": None, "tool_calls": [], "reasoning": None, "reasoning_content": None},
        {"provider_specific_fields": {"refusal": None}, "thinking_blocks": None, "images": [], "reasoning_content": ""},
        {"name": None},
    ],
)
def test_what_clients_send_back_of_an_answer_changes_nothing(chat: TestClient, fields: dict[str, Any]) -> None:
    plain, echoed = (answered(chat, **answered_with(**one)) for one in ({}, fields))
    assert (echoed["choices"], echoed["usage"]) == (plain["choices"], plain["usage"])


def test_an_answers_parts_and_name_are_read() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = answered_with(content=parts, name="writer") | {"model": "text"}
    message = parse(json.dumps(body).encode(), ChatRequest).messages[1]
    assert message.plain() == {"role": "assistant", "content": "one\ntwo", "name": "writer"}


def test_usage_so_far_is_in_every_chunk_where_asked_for(chat: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(chat, stream_options=options, ignore_eos=True)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {len("user: hello\nassistant:")}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == chunks[-2]["usage"]
