"""The vLLM engine without vLLM: the rows of a step laid end to end are what they are side by side."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.config import EngineConfig
from steerserve.engine.api.base import Reading
from steerserve.engine.api.events import Failed, Steered
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Limits
from steerserve.engine.engine import TorchEngine
from steerserve.engine.features import LoadedFeatures
from steerserve.engine.vllm.engine import VllmEngine, first_logits
from steerserve.engine.vllm.features import FarFeatures
from steerserve.engine.vllm.task import DIRECTIONS
from steerserve.errors import RequestError, SelfTestError
from steerserve.models import DiffusionLM
from steerserve.runtime.self_test import check_steering
from tests import tiny
from tests.engine.alike import assert_alike, close
from tests.engine.flat_workers import FlatWorkers
from tests.engine.mixed import mixed, row, watching

MODELS: Mapping[str, Any] = {"llada": tiny.llada, "dream": tiny.dream}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> DiffusionLM:
    made: DiffusionLM = MODELS[request.param]()
    return made


@pytest.fixture
def reference(model: DiffusionLM, tmp_path: Path) -> TorchEngine:
    return tiny.engine(model, tmp_path / "torch", max_rows=16)


def flat(model: DiffusionLM, folder: Path, seed: int | None = None) -> VllmEngine:
    catalogue = tiny.catalogue(model, folder / f"flat-{seed}")
    workers = FlatWorkers(model, catalogue.saes, seed)
    return VllmEngine(model, tiny.tokenizer(), catalogue, EngineConfig(max_rows=16), workers)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_sixteen_rows_of_every_kind_are_what_the_torch_engine_makes(
    model: DiffusionLM, reference: TorchEngine, tmp_path: Path, seed: int | None
) -> None:
    rows = mixed(tiny.HIDDEN)
    found = tiny.run(flat(model, tmp_path, seed), *rows)
    for (_, one), (_, other) in zip(found, tiny.run(reference, *rows), strict=True):
        assert_alike(one, other)
    assert found[0][1].tokens != found[1][1].tokens


@pytest.mark.parametrize("seed", [None, 2])
def test_conditions_and_readings_by_position_are_what_the_torch_engine_makes(
    model: DiffusionLM, reference: TorchEngine, tmp_path: Path, seed: int | None
) -> None:
    rows = watching()
    found = tiny.run(flat(model, tmp_path, seed), *rows)
    expected = tiny.run(reference, *rows)
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert_alike(one, other)
    assert found[2][1].finish_reason == "content_filter"
    assert found[4][1].trace[0].positions is not None
    held = [one.receipt["interventions"][0]["held_passes"] for _, one in found[:2] if one.receipt]
    assert 0 < sum(held) < sum(one.forward_passes for _, one in found[:2])


def test_a_loop_that_reads_and_pushes_is_what_the_torch_engine_makes(
    model: DiffusionLM, reference: TorchEngine, tmp_path: Path
) -> None:
    loop: dict[str, Any] = {"type": "feedback", "gain": 2.0, "hold": 8.0, "lead": 0.25, "rate": 0.3, "release": 2}
    fed = row(interventions=(Intervention(attribute="topic/sports", strength=4.0, schedule=loop),))
    rows = [fed, row(), replace(fed, prompt="the team", max_tokens=24)]
    found = tiny.run(flat(model, tmp_path, 4), *rows)
    for (_, one), (_, other) in zip(found, tiny.run(reference, *rows), strict=True):
        assert_alike(one, other)


def test_budgets_and_bounds_are_held_as_by_the_torch_engine(
    model: DiffusionLM, reference: TorchEngine, tmp_path: Path
) -> None:
    old = Intervention(attribute="register/archaic", strength=2.0)
    spent = row(
        interventions=(old,), transfer={"type": "threshold", "value": 0.3}, limits=Limits(max_predicted_kl=0.05)
    )
    over = row(interventions=(old,), limits=Limits(max_delta=0.01, on_exceed="refuse"))
    told = []
    for engine in (flat(model, tmp_path, 5), reference):
        requests = [engine.admit(one) for one in (spent, row(), over)]
        engine.add(requests)
        events = tiny.drain(engine)
        [failed] = [event for event in events if isinstance(event, Failed)]
        assert (failed.request_id, failed.limit) == (requests[2].id, "limits.max_delta")
        done = tiny.results(events)
        told.append([done[request.id] for request in requests[:2]])
    for one, other in zip(*told, strict=True):
        assert_alike(one, other)


def test_features_of_a_text_are_read_as_by_the_torch_engine(
    model: DiffusionLM, reference: TorchEngine, tmp_path: Path
) -> None:
    asked = Reading(text="the king won", layer=2, mask_ratio=0.4, k=3)
    told = []
    for features in (FarFeatures(flat(model, tmp_path)), LoadedFeatures(reference)):
        told.append(features.read(features.prepare(asked)))
    assert close(told[0], told[1])


def test_a_feature_of_saes_that_are_no_pair_is_pushed_as_by_the_torch_engine(
    model: DiffusionLM, tmp_path: Path
) -> None:
    catalogue = tiny.catalogue(model, tmp_path)
    saes = {**catalogue.saes, "narrow": tiny.sae(1, seed=4, policy="visible", name="narrow", features=40)}
    catalogue = replace(catalogue, saes=saes)
    workers = FlatWorkers(model, saes)
    engines = [
        VllmEngine(model, tiny.tokenizer(), catalogue, EngineConfig(), workers),
        TorchEngine(model, tiny.tokenizer(), catalogue, EngineConfig()),
    ]
    push = Intervention(feature=FeatureRef("narrow", 5), op="multiply", strength=5.0)
    [(_, one)], [(_, other)] = (tiny.run(engine, row(interventions=(push,))) for engine in engines)
    assert_alike(one, other)


def test_rows_that_join_late_leave_early_or_are_steered_anew_are_the_same(
    model: DiffusionLM, reference: TorchEngine, tmp_path: Path
) -> None:
    rows = mixed(tiny.HIDDEN)
    told = []
    for engine in (flat(model, tmp_path, 3), reference):
        requests = [engine.admit(one) for one in rows[:6]]
        engine.add(requests[:3])
        events = engine.step()
        engine.add(requests[3:])
        engine.abort(requests[0].id)
        engine.steer(requests[1].id, engine.admit(replace(rows[1], interventions=rows[2].interventions)))
        events += tiny.drain(engine)
        assert [type(event) for event in events if isinstance(event, Steered | Failed)] == [Steered, Failed]
        done = tiny.results(events)
        told.append([done[request.id] for request in requests[1:]])
    for one, other in zip(*told, strict=True):
        assert_alike(one, other)


def test_directions_are_sent_once_and_forgotten_when_no_row_needs_them(model: DiffusionLM, tmp_path: Path) -> None:
    engine = flat(model, tmp_path)
    workers = engine.workers
    assert isinstance(workers, FlatWorkers)
    steered = engine.admit(row(interventions=(Intervention(attribute="register/archaic", scope="all"),)))
    plain = engine.admit(row(max_tokens=20, steps=20))
    engine.add([steered, plain])
    engine.step()
    assert len(workers.make.directions) == 2
    sent: list[int] = []
    original = workers.run

    def watched(rows: Any) -> list[torch.Tensor]:
        sent.append(sum(len(given[DIRECTIONS]) for _, given in rows))
        return original(rows)

    workers.run = watched  # type: ignore[method-assign]
    tiny.drain(engine)
    assert set(sent) == {0}
    assert not workers.make.directions


def test_the_self_test_passes_and_fails_where_the_site_is_left_out(
    model: DiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = flat(model, tmp_path)
    check_steering(engine, first_logits)
    workers = engine.workers
    assert isinstance(workers, FlatWorkers)
    monkeypatch.setattr(workers.model, "forward", partial(_without_sites, workers.model.forward))
    with pytest.raises(SelfTestError, match="layer 0 did not move the logits"):
        check_steering(engine, first_logits)


def _without_sites(forward: Any, tokens: torch.Tensor, lengths: torch.Tensor, sites: Any) -> Any:  # noqa: ARG001
    return forward(tokens, lengths)


def test_guidance_is_refused_before_anything_is_queued(model: DiffusionLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cfg_scale must be left out here, got 1.5") as caught:
        flat(model, tmp_path).admit(row(cfg_scale=1.5))
    assert caught.value.param == "cfg_scale"
    with pytest.raises(RequestError, match="no measurement of the KL"):
        flat(model, tmp_path, 1).admit(row(measure_kl=True))
    with pytest.raises(RequestError, match="max_kl must be left out here, got 0.3.*max_predicted_kl") as caught:
        flat(model, tmp_path, 2).admit(row(limits=Limits(max_kl=0.3)))
    assert caught.value.param == "limits.max_kl"


def test_a_reply_that_is_of_another_row_fails_the_step(model: DiffusionLM, tmp_path: Path) -> None:
    engine = flat(model, tmp_path)
    original = engine.workers.run
    engine.workers.run = lambda rows: original(rows)[::-1]  # type: ignore[method-assign]
    requests = [engine.admit(one) for one in (row(), row(prompt="the king won"))]
    engine.add(requests)
    assert [type(event) for event in engine.step()] == [Failed, Failed]


def test_closing_the_engine_ends_the_workers(model: DiffusionLM, tmp_path: Path) -> None:
    engine = flat(model, tmp_path)
    engine.close()
    assert isinstance(engine.workers, FlatWorkers)
    assert engine.workers.closed


def test_replies_hold_candidates_and_sums_alone(model: DiffusionLM, tmp_path: Path) -> None:
    engine = flat(model, tmp_path)
    sizes: list[int] = []
    workers = engine.workers
    original = workers.run

    def watched(rows: Any) -> list[torch.Tensor]:
        data = original(rows)
        sizes.extend(one.numel() for one in data)
        return data

    workers.run = watched  # type: ignore[method-assign]
    tiny.run(engine, GenerationParams(prompt="the king", max_tokens=32, steps=32, temperature=0.0))
    # Position, token, probability and one measure of each masked position, and six numbers before them.
    assert max(sizes) == 2 + 4 + 32 * 4
