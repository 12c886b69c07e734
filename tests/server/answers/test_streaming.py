import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from steerserve.engine.api.params import GenerationParams
from steerserve.engine.api.text import continuation
from tests.server.text_engine import END, TextEngine, decode, response_tokens, serving


@pytest.fixture(scope="module")
def shared_client() -> Any:
    with serving(TextEngine()) as client:
        yield client


def stream(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/completions", json={"model": "text", "stream": True} | fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def choices_of(frames: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    return [choice for frame in frames for choice in frame["choices"] if choice["index"] == index]


BODIES = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from([None, "a", "a ", [97, 0xC3], [END]]),
        "seed": st.integers(0, 10_000),
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 40),
        "diffusion": st.fixed_dictionaries(
            {"steps": st.integers(1, 40), "transfer": st.sampled_from(["linear", "remdm", "remdm"])}
        ),
        "stop": st.lists(st.sampled_from(["e", "the s", "st", "stop s", "a▯", " ", "ï"]), max_size=3),
    }
)


@settings(max_examples=60)
@given(BODIES)
def test_joined_chunks_are_the_plain_answer(shared_client: TestClient, body: dict[str, Any]) -> None:
    plain = shared_client.post("/v1/completions", json={"model": "text"} | body).json()
    frames = stream(shared_client, **body)
    for choice in plain["choices"]:
        chunks = choices_of(frames, choice["index"])
        assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
        assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [choice["finish_reason"]]
        assert "\ufffd" not in "".join(chunk["text"] for chunk in chunks[:-2])
        if body["diffusion"]["transfer"] == "remdm":
            assert len(chunks) <= 2, "what may yet be taken back was sent"


@settings(max_examples=20)
@given(BODIES)
def test_the_last_chunk_of_replace_is_the_plain_answer(shared_client: TestClient, body: dict[str, Any]) -> None:
    plain = shared_client.post("/v1/completions", json={"model": "text"} | body).json()
    frames = stream(shared_client, **body | {"diffusion": body["diffusion"] | {"stream_mode": "replace"}})
    for choice in plain["choices"]:
        assert choices_of(frames, choice["index"])[-1]["text"] == choice["text"]


def test_replace_shows_a_mask_for_what_was_taken_back(client: TestClient) -> None:
    body: dict[str, Any] = {"seed": 5, "max_tokens": 40, "prompt": "a"}
    told = stream(client, **body, diffusion={"transfer": "remdm", "stream_mode": "events"})
    texts = [one["text"] for one in told if one["type"] in ("committed", "revised")]
    shown = choices_of(stream(client, **body, diffusion={"transfer": "remdm", "stream_mode": "replace"}), 0)
    assert [chunk["text"] for chunk in shown[:-1]] == [text for text in texts if text]
    before = 0
    for one in told:
        if one["type"] in ("committed", "revised"):
            masks = one["text"].count("▯")
            if one["type"] == "revised" and "".join(texts).isascii():
                assert masks >= before
            before = masks
    assert sum(one["type"] == "revised" for one in told) > 5


@settings(max_examples=40)
@given(BODIES, st.booleans())
def test_replaying_the_events_rebuilds_the_answer(
    shared_client: TestClient, body: dict[str, Any], baseline: bool
) -> None:
    body = body | {
        "steering": {"interventions": [{"attribute": "topic/sports", "strength": 1.0}], "baseline": baseline}
    }
    plain = shared_client.post("/v1/completions", json={"model": "text"} | body).json()
    frames = stream(shared_client, **body | {"diffusion": body["diffusion"] | {"stream_mode": "events"}})
    prompt = body["prompt"]
    before = list(prompt.encode()) if isinstance(prompt, str) else prompt or []
    for choice in plain["choices"]:
        for twin in (False, True)[: 1 + baseline]:
            mine = [one for one in frames if one["index"] == choice["index"] and one["baseline"] is twin]
            tokens: dict[int, int] = {}
            for one in mine:
                if one["type"] == "committed":
                    assert not tokens.keys() & set(one["positions"]), "a position was committed twice"
                    tokens |= dict(zip(one["positions"], one["tokens"], strict=True))
                if one["type"] == "revised":
                    assert body["diffusion"]["transfer"] == "remdm"
                    for position in one["positions"]:
                        del tokens[position]
            assert sorted(tokens) == list(range(body["max_tokens"]))
            response = [tokens[position] for position in sorted(tokens)]
            response = response[: response.index(END)] if END in response else response
            text = continuation(decode, before, response)
            for stop in body["stop"]:
                text = text.split(stop)[0] if stop in text else text
            answer = choice["baseline"] if twin else choice
            assert text == answer["text"]
            assert [one["text"] for one in mine if one["type"] == "done"] == [answer["text"]]
            assert mine[-1]["type"] == "done"


@settings(max_examples=20)
@given(BODIES)
def test_echoed_streams_join_to_the_echoed_answer(shared_client: TestClient, body: dict[str, Any]) -> None:
    plain = shared_client.post("/v1/completions", json={"model": "text", "echo": True} | body).json()
    for mode in ("append", "replace"):
        frames = stream(shared_client, **body | {"echo": True, "diffusion": {**body["diffusion"], "stream_mode": mode}})
        for choice in plain["choices"]:
            texts = [chunk["text"] for chunk in choices_of(frames, choice["index"])]
            assert ("".join(texts) if mode == "append" else texts[-1]) == choice["text"]


def test_usage_comes_last_where_asked_for(client: TestClient) -> None:
    frames = stream(client, max_tokens=6, stream_options={"include_usage": True})
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["denoising_steps"] == 6
    assert all(frame["usage"] is None for frame in frames[:-1])
    assert not any("usage" in frame for frame in stream(client, max_tokens=6))


@settings(max_examples=40)
@given(BODIES)
def test_the_usage_so_far_only_grows_to_that_of_the_answer(shared_client: TestClient, body: dict[str, Any]) -> None:
    """Whatever a stop string cuts, an end token ends or a transfer takes back."""
    plain = shared_client.post("/v1/completions", json={"model": "text"} | body).json()
    for mode in ("append", "replace", "events"):
        asked = body | {"diffusion": body["diffusion"] | {"stream_mode": mode}}
        frames = stream(shared_client, **asked, stream_options={"continuous_usage_stats": True})
        counts = [frame["usage"]["completion_tokens"] for frame in frames]
        assert counts == sorted(counts)
        assert counts[-1] == plain["usage"]["completion_tokens"]


@settings(max_examples=40)
@given(BODIES)
def test_the_usage_so_far_counts_the_tokens_that_were_sent(shared_client: TestClient, body: dict[str, Any]) -> None:
    body = body | {"n": 1, "diffusion": {"steps": body["diffusion"]["steps"]}}
    prompt = body["prompt"]
    before = list(prompt.encode()) if isinstance(prompt, str) else prompt or []
    params = GenerationParams(prompt=prompt or "", seed=body["seed"], max_tokens=body["max_tokens"])
    tokens = response_tokens(replace(params, prompt=tuple(prompt) if isinstance(prompt, list) else params.prompt))
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    lengths = [len(continuation(decode, before, tokens[: i + 1])) for i in range(len(tokens))]
    sent = ""
    # The last two may hold what was kept back until the row had ended, and tell of all of its tokens.
    for frame in stream(shared_client, **body, stream_options={"continuous_usage_stats": True})[:-2]:
        sent += frame["choices"][0]["text"]
        assert frame["usage"]["completion_tokens"] == sum(length <= len(sent) for length in lengths)


def test_the_usage_so_far_of_a_stop_string_that_is_spread_over_chunks(client: TestClient) -> None:
    written = (response_tokens(params_of(seed)) for seed in range(999))
    seed, tokens = next((n, one) for n, one in enumerate(written) if END not in one and b"the sea" in bytes(one))
    cut = bytes(tokens).index(b"the sea")
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 24, "seed": seed, "stop": ["the sea"]}
    *frames, closing = stream(client, **body, stream_options={"continuous_usage_stats": True})
    assert "".join(frame["choices"][0]["text"] for frame in frames) == bytes(tokens[:cut]).decode()
    assert closing["choices"][0]["finish_reason"] == "stop"
    # A token is a byte here. What may become the stop string is not sent, and not counted before the end.
    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts == sorted(counts)
    assert 0 < max(counts) <= cut
    assert closing["usage"]["completion_tokens"] == 24


def params_of(seed: int) -> GenerationParams:
    return GenerationParams(prompt="a", seed=seed, max_tokens=24)


@pytest.mark.parametrize("mode", ["append", "replace", "events"])
@pytest.mark.parametrize("transfer", ["linear", "remdm"])
def test_the_usage_so_far_counts_steps_and_passes_as_of_each_chunk(
    client: TestClient, mode: str, transfer: str
) -> None:
    steering = {"interventions": [{"attribute": "topic/sports", "strength": 1.0}], "baseline": True}
    body: dict[str, Any] = {"seed": 5, "max_tokens": 20, "prompt": ["a", "bc"], "n": 2, "steering": steering}
    body |= {"diffusion": {"transfer": transfer, "stream_mode": mode, "steps": 20}}
    frames = stream(client, **body, stream_options={"continuous_usage_stats": True, "include_usage": True})
    told = [frame["usage"] for frame in frames]
    # Eight rows that step together: no chunk can know of fewer steps than the last step of all of them.
    steps = [usage["denoising_steps"] for usage in told]
    assert steps == sorted(steps) and steps[0] >= 1 and steps[-1] == 8 * 20
    assert all(usage["forward_passes"] == usage["denoising_steps"] for usage in told)
    assert {usage["prompt_tokens"] for usage in told} == {3}
    assert all(usage["total_tokens"] == 3 + usage["completion_tokens"] for usage in told)
    if mode == "events":
        for frame in frames:
            if "step" in frame:
                # Of the rows before it in the batch this step is counted, of those behind it the one before.
                assert 8 * frame["step"] < frame["usage"]["denoising_steps"] <= 8 * (frame["step"] + 1)
    plain = stream(client, **body | {"stream_options": {"include_usage": True}})
    assert plain[-1]["usage"] == told[-1]
    assert not any(frame.get("usage") for frame in plain[:-1])


def test_the_closing_chunk_carries_receipt_trace_and_baseline(client: TestClient) -> None:
    body: dict[str, Any] = {
        "seed": 3,
        "logprobs": 0,
        "steering": {
            "interventions": [{"attribute": "topic/sports", "strength": 1.0}],
            "baseline": True,
            "trace": {"attributes": ["topic/sports"]},
        },
    }
    [plain] = client.post("/v1/completions", json={"model": "text"} | body).json()["choices"]
    closing = choices_of(stream(client, **body), 0)[-1]
    assert closing == plain | {"text": ""}


def test_typed_events_replay_to_the_answer(client: TestClient) -> None:
    unended = (n for n in range(99) if END not in response_tokens(GenerationParams(seed=n, max_tokens=20)))
    body: dict[str, Any] = {
        "seed": next(unended),
        "max_tokens": 20,
        "steering": {
            "interventions": [{"attribute": "topic/sports", "strength": 1.0}],
            "baseline": True,
            "trace": {"attributes": ["topic/sports"], "every": 5},
        },
    }
    plain = client.post("/v1/completions", json={"model": "text"} | body).json()
    frames = stream(client, **body, diffusion={"stream_mode": "events"}, stream_options={"include_usage": True})
    mine = [frame for frame in frames if frame.get("baseline") is False]
    committed = [frame for frame in mine if frame["type"] == "committed"]
    assert sorted(position for frame in committed for position in frame["positions"]) == list(range(20))
    assert committed[0]["text"].count("▯") == 19
    assert committed[-1]["text"] == plain["choices"][0]["text"]
    said = {at: text for frame in committed for at, text in zip(frame["positions"], frame["token_texts"], strict=True)}
    rest = plain["choices"][0]["text"]
    whole = [said[at].strip() for at in sorted(said) if "\ufffd" not in said[at]]
    assert len(whole) > 1
    for text in filter(None, whole):
        before, found, rest = rest.partition(text)
        assert found == text, (before, text)
    assert [frame["step"] for frame in mine if frame["type"] == "trace"] == [0, 5, 10, 15]
    [receipt] = [frame["steering"] for frame in frames if frame["type"] == "receipt"]
    assert receipt == plain["choices"][0]["steering"]
    done = [frame for frame in frames if frame["type"] == "done"]
    assert {frame["baseline"]: frame["text"] for frame in done} == {
        False: plain["choices"][0]["text"],
        True: plain["choices"][0]["baseline"]["text"],
    }
    assert mine[-1]["type"] == "done"
    assert frames[-1] == {"type": "usage", "id": frames[0]["id"], "usage": plain["usage"]}


def test_a_bad_request_for_a_stream_is_a_plain_error(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"model": "text", "stream": True, "prompt": "bad"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
