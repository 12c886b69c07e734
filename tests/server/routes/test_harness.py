"""Evaluation harnesses read log-probabilities of prompts as lm-evaluation-harness's `local-completions` does."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.engine.engine import TorchEngine
from steerserve.server.app import create_app
from tests import tiny
from tests.engine.test_scoring import straight
from tests.server.torch_service import service_of

CONTEXT, CONTINUATIONS = "the king", ("won the match", "lost", "and then a ship")


@pytest.fixture(scope="module", params=["bert", "dream"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    return tiny.engine(getattr(tiny, request.param)(), tmp_path_factory.mktemp("attributes"))


@pytest.fixture(scope="module")
def client(served: TorchEngine) -> Iterator[TestClient]:
    with TestClient(create_app(service_of(served), ServerConfig(drain_seconds=5))) as made:
        yield made


def ids_of(text: str) -> list[int]:
    return list(tiny.tokenizer().encode(text, add_special_tokens=False).ids)


def asked(client: TestClient, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "text", "prompt": prompt, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    answer = client.post("/v1/completions", json=body | fields)
    assert answer.status_code == 200, answer.text
    return sorted(answer.json()["choices"], key=lambda choice: int(choice["index"]))


def read(choice: dict[str, Any], behind: int, last: int | None) -> tuple[float, bool]:
    """Log-probability of what follows the context, and whether each of its tokens was the likeliest."""
    told = choice["logprobs"]
    own, best = told["token_logprobs"][behind:last], told["top_logprobs"][behind:last]
    return sum(own), all(one == max(top.values()) for one, top in zip(own, best, strict=True))


def expected(served: TorchEngine, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    start = [] if served.model.facts.bos_id is None else [served.model.facts.bos_id]
    prompt = (*start, *context, *continuation)
    with torch.inference_mode():
        found = [straight(served, prompt, place) for place in range(len(prompt) - len(continuation), len(prompt))]
    pairs = list(zip(found, continuation, strict=True))
    return sum(float(log_p[token]) for log_p, token in pairs), all(int(p.argmax()) == token for p, token in pairs)


@pytest.mark.parametrize(("length", "last"), [(1, -1), (0, None)])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_harness_reads_the_likelihoods_of_continuations(
    served: TorchEngine, client: TestClient, length: int, last: int | None, as_text: bool
) -> None:
    context = ids_of(CONTEXT)
    texts = [f"{CONTEXT} {one}" for one in CONTINUATIONS]
    prompts: Any = texts if as_text else [[*context, *ids_of(one)] for one in CONTINUATIONS]
    choices = asked(client, prompts, max_tokens=length)
    for choice, continuation, text in zip(choices, CONTINUATIONS, texts, strict=True):
        found = read(choice, len(context), last)
        likelihood, greedy = expected(served, context, ids_of(continuation))
        assert found[0] == pytest.approx(likelihood, abs=1e-3)
        assert found[1] == greedy
        assert choice["text"].startswith(text)
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(context) + len(ids_of(continuation)) + length
        assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)


def test_what_is_generated_is_the_last_token_though_it_ended_the_text(tmp_path: Path) -> None:
    model = tiny.bert()
    [bias] = (one for one in model.parameters() if one.shape == (tiny.VOCAB,))
    with torch.no_grad():
        bias[tiny.EOS] += 1000
    with TestClient(create_app(service_of(tiny.engine(model, tmp_path)), ServerConfig(drain_seconds=5))) as client:
        [choice] = asked(client, CONTEXT, max_tokens=1)
    told = choice["logprobs"]
    assert (choice["finish_reason"], choice["text"], told["tokens"][-1]) == ("stop", CONTEXT, "[SEP]")
    assert {len(told[name]) for name in told} == {len(ids_of(CONTEXT)) + 1}
    assert (told["text_offset"][-1], told["top_logprobs"][-1]["[SEP]"]) == (len(CONTEXT), told["token_logprobs"][-1])


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_stream_tells_them_at_the_end_of_each_choice(client: TestClient, mode: str) -> None:
    body = {"max_tokens": 4, "n": 2, "temperature": 1}
    plain = asked(client, CONTEXT, **body)
    answer = client.post(
        "/v1/completions",
        json={"model": "text", "prompt": CONTEXT, "logprobs": 1, "echo": True, "seed": 1234, "stream": True}
        | body
        | {"diffusion": {"stream_mode": mode}, "stream_options": {"continuous_usage_stats": True}},
    )
    frames = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
    told = {one["index"]: one["logprobs"] for frame in frames for one in frame["choices"] if one["logprobs"]}
    assert told == {choice["index"]: choice["logprobs"] for choice in plain}
    passes = [frame["usage"]["forward_passes"] for frame in frames]
    assert passes == sorted(passes) and passes[-1] == 2 * (4 + len(ids_of(CONTEXT)) - 1)


def test_what_cannot_go_with_them_is_refused_by_field(client: TestClient) -> None:
    body = {"model": "text", "prompt": CONTEXT, "logprobs": 1, "echo": True, "max_tokens": 2}
    for fields, param in (
        ({"steering": {"limits": {"max_delta": 0.1}}}, "steering.limits"),
        ({"diffusion": {"cfg_scale": 1.0}}, "diffusion.cfg_scale"),
        ({"max_tokens": 0, "steering": {"trace": {"attributes": ["register/archaic"]}}}, "steering.trace"),
    ):
        answer = client.post("/v1/completions", json=body | fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
