"""Several candidates of which the best are answered, on a real engine whose attributes have probes."""

import asyncio
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.engine.api.events import Failed
from steerserve.engine.engine import TorchEngine
from steerserve.server.app import create_app
from steerserve.server.service import Service
from tests.server.asgi import Call, running
from tests.server.gate import Gate
from tests.server.probed import MUTE, OLD, PUSH, SPORTS, answer, body, refusal
from tests.server.text_engine import TextEngine
from tests.server.torch_service import service_of


def best(choices: list[dict[str, Any]], *signs: tuple[str, int]) -> list[int]:
    """Indices of judged choices by the probability of having all attributes (sign 1) or not (-1), best first."""
    worth = []
    for choice in choices:
        told = choice["steering"]["verdicts"]
        worth.append(math.prod(told[name] if sign > 0 else 1 - told[name] for name, sign in signs))
    return sorted(range(len(choices)), key=lambda i: -worth[i])


@pytest.mark.parametrize(
    ("steering", "rank", "signs"),
    [
        ({"rank": [SPORTS]}, None, [(SPORTS, 1)]),
        ({"rank": [SPORTS, f"-{OLD}"]}, None, [(SPORTS, 1), (OLD, -1)]),
        ({"interventions": [PUSH]}, [SPORTS], [(SPORTS, 1)]),
        ({"interventions": [PUSH | {"strength": -0.4}, {"attribute": OLD}]}, [SPORTS, OLD], [(SPORTS, -1), (OLD, 1)]),
        ({"interventions": [PUSH], "rank": [f"-{OLD}"]}, None, [(OLD, -1)]),
    ],
)
def test_the_best_of_what_plain_n_makes_are_answered(
    client: TestClient, steering: dict[str, Any], rank: list[str] | None, signs: list[tuple[str, int]]
) -> None:
    plain = answer(client, n=8, steering=steering | {"rank": rank or steering["rank"]})
    assert [choice["index"] for choice in plain["choices"]] == list(range(8))
    order = best(plain["choices"], *signs)
    assert order != list(range(8))
    found = answer(client, n=3, best_of=8, steering=steering)
    assert [choice["steering"]["candidate"] for choice in found["choices"]] == order[:3]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    for choice, number in zip(found["choices"], order[:3], strict=True):
        same = plain["choices"][number]
        assert choice["text"] == same["text"]
        assert choice["steering"] == same["steering"] | {"candidate": number}
    assert found["usage"] == plain["usage"]
    told = found["steering"]["candidates"]
    assert [one["candidate"] for one in told] == order
    for one in told:
        verdicts = one["verdicts"]
        assert verdicts == plain["choices"][one["candidate"]]["steering"]["verdicts"]
        as_wished = math.prod(verdicts[name] if sign > 0 else 1 - verdicts[name] for name, sign in signs)
        assert math.exp(one["score"]) == pytest.approx(as_wished)
    assert found["steering"]["rank"] == [f"-{name}" if sign < 0 else name for name, sign in signs]


def test_a_seed_answers_the_same_again(client: TestClient) -> None:
    asked: dict[str, Any] = {"n": 2, "best_of": 6, "steering": {"interventions": [PUSH]}}
    first, again, other = (answer(client, **asked, seed=seed) for seed in (7, 7, 8))
    assert (first["choices"], first["steering"]) == (again["choices"], again["steering"])
    assert first["choices"] != other["choices"]


def test_without_an_attribute_the_likeliest_a_token_are_answered(client: TestClient) -> None:
    plain = answer(client, n=6, logprobs=0)
    mean = [sum(one["logprobs"]["token_logprobs"]) / len(one["logprobs"]["tokens"]) for one in plain["choices"]]
    order = sorted(range(6), key=lambda i: -mean[i])
    found = answer(client, n=2, best_of=6)
    assert [choice["steering"]["candidate"] for choice in found["choices"]] == order[:2]
    assert [choice["text"] for choice in found["choices"]] == [plain["choices"][i]["text"] for i in order[:2]]
    assert [choice["logprobs"] for choice in found["choices"]] == [None, None]
    assert [one["score"] for one in found["steering"]["candidates"]] == pytest.approx([mean[i] for i in order])
    assert found["steering"]["rank"] == []
    told = answer(client, n=2, best_of=6, logprobs=0)
    assert [one["logprobs"] for one in told["choices"]] == [plain["choices"][i]["logprobs"] for i in order[:2]]
    steered = answer(client, best_of=4, steering={"interventions": [PUSH], "rank": []})
    assert "verdicts" not in steered["choices"][0]["steering"]


def test_tokens_behind_a_stop_string_do_not_rank(client: TestClient) -> None:
    stop = ["e", answer(client)["choices"][0]["text"][:3]]
    plain = answer(client, n=12, logprobs=0, stop=stop)["choices"]
    told = [one["logprobs"]["token_logprobs"] if one["text"] else [] for one in plain]
    mean = [sum(one) / len(one) if one else None for one in told]
    assert len({len(one) for one in told}) > 2 and None in mean
    found = answer(client, best_of=12, stop=stop)
    scores = {one["candidate"]: one["score"] for one in found["steering"]["candidates"]}
    for i, expected in enumerate(mean):
        assert scores[i] == (None if expected is None else pytest.approx(expected)), i
    filled = [one for i, one in scores.items() if plain[i]["text"].strip()]
    assert filled == sorted(filled, reverse=True)
    assert found["choices"][0]["text"].strip()


def test_each_prompt_has_a_ranking_of_its_own(client: TestClient) -> None:
    steering = {"rank": [SPORTS], "baseline": True}
    prompts = ["the king", "a ship", "the city"]
    plain = answer(client, prompt=prompts, n=4, steering=steering)
    found = answer(client, prompt=prompts, n=2, best_of=4, steering=steering, echo=True, stop="z")
    candidates = [choice["steering"]["candidate"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    assert [number // 4 for number in candidates] == [0, 0, 1, 1, 2, 2]
    assert [one["prompt"] for one in found["steering"]["candidates"]] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(one["text"].startswith(prompts[i // 2]) for i, one in enumerate(found["choices"]))
    ranked = [4 * p + i for p in range(3) for i in best(plain["choices"][4 * p : 4 * p + 4], (SPORTS, 1))[:2]]
    found = answer(client, prompt=prompts, n=2, best_of=4, steering=steering)
    assert [choice["steering"]["candidate"] for choice in found["choices"]] == ranked
    assert [choice["text"] for choice in found["choices"]] == [plain["choices"][i]["text"] for i in ranked]


def test_the_twin_of_each_answered_candidate_is_told_and_judged(client: TestClient) -> None:
    unsteered = answer(client, n=4, steering={"rank": [SPORTS]})["choices"]
    found = answer(client, n=2, best_of=4, steering={"interventions": [PUSH], "baseline": True})
    for choice in found["choices"]:
        twin = unsteered[choice["steering"]["candidate"]]
        assert choice["baseline"] == {
            "text": twin["text"],
            "finish_reason": twin["finish_reason"],
            "verdicts": twin["steering"]["verdicts"],
        }
    # 8 rows of 6 steps, each judged by one forward pass more.
    assert found["usage"]["denoising_steps"] == 48
    assert found["usage"]["forward_passes"] == 56


def test_every_candidate_is_paid_for_and_none_is_taken_for_steered(client: TestClient) -> None:
    def counted(name: str) -> float:
        return sum(
            float(line.split()[-1]) for line in client.get("/metrics").text.splitlines() if line.startswith(name)
        )

    names = ("steerserve_tokens_total", "steerserve_denoising_steps_total", "steerserve_steered_requests_total")
    before = [counted(name) for name in names]
    found = answer(client, best_of=5, steering={"rank": [OLD]})
    after = [counted(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [found["usage"]["completion_tokens"], 30, 0]
    assert found["choices"][0]["steering"]["interventions"] == []
    plain = answer(client, n=5)
    assert found["usage"] == plain["usage"] | {"forward_passes": plain["usage"]["forward_passes"] + 5}
    assert all("steering" not in choice for choice in plain["choices"])
    assert found["choices"][0]["text"] == plain["choices"][found["choices"][0]["steering"]["candidate"]]["text"]


def test_conversations_are_ranked_as_texts_are(client: TestClient) -> None:
    messages = [{"role": "user", "content": "the king"}]
    asked: dict[str, Any] = {"messages": messages, "steering": {"rank": [SPORTS]}}
    plain = answer(client, "chat/completions", n=5, **asked)
    found = answer(client, "chat/completions", best_of=5, **asked)
    [choice] = found["choices"]
    number = best(plain["choices"], (SPORTS, 1))[0]
    assert choice["steering"]["candidate"] == number
    assert choice["message"] == plain["choices"][number]["message"]
    likely = answer(client, "chat/completions", best_of=5, messages=messages)
    assert likely["choices"][0]["logprobs"] is None


def test_a_stream_of_all_candidates_tells_their_verdicts(client: TestClient) -> None:
    steering = {"rank": [SPORTS]}
    plain = answer(client, n=2, steering=steering)["choices"]
    for mode in ("append", "events"):
        diffusion = body()["diffusion"] | {"stream_mode": mode}
        asked = body(n=2, best_of=2, steering=steering, stream=True, diffusion=diffusion)
        lines = client.post("/v1/completions", json=asked).text.splitlines()
        frames = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        told = [one for frame in frames for one in frame.get("choices", [frame]) if "steering" in one]
        assert {one["index"]: one["steering"] for one in told} == {i: plain[i]["steering"] for i in (0, 1)}


def test_a_text_that_was_aborted_is_the_last_choice(client: TestClient) -> None:
    condition = {"attribute": SPORTS, "above": -0.1}
    plain = answer(client, n=8, steering={"rank": [SPORTS], "abort_when": condition})["choices"]
    ended = [i for i, one in enumerate(plain) if one["finish_reason"] == "content_filter" or not one["text"].strip()]
    assert 0 < len(ended) < 8
    found = answer(client, n=7, best_of=8, steering={"rank": [SPORTS], "abort_when": condition})
    told = [one["candidate"] for one in found["steering"]["candidates"]]
    assert set(told[-len(ended) :]) == set(ended)
    reasons = [one["finish_reason"] for one in found["steering"]["candidates"]]
    assert reasons == [plain[i]["finish_reason"] for i in told]


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"best_of": 2, "steering": {"rank": ["nope"]}}, 404, "steering.rank[0]", f"known: {SPORTS}, {OLD}"),
        ({"steering": {"rank": [SPORTS, f"-{MUTE}"]}}, 400, "steering.rank[1]", f"those with one: {SPORTS}, {OLD}"),
        (
            {"best_of": 2, "steering": {"interventions": [PUSH, {"attribute": MUTE}]}},
            400,
            "steering.interventions[1].attribute",
            f"those with one: {SPORTS}, {OLD}; best_of above n ranks by",
        ),
        ({"n": 3, "best_of": 2}, 400, "best_of", "at least n, which is 3, got 2"),
        ({"best_of": 65}, 400, "best_of", "a request may have 64"),
        ({"best_of": 2, "stream": True}, 400, "best_of", "in a stream"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    client: TestClient, fields: dict[str, Any], status: int, param: str, said: str
) -> None:
    found = refusal(client, **fields)
    assert found[:2] == (status, param)
    assert said in found[2]


def test_preview_tells_rows_and_what_ranks(client: TestClient) -> None:
    def previewed(**fields: Any) -> list[Any]:
        told = client.post("/v1/steering/preview", json=body(**fields)).json()
        assert len(told["plans"]) == 1
        return [told[name] for name in ("rows", "n", "best_of", "rank")]

    assert previewed() == [1, 1, 1, None]
    assert previewed(n=2, steering={"rank": [OLD]}) == [2, 2, 2, [OLD]]
    assert previewed(best_of=3) == [3, 1, 3, []]
    steering = {"interventions": [PUSH | {"op": "project_out", "strength": 1.0}], "baseline": True}
    assert previewed(n=2, best_of=3, steering=steering) == [6, 2, 3, [f"-{SPORTS}"]]


class Breaking(TextEngine):
    """Admits rows of which one cannot be run."""

    def step(self) -> Any:
        events = super().step()
        failed = [one for one in self.running if one.params.row == 2]
        self.running = [one for one in self.running if one not in failed]
        return [*events, *(Failed(one.id, "it broke") for one in failed)]


ASKED = {"model": "text", "prompt": "a", "seed": 4, "max_tokens": 40, "n": 2, "best_of": 6}
JUDGED = ASKED | {"steering": {"rank": [SPORTS], "baseline": True}}


@pytest.mark.parametrize("end", ["deleted", "gone", "row"])
def test_a_generation_that_ends_early_leaves_nothing_behind(end: str) -> None:
    engine = Breaking() if end == "row" else TextEngine()

    async def scenario() -> tuple[Call, int]:
        gate = Gate(engine, 0 if end == "row" else 5)
        async with running(engine) as app:
            call = Call("/v1/completions", JUDGED)
            task = asyncio.create_task(call.run(app))
            await gate.held()
            if end == "deleted":
                [name] = app.state.generations.running
                delete = Call(f"/v1/generations/{name}")
                delete.scope["method"] = "DELETE"
                assert (await delete.run(app)).status == 200
            if end == "gone":
                call.gone.set()
                # Before the engine goes on: else the answer might be there first.
                await task
            gate.open()
            await task
            again = await Call("/v1/completions", JUDGED | {"best_of": 2} if end == "row" else JUDGED).run(app)
            return call, again.status

    call, status = asyncio.run(scenario())
    assert call.status == {"deleted": 410, "gone": 0, "row": 500}[end], call.body
    assert status == 200
    assert not engine.waiting and not engine.running


def test_other_interventions_leave_the_ranking_as_it_was() -> None:
    engine = TextEngine()
    steering = {"interventions": [{"attribute": SPORTS, "strength": 1.0}]}
    change = {"steering": {"interventions": [{"attribute": "sentiment/positive", "strength": 1.0}]}}

    async def scenario() -> tuple[Call, Call]:
        gate = Gate(engine, 5)
        async with running(engine) as app:
            call = Call("/v1/completions", ASKED | {"steering": steering})
            task = asyncio.create_task(call.run(app))
            await gate.held()
            [name] = app.state.generations.running
            patch = Call(f"/v1/generations/{name}", change)
            patch.scope["method"] = "PATCH"
            changed = asyncio.create_task(patch.run(app))
            while not app.state.worker._delivery.pending:
                await asyncio.sleep(0.001)
            gate.open()
            await asyncio.gather(task, changed)
            return call, patch

    call, patch = asyncio.run(scenario())
    assert [row["index"] for row in json.loads(patch.body)["rows"]] == list(range(6))
    found = json.loads(call.body)
    assert len(found["choices"]) == 2
    assert found["steering"]["rank"] == [SPORTS]
    assert all(list(one["verdicts"]) == [SPORTS] for one in found["steering"]["candidates"])
    assert len(found["choices"][0]["steering"]["interventions"]) == 2


@pytest.mark.parametrize("path", ["completions", "steering/preview"])
def test_more_candidates_than_the_queue_holds_are_refused_by_name(service: Service, path: str) -> None:
    engine = service.engine
    assert isinstance(engine, TorchEngine)
    small = TorchEngine(engine.model, engine.tokenizer, engine.catalogue, replace(engine.config, max_queue=3))
    with TestClient(create_app(service_of(small, "tiny"), ServerConfig())) as client:
        assert client.get("/capabilities").json()["server"]["max_rows_per_request"] == 3
        said = client.post(f"/v1/{path}", json=body(best_of=4, steering={"rank": []}))
        assert said.status_code == 400 and said.json()["error"]["param"] == "best_of"
        assert "1 prompts x best_of of 4 are 4 rows; a request may have 3" in said.json()["error"]["message"]
        assert client.post(f"/v1/{path}", json=body(best_of=3, steering={"rank": []})).status_code == 200
