"""A response that is too long for the canvas: what fits of it, or an error, by whether its length was chosen."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.text_engine import TextEngine, service_of, serving, with_chat

LONGEST = 512
NOTE = "max_tokens is 512, not 900: more does not fit on the canvas"
BODY: dict[str, Any] = {"model": "text", "prompt": "a", "max_tokens": 900, "seed": 1}
CHAT: dict[str, Any] = {"model": "text", "messages": [{"role": "user", "content": "hi"}], "seed": 1}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    engine = TextEngine()
    with serving(engine, service=with_chat(service_of(engine))) as made:
        yield made


def choices(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["choices"]
    return found


def test_what_fits_is_what_a_request_for_as_much_gets_and_a_note(client: TestClient) -> None:
    steering = {"steering": {"interventions": [{"attribute": "topic/sports"}], "baseline": True}, "n": 2}
    cut = choices(client, "/v1/completions", BODY | steering)
    fitting = choices(client, "/v1/completions", BODY | steering | {"max_tokens": LONGEST})
    assert [choice.pop("notes") for choice in cut] == [[NOTE]] * 2
    assert cut == fitting


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_conversation_is_cut_too(client: TestClient, field: str) -> None:
    [choice] = choices(client, "/v1/chat/completions", CHAT | {field: 900})
    assert choice["notes"] == [NOTE]


def test_a_stream_says_it_where_the_choice_ends(client: TestClient) -> None:
    text = client.post("/v1/completions", json=BODY | {"stream": True}).text
    frames = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    ends = [frame["choices"][0] for frame in frames if frame["choices"][0]["finish_reason"]]
    assert [end["notes"] for end in ends] == [[NOTE]]
    assert not any("notes" in frame["choices"][0] for frame in frames[:-1])


def test_the_preview_says_it(client: TestClient) -> None:
    assert client.post("/v1/steering/preview", json=BODY).json()["plans"][0]["notes"] == [NOTE]


@pytest.mark.parametrize("chosen", [{"diffusion": {}}, {"diffusion": {"steps": 4}}, {"ignore_eos": True}])
def test_a_length_that_was_chosen_is_refused(client: TestClient, chosen: dict[str, Any]) -> None:
    for path, body in (("/v1/completions", BODY), ("/v1/steering/preview", BODY)):
        answer = client.post(path, json=body | chosen)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "max_tokens"
    answer = client.post("/v1/chat/completions", json=CHAT | {"max_completion_tokens": 900} | chosen)
    assert answer.json()["error"]["param"] == "max_completion_tokens"


def test_ends_that_are_left_to_the_text_do_not_choose_its_length(client: TestClient) -> None:
    [choice] = choices(client, "/v1/completions", BODY | {"ignore_eos": False, "diffusion": None})
    assert choice["notes"] == [NOTE]


def test_what_fits_says_nothing(client: TestClient) -> None:
    [choice] = choices(client, "/v1/completions", BODY | {"max_tokens": LONGEST})
    assert "notes" not in choice
