"""The effect of a steering on a text is the difference of two forwards."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from steerserve.config import ServerConfig
from steerserve.engine.effects import LoadedEffects
from steerserve.engine.engine import DiffusionEngine
from steerserve.server.app import create_app
from tests import tiny
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.text_engine import TextEngine, serving
from tests.server.torch_service import service_of

VALUES = [float(i % 5 - 2) for i in range(tiny.HIDDEN)]
VECTOR: dict[str, Any] = {"vector": {"layer": 1, "values": VALUES}, "strength": 3.0, "unit": "raw", "scope": "masked"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return tiny.engine(tiny.bert(), tmp_path_factory.mktemp("attributes"))


@pytest.fixture(scope="module")
def client(engine: DiffusionEngine) -> Iterator[TestClient]:
    service = replace(service_of(engine, "tiny"), effects=LoadedEffects(engine))
    with TestClient(create_app(service, ServerConfig())) as opened:
        yield opened


def ask(client: TestClient, **fields: Any) -> Any:
    body = {"text": "the team won the match", "mask_ratio": 0.5, "seed": 1, "k": 5}
    return client.post("/v1/steering/effect", json=body | {"steering": {"interventions": [VECTOR]}} | fields)


def test_it_is_the_difference_of_two_forwards(client: TestClient, engine: DiffusionEngine) -> None:
    told = ask(client).json()
    assert (told["object"], told["model"], told["gains"]) == ("steering.effect", "tiny", [1.0])
    model, facts = engine.model, engine.model.facts
    ids = engine.tokenizer.encode("the team won the match", add_special_tokens=False).ids
    masked = [one["position"] for one in told["data"]]
    assert len(masked) == round(0.5 * len(ids)) and told["progress"] == pytest.approx(1 - len(masked) / len(ids))
    start = [] if facts.bos_id is None else [facts.bos_id]
    canvas = torch.tensor([[*start, *(facts.mask_id if i in masked else one for i, one in enumerate(ids))]])
    unit = torch.nn.functional.normalize(torch.tensor(VALUES), dim=0)

    def site(layer: int, hidden: Tensor) -> Tensor:
        return hidden + 3.0 * unit * (canvas == facts.mask_id)[..., None] if layer == 1 else hidden

    with torch.inference_mode():
        both = []
        for sites in (site, None):
            logits = model.head(model(canvas, None, sites)).double()[0, len(start) :]
            logits[:, list(facts.forbidden_ids)] = -torch.inf
            both.append(logits.log_softmax(1))
    after, before = both
    change = (after - before).nan_to_num(0.0)
    for one in told["data"]:
        mine = change[one["position"]]
        assert [up["change"] for up in one["up"]] == pytest.approx(mine.topk(5).values.tolist(), rel=1e-3, abs=1e-5)
        assert [down["change"] for down in one["down"]] == pytest.approx(
            (-(-mine).topk(5).values).tolist(), rel=1e-3, abs=1e-5
        )
        first = one["up"][0]
        assert first["logprob"] == pytest.approx(float(after[one["position"], first["token_id"]]), abs=1e-4)
        kl = (after.exp() * change).nan_to_num(0.0)[one["position"]].sum()
        assert one["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    mean = change[masked].mean(0)
    assert told["mean"]["up"][0]["change"] == pytest.approx(float(mean.max()), rel=1e-3)


def test_masks_may_stand_in_the_text_and_the_schedule_s_gain_is_told(client: TestClient) -> None:
    told = ask(client, text="the [MASK] won", mask_ratio=0, steering="topic/sports@2:window(start=0, stop=0.1)").json()
    [one] = told["data"]
    assert told["gains"] == [0.0] and one["kl"] == 0.0 and one["up"] == one["down"] == []
    assert ask(client, text="the [MASK] won", mask_ratio=0, steering="topic/sports@2:uniform").json()["data"][0]["up"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"mask_ratio": 0}, 400, "mask_ratio"),
        ({"mask_ratio": 2}, 400, "mask_ratio"),
        ({"text": ""}, 400, "text"),
        ({"text": "the team " * 200}, 400, "text"),
        ({"text": [1, 99999]}, 400, "text[1]"),
        ({"k": 0}, 400, "k"),
        ({"steering": {}}, 400, "steering"),
        ({"steering": "a@"}, 400, "steering"),
        ({"steering": {"interventions": [{"attribute": "nope"}]}}, 404, "steering.interventions[0].attribute"),
        (
            {"steering": {"interventions": [VECTOR | {"when": {"progress": {"at_least": 0.5}}}]}},
            400,
            "steering.interventions[0]",
        ),
    ],
)
def test_a_bad_request_is_refused_by_name(client: TestClient, fields: dict[str, Any], status: int, param: str) -> None:
    refused = ask(client, **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text


def test_an_engine_that_cannot_tell_says_so() -> None:
    with serving(TextEngine()) as client:
        assert ask(client).status_code == 404


def test_a_key_s_policy_holds(engine: DiffusionEngine, tmp_path: Path) -> None:
    """What is denied, or works against what is mandatory, is refused."""
    mandatory = {"attribute": "topic/sports", "strength": 1.0}
    policy: dict[str, Any] = {"denied_attributes": ["both"], "mandatory": [mandatory]}
    policy |= {"max_strength": {"residual": 1.0}, "max_loudness": 2.0}
    service = replace(service_of(engine, "tiny"), effects=LoadedEffects(engine))
    config = ServerConfig(keys=keys_file(tmp_path, entry(**policy), entry("free", "free-secret")))
    with TestClient(create_app(service, config)) as opened:

        def told(interventions: list[dict[str, Any]], secret: str = SECRET) -> Any:
            opened.headers["Authorization"] = f"Bearer {secret}"
            return ask(opened, steering={"interventions": interventions})

        assert told([VECTOR], "nobody's").status_code == 401
        denied = told([{"attribute": "both", "strength": 1.0}])
        assert (denied.status_code, denied.json()["error"]["code"]) == (403, "policy"), denied.text
        assert told([{"attribute": "topic/sports", "strength": -1.0}]).status_code == 403
        assert told([VECTOR]).status_code == 403 and told([VECTOR], "free-secret").status_code == 200
