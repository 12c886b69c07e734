import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from steerserve.server.protocol.generation import CompletionRequest
from tests.server.asgi import Call, running
from tests.server.protocol.test_protocol import DESIGN_EXAMPLE, JSON
from tests.server.text_engine import TextEngine, serving

STEERED = {"interventions": [{"attribute": "topic/sports", "strength": 1.0}]}


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "text", "seed": 3, "max_tokens": 40} | fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def test_answer_has_openais_fields(client: TestClient) -> None:
    answer = complete(client, prompt=["a", "bc"], n=2)
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"], answer["seed"]) == ("text_completion", "text", 3)
    assert answer["system_fingerprint"] == "fp_0123456789ab"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}
    assert len({choice["text"] for choice in answer["choices"]}) == 4
    assert "steering" not in answer
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["denoising_steps"] == usage["forward_passes"] == 160


def test_a_drawn_seed_is_told_and_replays(client: TestClient) -> None:
    first = complete(client, seed=None)
    again = complete(client, seed=first["seed"])
    assert first["choices"] == again["choices"]
    assert complete(client, seed=None)["seed"] != first["seed"]


def test_baseline_is_the_unsteered_run(client: TestClient) -> None:
    plain = complete(client, n=2)
    steered = complete(client, n=2, steering=STEERED | {"baseline": True})
    for choice, unsteered in zip(steered["choices"], plain["choices"], strict=True):
        assert choice["baseline"] == {"text": unsteered["text"], "finish_reason": unsteered["finish_reason"]}
        assert choice["text"] == unsteered["text"].upper()
        assert choice["steering"] == {"interventions": [{"strength": 1.0}]}
    assert "steering" not in steered
    assert steered["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert steered["usage"]["denoising_steps"] == 2 * plain["usage"]["denoising_steps"]


def test_trace_is_beside_its_choice(client: TestClient) -> None:
    [choice] = complete(client, steering={"trace": {"attributes": ["topic/sports"], "every": 10}})["choices"]
    assert [entry["step"] for entry in choice["trace"]] == [0, 10, 20, 30]
    assert choice["trace"][1] == {"step": 10, "progress": 0.25, "values": {"topic/sports": 0.5}}


@pytest.mark.parametrize("stop", [None, "e"])
def test_logprobs_cover_the_text(client: TestClient, stop: str | None) -> None:
    for seed in range(8):
        [choice] = complete(client, logprobs=0, stop=stop, seed=seed)["choices"]
        found = choice["logprobs"]
        sizes = {len(found[name]) for name in ("tokens", "token_logprobs", "text_offset")}
        assert len(sizes) == 1
        assert all(offset <= len(choice["text"]) for offset in found["text_offset"])


def test_alternatives_stand_beside_each_token(client: TestClient) -> None:
    [choice] = complete(client, logprobs=3, prompt="a ", seed=5)["choices"]
    found = choice["logprobs"]
    assert len(found["top_logprobs"]) == len(found["tokens"])
    for token, told in zip(found["tokens"], found["top_logprobs"], strict=True):
        assert list(told.items())[0] == (token, -0.5) or not token.isascii()
        assert list(told.values()) == sorted(told.values(), reverse=True)
        assert {"a", "b"} <= set(told) | {token}


def test_echo_puts_the_prompt_before_every_text(client: TestClient) -> None:
    body = {"prompt": ["ab", "c"], "n": 2, "steering": STEERED | {"baseline": True}}
    plain, echoed = complete(client, **body)["choices"], complete(client, **body, echo=True)["choices"]
    for choice, whole, prompt in zip(plain, echoed, ("ab", "ab", "c", "c"), strict=True):
        assert whole["text"] == prompt + choice["text"]
        assert whole["baseline"]["text"] == prompt + choice["baseline"]["text"]


def test_an_echoed_prompt_has_log_probabilities_but_for_its_first_token(client: TestClient) -> None:
    for n in (1, 3):
        for choice in complete(client, prompt=[104, 105], echo=True, logprobs=1, n=n)["choices"]:
            found = choice["logprobs"]
            assert found["tokens"][:2] == ["h", "i"]
            assert found["token_logprobs"][:3] == [None, -105 / 64, -0.5]
            assert found["top_logprobs"][:2] == [None, {"i": -0.5}]
            assert found["text_offset"][:3] == [0, 1, 2]
    plain = client.post("/v1/completions", json={"model": "text", "prompt": "hi", "logprobs": 1}).json()
    assert None not in plain["choices"][0]["logprobs"]["token_logprobs"]


def test_a_prompt_alone_is_echoed_where_nothing_is_to_be_written(client: TestClient) -> None:
    whole = complete(client, prompt=["hi", "you"], echo=True, logprobs=0, max_tokens=0)
    assert [choice["text"] for choice in whole["choices"]] == ["hi", "you"]
    assert [choice["logprobs"]["tokens"] for choice in whole["choices"]] == [["h", "i"], ["y", "o", "u"]]
    assert {choice["finish_reason"] for choice in whole["choices"]} == {"length"}
    assert whole["usage"]["completion_tokens"] == 0 and whole["usage"]["prompt_tokens"] == 5
    refused: list[tuple[dict[str, Any], str]] = [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True}, "max_tokens"),
        ({"max_completion_tokens": 0, "logprobs": 1}, "max_completion_tokens"),
        ({"max_tokens": 0, "echo": True, "logprobs": 1, "steering": {"baseline": True}}, "steering.baseline"),
    ]
    for body, param in refused:
        answer = client.post("/v1/completions", json={"model": "text", "prompt": "hi"} | body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    chat = {"model": "text", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}
    assert client.post("/v1/chat/completions", json=chat).json()["error"]["param"] == "max_tokens"


def test_an_unknown_attribute_is_a_404_with_its_path(client: TestClient) -> None:
    response = client.post(
        "/v1/completions", json={"model": "text", "steering": {"interventions": [{"attribute": "nope"}]}}
    )
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "steering.interventions[0].attribute"


def test_another_model_is_a_404(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"model": "gpt"})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == 'no model "gpt"; served here: text'


def test_one_bad_prompt_admits_none(client: TestClient, engine: TextEngine) -> None:
    response = client.post("/v1/completions", json={"model": "text", "prompt": ["a", "bad", "c"]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt[1]"
    assert engine.steps == 0


def test_preview_tells_the_plan_and_runs_nothing(client: TestClient, engine: TextEngine) -> None:
    body = {"model": "text", "prompt": ["a", "b"], "n": 2, "max_tokens": 8, "steering": STEERED | {"baseline": True}}
    answer = client.post("/v1/steering/preview", json=body).json()
    plan = {"steps": 8, "interventions": [{"attribute": "topic/sports"}]}
    assert answer["plans"] == [{"prompt": 0, **plan}, {"prompt": 1, **plan}]
    assert engine.steps == 0
    refused = client.post("/v1/steering/preview", json=body | {"prompt": "bad"})
    assert refused.status_code == 400


def test_many_at_once_are_each_answered_once_and_as_alone() -> None:
    engine = TextEngine(max_rows=5)
    bodies = [
        {"model": "text", "prompt": f"p{i}", "seed": i, "max_tokens": 10 + i % 7, "n": 1 + i % 2} for i in range(64)
    ]

    async def scenario() -> list[Call]:
        async with running(engine) as app:
            calls = [Call("/v1/completions", body | {"stream": i % 3 == 0}) for i, body in enumerate(bodies)]
            return list(await asyncio.gather(*(call.run(app) for call in calls)))

    calls = asyncio.run(scenario())
    with serving(TextEngine()) as client:
        for index, (call, body) in enumerate(zip(calls, bodies, strict=True)):
            assert (call.status, call.complete) == (200, True)
            if index % 3:
                assert json.loads(call.body)["choices"] == client.post("/v1/completions", json=body).json()["choices"]
            else:
                assert call.body.count(b"[DONE]") == 1
    assert len(engine.finished) == len(set(engine.finished)) == sum(1 + i % 2 for i in range(64))


FIELDS = st.sampled_from([*CompletionRequest.model_fields, "nonsense"])


@pytest.fixture(scope="module")
def shared_client() -> Any:
    with serving(TextEngine()) as client:
        yield client


@settings(max_examples=150)
@given(st.dictionaries(FIELDS, JSON, max_size=4) | JSON, st.booleans())
def test_no_json_body_is_the_servers_fault(shared_client: TestClient, body: Any, named: bool) -> None:
    if named and isinstance(body, dict):
        body = body | {"model": "text"}
    check_answer(shared_client, json.dumps(body).encode())


@settings(max_examples=150)
@given(st.data())
def test_no_change_of_one_value_is_the_servers_fault(shared_client: TestClient, data: st.DataObject) -> None:
    body = json.loads(json.dumps(DESIGN_EXAMPLE | {"model": "text", "max_tokens": 8}))
    place = body
    while True:
        key = data.draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else data.draw(indices(place))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(JSON | st.sampled_from([10**40, -1, 1e308, "\x00", [[[[]]]]]))
            break
        place = place[key]
    check_answer(shared_client, json.dumps(body).encode())


@given(st.binary(max_size=60))
def test_no_bytes_are_the_servers_fault(shared_client: TestClient, raw: bytes) -> None:
    check_answer(shared_client, raw)


def indices(values: list[Any]) -> st.SearchStrategy[int]:
    return st.integers(0, len(values) - 1)


def check_answer(client: TestClient, raw: bytes) -> None:
    response = client.post("/v1/completions", content=raw)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["code"]
        assert len(error["message"]) < 1000
    assert response.headers["x-request-id"]
