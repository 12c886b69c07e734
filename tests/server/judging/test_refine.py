"""Texts that are refined, asked for over HTTP, on a real engine whose attributes have probes."""

import asyncio
import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.api.text import continuation
from steerserve.engine.engine import DiffusionEngine
from steerserve.runtime.cards import capabilities
from steerserve.server.app import create_app
from steerserve.server.service import Service
from tests.server.asgi import Call
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.probed import MUTE, OLD, PUSH, SPORTS, answer, body, refusal
from tests.server.sockets import PATIENCE

ROUNDS = {"rounds": 8, "span": 4}
AGAINST = PUSH | {"strength": -0.4}
MESSAGES = [{"role": "user", "content": "the king"}]


def likelihood(choice: dict[str, Any], signs: dict[str, int]) -> float:
    """The log-probability that a judged choice has the attributes (sign 1) or not (-1)."""
    verdicts = choice["steering"]["verdicts"]
    return sum(math.log(verdicts[name] if sign > 0 else 1 - verdicts[name]) for name, sign in signs.items())


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("steering", "signs"),
    [
        ({"interventions": [PUSH]}, {SPORTS: 1}),
        ({"interventions": [AGAINST]}, {SPORTS: -1}),
        ({"interventions": [AGAINST, {"attribute": OLD}]}, {SPORTS: -1, OLD: 1}),
        ({"interventions": [PUSH], "rank": [f"-{OLD}"]}, {OLD: -1}),
        ({"rank": [SPORTS, f"-{OLD}"]}, {SPORTS: 1, OLD: -1}),
        ({"rank": [OLD]}, {OLD: 1}),
    ],
)
def test_a_refined_text_is_likelier_as_wished_than_its_draft(
    client: TestClient, path: str, steering: dict[str, Any], signs: dict[str, int]
) -> None:
    shared: dict[str, Any] = {"n": 3} | ({"messages": MESSAGES} if path != "completions" else {})
    judged = steering | {"rank": [name if sign > 0 else f"-{name}" for name, sign in signs.items()]}
    drafts = answer(client, path, **shared, steering=judged)
    found = answer(client, path, **shared, steering=steering | {"refine": ROUNDS})
    kept = 0
    for draft, choice in zip(drafts["choices"], found["choices"], strict=True):
        told = choice["steering"]["refined"]
        assert set(choice["steering"]["verdicts"]) == set(signs)
        assert told["first_score"] == pytest.approx(likelihood(draft, signs), abs=1e-5)
        assert told["score"] == pytest.approx(likelihood(choice, signs), abs=1e-5)
        assert len(told["rounds"]) == 8
        assert told["kept"] == sum(one["kept"] for one in told["rounds"])
        best = told["first_score"]
        for one in told["rounds"]:
            assert one["kept"] == (one["score"] > best)
            best = max(best, one["score"])
            first, end = one["span"]
            assert 0 <= first < end <= 12
        assert told["score"] == best
        said = "message" if path != "completions" else "text"
        assert (choice[said] == draft[said]) == (told["kept"] == 0)
        assert told["judging_passes"] == 9
        kept += told["kept"]
        assert choice["steering"]["steps"] > 6
    assert kept > 2
    assert found["usage"]["denoising_steps"] == sum(one["steering"]["steps"] for one in found["choices"])
    assert found["usage"]["forward_passes"] == sum(
        one["steering"]["forward_passes"] + one["steering"]["refined"]["judging_passes"] for one in found["choices"]
    )
    for choice in found["choices"]:
        pushed = [one["name"] for one in choice["steering"]["interventions"]]
        assert pushed == [one["attribute"] for one in steering.get("interventions", [])]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_every_candidate_is_refined_and_the_best_of_them_answered(client: TestClient, path: str) -> None:
    steering = {"interventions": [AGAINST, {"attribute": OLD}], "refine": ROUNDS, "baseline": True}
    shared: dict[str, Any] = {"messages": MESSAGES} if path != "completions" else {}
    plain = answer(client, path, n=6, steering=steering, **shared)
    scores = [one["steering"]["refined"]["score"] for one in plain["choices"]]
    order = sorted(range(6), key=lambda i: -scores[i])
    assert order != list(range(6))
    found = answer(client, path, n=2, best_of=6, steering=steering, **shared)
    for choice, number in zip(found["choices"], order[:2], strict=True):
        same = plain["choices"][number]
        assert choice["steering"] == same["steering"] | {"candidate": number}
        assert {**choice, "index": 0, "steering": None} == {**same, "index": 0, "steering": None}
    assert found["usage"] == plain["usage"]
    assert [one["candidate"] for one in found["steering"]["candidates"]] == order
    told = [one["score"] for one in found["steering"]["candidates"]]
    assert told == pytest.approx([scores[i] for i in order], abs=1e-5)


def test_prompts_and_samples_are_refined_each_by_itself(client: TestClient) -> None:
    steering = {"interventions": [PUSH], "refine": ROUNDS}
    both = answer(client, prompt=["the king", "a ship"], n=2, steering=steering)["choices"]
    first = answer(client, n=2, steering=steering)["choices"]
    assert both[:2] == first
    assert len({tuple(one["span"][0] for one in choice["steering"]["refined"]["rounds"]) for choice in both}) > 1


def test_a_twin_is_neither_pushed_nor_refined(client: TestClient) -> None:
    [plain] = answer(client, steering={"rank": [SPORTS]})["choices"]
    [found] = answer(client, steering={"interventions": [PUSH], "refine": ROUNDS, "baseline": True})["choices"]
    assert found["steering"]["refined"]["rounds"]
    twin = {"text": plain["text"], "finish_reason": plain["finish_reason"], "verdicts": plain["steering"]["verdicts"]}
    assert found["baseline"] == twin


def streamed(client: TestClient, path: str, mode: str, **fields: Any) -> list[dict[str, Any]]:
    asked = body(**fields) | {"stream": True, "stream_options": {"include_usage": True}}
    asked["diffusion"] = asked["diffusion"] | {"stream_mode": mode}
    if path != "completions":
        del asked["prompt"]
    response = client.post(f"/v1/{path}", json=asked)
    assert response.status_code == 200, response.text
    lines = response.text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


WAYS: list[dict[str, Any]] = [
    {},
    {"diffusion": {"steps": 6, "order": "random", "block_length": 4}},
    {"diffusion": {"steps": 6, "order": "confidence", "transfer": {"type": "remdm", "eta": 0.3}}},
    {"stop": ["e"]},
    {"seed": 8, "n": 2},
    {"logprobs": 2},
    {"steering": {"trace": {"attributes": [OLD], "every": 3, "positions": True}}},
    {"steering": {"interventions": [PUSH | {"schedule": "feedback"}], "measure_kl": True}},
    {"steering": {"remask_when": {"condition": {"progress": {"at_least": 0.5}}, "times": 2}}},
]


@pytest.mark.parametrize("more", WAYS)
def test_streams_of_a_refined_text_come_to_the_answer(
    client: TestClient, service: Service, more: dict[str, Any]
) -> None:
    steering = {"interventions": [PUSH], "refine": ROUNDS, "baseline": True} | more.get("steering", {})
    asked: dict[str, Any] = more | {"steering": steering}
    found = answer(client, **asked)
    for mode in ("append", "replace"):
        *frames, last = streamed(client, "completions", mode, **asked)
        assert last["usage"] == found["usage"]
        said: dict[int, str] = {}
        for frame in frames:
            for choice in frame["choices"]:
                index = choice["index"]
                said[index] = said.get(index, "") + choice["text"] if mode == "append" else choice["text"]
        assert said == {one["index"]: one["text"] for one in found["choices"]}
        told = {one["index"]: one for frame in frames for one in frame["choices"] if one["finish_reason"]}
        for choice in found["choices"]:
            assert told[choice["index"]] | {"text": choice["text"]} == choice
    *events, last = streamed(client, "completions", "events", **asked)
    assert last["usage"] == found["usage"]
    for choice in found["choices"]:
        mine = [one for one in events if one["index"] == choice["index"] and not one["baseline"]]
        tokens: dict[int, int] = {}
        logprobs: dict[int, float] = {}
        for one in mine:
            if one["type"] == "committed":
                assert not tokens.keys() & set(one["positions"])
                tokens |= dict(zip(one["positions"], one["tokens"], strict=True))
                logprobs |= dict(zip(one["positions"], one.get("logprobs", one["tokens"]), strict=True))
            if one["type"] == "revised":
                for position in one["positions"]:
                    del tokens[position], logprobs[position]
        assert any(one["type"] == "revised" for one in mine)
        receipt, done = mine[-2:]
        assert receipt["steering"] == choice["steering"]
        assert (done["text"], done["finish_reason"]) == (choice["text"], choice["finish_reason"])
        assert sorted(tokens) == list(range(12))
        response = [tokens[i] for i in range(12)]
        ends = [i for i, token in enumerate(response) if token in service.end_ids]
        response = response[: ends[0]] if ends else response
        assert done["completion_tokens"] == len(response)
        prompt = service.engine.admit(GenerationParams(prompt=body()["prompt"], max_tokens=12)).prompt_ids
        text = continuation(service.decode, prompt, response)
        assert text.startswith(done["text"])
        if "stop" not in more:
            assert text == done["text"]
        if "logprobs" in more:
            assert [logprobs[i] for i in range(len(response))] == choice["logprobs"]["token_logprobs"]


def test_a_text_that_is_aborted_while_it_is_refined_is_told_as_filtered(client: TestClient) -> None:
    steering = {"interventions": [PUSH], "refine": ROUNDS, "abort_when": {"attribute": SPORTS, "above": 0.0}}
    found = answer(client, n=8, steering=steering)["choices"]
    ended = [one for one in found if one["finish_reason"] == "content_filter"]
    refined = [one for one in ended if one["steering"]["refined"]["rounds"]]
    assert refined and len(ended) < 8
    assert all(list(one["steering"]["verdicts"]) == [SPORTS] for one in found)
    assert all(len(one["steering"]["refined"]["rounds"]) < 8 for one in ended)
    frames = streamed(client, "completions", "append", n=8, steering=steering)[:-1]
    said = [""] * 8
    for frame in frames:
        for one in frame["choices"]:
            said[one["index"]] += one["text"]
    assert said == [one["text"] for one in found]


def test_a_refined_conversation_is_streamed_to_the_answer(client: TestClient) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "steering": {"rank": [f"-{OLD}"], "refine": ROUNDS}}
    found = answer(client, "chat/completions", **asked)
    [choice] = found["choices"]
    *frames, last = streamed(client, "chat/completions", "append", **asked)
    said = "".join(one["delta"].get("content", "") for frame in frames for one in frame["choices"])
    assert said == choice["message"]["content"]
    assert frames[-1]["choices"][0]["steering"] == choice["steering"]
    assert last["usage"] == found["usage"]


def test_logprobs_are_those_of_the_tokens_that_stayed(client: TestClient) -> None:
    asked: dict[str, Any] = {"n": 4, "steering": {"interventions": [PUSH], "refine": ROUNDS}}
    plain, told = answer(client, **asked), answer(client, **asked, logprobs=2)
    assert [one["text"] for one in told["choices"]] == [one["text"] for one in plain["choices"]]
    for choice in told["choices"]:
        assert choice["steering"]["refined"]["kept"] < 8
        said = choice["logprobs"]
        assert "".join(said["tokens"]) == choice["text"]
        assert len(said["token_logprobs"]) == len(said["tokens"])
        for token, logprob, likeliest in zip(said["tokens"], said["token_logprobs"], said["top_logprobs"], strict=True):
            assert len(likeliest) == 2 and logprob <= max(likeliest.values()) + 1e-6
            if token in likeliest:
                assert likeliest[token] == pytest.approx(logprob)


def test_preview_tells_the_rounds_and_the_most_steps(client: TestClient) -> None:
    def previewed(**fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        response = client.post("/v1/steering/preview", json=body(**fields))
        assert response.status_code == 200, response.text
        head = response.json()
        [plan] = head.pop("plans")
        return head, plan

    steering = {"interventions": [AGAINST], "refine": ROUNDS}
    head, plan = previewed(steering=steering, best_of=3)
    assert (head["rows"], head["best_of"], head["rank"]) == (3, 3, [f"-{SPORTS}"])
    each = plan["refine"]["round_steps"]
    assert plan["refine"] == ROUNDS | {"round_steps": each}
    assert (plan["steps"], plan["max_steps"], plan["revises"], plan["revised_within"]) == (6, 6 + 8 * each, True, 12)
    assert list(plan["verdicts"]) == [SPORTS]
    for choice in answer(client, n=4, steering=steering)["choices"]:
        assert 6 < choice["steering"]["steps"] <= plan["max_steps"]
    _, plan = previewed(steering={"rank": [OLD], "refine": {}})
    assert (plan["refine"]["rounds"], plan["refine"]["span"]) == (16, 4)
    _, plan = previewed(steering={"interventions": [PUSH]})
    assert plan["refine"] is None and not plan["revises"] and not plan["verdicts"]


def test_null_is_the_same_as_left_out(client: TestClient) -> None:
    pushed: dict[str, Any] = {"interventions": [PUSH]}
    spelt = answer(client, steering=pushed | {"refine": {"rounds": None, "span": None}})
    assert spelt["choices"] == answer(client, steering=pushed | {"refine": {}})["choices"]
    assert len(spelt["choices"][0]["steering"]["refined"]["rounds"]) == 16
    assert answer(client, steering=pushed | {"refine": None})["choices"] == answer(client, steering=pushed)["choices"]


FEATURE = {"feature": {"sae": "layer-1-mask", "index": 3}, "strength": 0.4, "unit": "raw"}
WRONG: list[tuple[dict[str, Any], int, str, str]] = [
    ({"refine": 3}, 400, "steering.refine", "got 3"),
    ({"refine": True}, 400, "steering.refine", "got true"),
    ({"refine": {"rounds": 0}}, 400, "steering.refine.rounds", "1"),
    ({"refine": {"rounds": 257}}, 400, "steering.refine.rounds", "256"),
    ({"refine": {"rounds": 2.5}}, 400, "steering.refine.rounds", "integer"),
    ({"refine": {"rounds": True}}, 400, "steering.refine.rounds", "integer"),
    ({"refine": {"rounds": "8"}}, 400, "steering.refine.rounds", "integer"),
    ({"refine": {"span": 0}}, 400, "steering.refine.span", "1"),
    ({"refine": {"span": 13}}, 400, "steering.refine.span", "max_tokens (12), got 13"),
    ({"refine": {"span": 1.5}}, 400, "steering.refine.span", "integer"),
    ({"refine": {"round": 3}}, 400, "steering.refine.round", "known: rounds, span"),
    ({"refine": {"round": None}}, 400, "steering.refine.round", "known: rounds, span"),
    ({"refine": {}, "interventions": []}, 400, "steering.refine", "push an attribute by name"),
    ({"refine": {}, "interventions": [FEATURE]}, 400, "steering.refine", "name some in steering.rank"),
    ({"refine": {}, "rank": []}, 400, "steering.rank", "at least one attribute"),
    ({"refine": {}, "rank": ["nope"]}, 404, "steering.rank[0]", f"known: {SPORTS}, {OLD}"),
    ({"refine": {}, "rank": [OLD, f"-{MUTE}"]}, 400, "steering.rank[1]", f"those with one: {SPORTS}, {OLD}"),
    ({"refine": {}, "rank": [OLD, f"-{OLD}"]}, 400, "steering.rank[1]", "named before"),
    (
        {"refine": {}, "interventions": [PUSH, {"attribute": MUTE}]},
        400,
        "steering.interventions[1].attribute",
        f"those with one: {SPORTS}, {OLD}; steering.refine goes by",
    ),
    ({"refine": {}, "interventions": [PUSH, AGAINST]}, 400, "steering.interventions[1].attribute", "both ways"),
]


@pytest.mark.parametrize(("steering", "status", "param", "said"), WRONG)
def test_what_cannot_be_refined_is_refused_by_its_field(
    client: TestClient, steering: dict[str, Any], status: int, param: str, said: str
) -> None:
    found = refusal(client, steering={"interventions": [PUSH]} | steering)
    assert found[:2] == (status, param), found
    assert said in found[2]


def test_what_refinement_cannot_go_with_is_refused_by_its_field(client: TestClient) -> None:
    steering = {"interventions": [PUSH], "refine": {}}
    shape = body()["diffusion"]
    for fields, param, said in (
        ({"diffusion": shape | {"cache": "dual"}}, "steering.refine", "cannot go with a cache"),
        ({"diffusion": shape | {"early_exit": True}}, "diffusion.early_exit", "cannot go with"),
        ({"best_of": 2, "stream": True}, "best_of", "in a stream"),
        ({"diffusion": shape | {"steps": 300}, "max_tokens": 64, "refine": 256}, "steering.refine.rounds", "at most"),
    ):
        rounds = fields.pop("refine", 4)
        found = refusal(client, steering=steering | {"refine": {"rounds": rounds}}, **fields)
        assert found[:2] == (400, param), found
        assert said in found[2]
    found = refusal(client, best_of=2, steering={"interventions": [PUSH, {"attribute": MUTE}], "refine": {}})
    assert "steering.refine goes by" in found[2]


def test_the_paid_steps_are_counted_and_no_push_is_made_up(client: TestClient) -> None:
    names = ("tokens", "denoising_steps", "forward_passes", "steered_requests", "steering_predicted_kl")
    suffixes = ("_total", "_total", "_total", "_total", "_count")

    def counted() -> list[float]:
        lines = client.get("/metrics").text.splitlines()
        wanted = [f"steerserve_{name}{suffix} " for name, suffix in zip(names, suffixes, strict=True)]
        return [sum(float(line.split()[-1]) for line in lines if line.startswith(one)) for one in wanted]

    before = counted()
    found = answer(client, n=2, steering={"rank": [OLD], "refine": ROUNDS})
    after = counted()
    usage = found["usage"]
    paid = [usage["completion_tokens"], usage["denoising_steps"], usage["forward_passes"]]
    assert [b - a for a, b in zip(before, after, strict=True)] == [*paid, 0, 0]
    assert [one["steering"]["interventions"] for one in found["choices"]] == [[], []]


@pytest.mark.parametrize("path", ["completions", "steering/preview"])
def test_a_key_with_a_mandatory_intervention_refuses_it(tmp_path: Path, service: Service, path: str) -> None:
    mandatory = {"attribute": OLD, "strength": 0.4, "schedule": "uniform", "scope": "masked"}
    keys = keys_file(tmp_path, entry(mandatory=[mandatory]), entry("free", "free-secret"))
    with TestClient(create_app(service, ServerConfig(drain_seconds=5, keys=keys))) as client:
        for steering in ({"rank": [SPORTS], "refine": {}}, {"rank": [f"-{OLD}"], "refine": {"rounds": 2}}):
            asked = body(steering=steering)
            refused = client.post(f"/v1/{path}", json=asked, headers={"authorization": f"Bearer {SECRET}"})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["param"]) == (403, "policy", "steering.refine")
            assert "carries a mandatory intervention" in error["message"]
            free = client.post(f"/v1/{path}", json=asked, headers={"authorization": "Bearer free-secret"})
            assert free.status_code == 200, free.text


def test_an_attribute_that_a_key_denies_is_not_refined_by(tmp_path: Path, service: Service) -> None:
    keys = keys_file(tmp_path, entry(denied_attributes=["register/*"]))
    with TestClient(create_app(service, ServerConfig(drain_seconds=5, keys=keys))) as client:
        asked = body(steering={"rank": [SPORTS, f"-{OLD}"], "refine": {}})
        refused = client.post("/v1/completions", json=asked, headers={"authorization": f"Bearer {SECRET}"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "steering.rank[1]")


def test_the_document_has_it(client: TestClient) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    document = {"$ref": "#/components/schemas/CompletionRequest", "components": {"schemas": schemas}}
    validator = jsonschema.Draft202012Validator(document)
    right: list[Any] = [None, {}, {"rounds": 256, "span": 3}, {"rounds": None, "span": None}]
    for refine in right:
        validator.validate(body(steering={"rank": [SPORTS], "refine": refine}))
    wrong: list[Any] = [3, {"rounds": 0}, {"rounds": 257}, {"span": 0}, {"round": 1}]
    for refine in wrong:
        assert list(validator.iter_errors(body(steering={"rank": [SPORTS], "refine": refine}))), refine


def test_capabilities_say_how_many_rounds_there_may_be(service: Service) -> None:
    engine = service.engine
    assert isinstance(engine, DiffusionEngine)
    assert capabilities(engine)["max_refine_rounds"] == 256


class HeldEngine(DiffusionEngine):
    """Makes so many steps, then waits until it is let go on."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.free, self.held, self.go_on = 10, threading.Event(), threading.Event()

    def step(self) -> Any:
        if self.batcher.rows and self.steps >= self.free:
            self.held.set()
            assert self.go_on.wait(PATIENCE)
        return super().step()


@pytest.mark.parametrize("interventions", [[], [AGAINST], [{"attribute": MUTE}]])
def test_other_interventions_leave_what_it_is_refined_by_as_it_was(
    service: Service, interventions: list[dict[str, Any]]
) -> None:
    old = service.engine
    assert isinstance(old, DiffusionEngine)
    engine = HeldEngine(old.model, old.tokenizer, old.catalogue, old.config)
    mode = {"stream": True, "diffusion": body()["diffusion"] | {"stream_mode": "events"}}
    asked = body(steering={"interventions": [PUSH], "refine": ROUNDS}, **{"stream": True}) | mode

    async def scenario() -> tuple[Call, Call]:
        app = create_app(replace(service, engine=engine), ServerConfig(drain_seconds=5))
        async with app.router.lifespan_context(app):
            call = Call("/v1/completions", asked)
            task = asyncio.create_task(call.run(app))
            await asyncio.to_thread(engine.held.wait, PATIENCE)
            patch = Call(
                f"/v1/generations/{call.headers['x-generation-id']}", {"steering": {"interventions": interventions}}
            )
            patch.scope["method"] = "PATCH"
            changing = asyncio.create_task(patch.run(app))
            while not changing.done() and not app.state.worker._delivery.pending:
                await asyncio.sleep(0.001)
            engine.go_on.set()
            await asyncio.gather(changing, task)
            return patch, call

    patch, call = asyncio.run(scenario())
    assert patch.status == 200, patch.body
    [row] = json.loads(patch.body)["rows"]
    [plan] = json.loads(patch.body)["plans"]
    assert plan["refine"]["rounds"] == 8 and list(plan["verdicts"]) == [SPORTS]
    lines = call.body.decode().splitlines()
    frames = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    receipt = frames[-2]["steering"]
    assert list(receipt["verdicts"]) == [SPORTS]
    assert receipt["interventions"][0]["until_step"] == row["from_step"]
    told = receipt["refined"]
    assert len(told["rounds"]) == 8
    assert told["score"] == max([told["first_score"], *(one["score"] for one in told["rounds"])])
    assert told["score"] == pytest.approx(math.log(receipt["verdicts"][SPORTS]), abs=1e-5)
