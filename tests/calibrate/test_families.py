"""A whole calibration of a tiny model of every family, sampled as the family is."""

import json
import math
from pathlib import Path

import pytest
import torch

from schedulers import CommitmentProfile
from steerserve.calibrate.features.commitment_curve import feature_curves
from steerserve.calibrate.generation import GeneratedText, write
from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.calibrate.run import calibrate
from steerserve.calibrate.trials.quality import text_losses
from steerserve.calibrate.trials.runner import TrialRunner
from steerserve.config import EngineConfig, ModelConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import ArtifactError
from steerserve.models import open_model, weights_sha256
from steerserve.steering.attribute import load_attributes
from tests import tiny
from tests.calibrate import made

FAMILIES = [name for name in made.FAMILIES if name != "bert"]


def one_task(folder: Path) -> Path:
    path = folder / "task.json"
    path.write_text(json.dumps(made.TASKS[2:]))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_calibrated_by_its_own_sampler(name: str, tiny_model: Path, tmp_path: Path) -> None:
    model = made.make_family(tmp_path / "model", name, tiny_model)
    made.make_data(tmp_path / "data")
    made.make_saes(tmp_path / "saes", model)
    # The temperature of the LLaDAs is 0, at which nothing is drawn; these weights of SEDD's are sure of a single token.
    temperature = {"llada": 1.0, "lladamoe": 1.0, "sedd": 2.0}.get(name)
    recipe = made.make_recipe(tmp_path, tasks=one_task(tmp_path), transfer=None, order=None, temperature=temperature)
    placed = ModelConfig(device="cpu")
    calibrate(model, tmp_path / "saes", tmp_path / "data", tmp_path / "out", recipe, placed)
    found = load_attributes(tmp_path / "out", weights_sha256(model), 2, made.HIDDEN)["deed/won"]
    assert found.profile is not None
    profile = CommitmentProfile.from_json(found.profile)
    curve = profile.curve
    # Not above 0: a model of random weights may write nothing that the features answer to.
    assert len(curve) == 65 and all(0 <= value < float("inf") for value in curve) and profile.samples > 0
    opened = open_model(model, placed)
    assert found.provenance["sampler"]["transfer"] == opened.defaults.transfer
    assert all(trial["loss_ratio"] > 0 for trial in found.provenance["ablation"]["searched"])
    norms = {layer: site.residual_norm for layer, site in found.sites.items()}
    lm = opened.load(name)
    engine = DiffusionEngine(
        lm, opened.tokenizer, Catalogue(lm.facts, {found.name: found}, {}, norms, opened.defaults), EngineConfig()
    )
    push = Intervention(attribute=found.name, strength=2.0, schedule="uniform")
    [(_, steered)] = tiny.run(engine, GenerationParams(max_tokens=12, ignore_eos=True, interventions=(push,)))
    assert steered.receipt is not None and steered.receipt["interventions"][0]["applied"] is True
    with pytest.raises(ArtifactError, match="was calibrated for the model"):
        load_attributes(tmp_path / "out", "0" * 64, 2, made.HIDDEN)


@pytest.mark.parametrize("name", made.FAMILIES)
def test_a_curve_is_read_where_tokens_are_decided_at_the_steps_that_changed_something(name: str) -> None:
    lm, sae = made.family(name), tiny.sae(1)
    tokens, start = [7, 9, 11, 13], {"bert": [2], "mdlm": [3], "mdlm-timed": [3]}.get(name, [])
    mask = lm.facts.mask_id
    (found,) = feature_curves(lm, [GeneratedText("", tuple(tokens), (3, 17, 3, 90))], {1: sae}, {1: [4, 9]}, 4, 7)[1]
    canvases = {0: [mask] * 4, 2: [7, mask, 11, mask], 3: [7, 9, 11, mask], 4: tokens}
    for slice_, response in canvases.items():
        kept: list[torch.Tensor] = []

        def keep(_: int, hidden: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(hidden[0])
            return hidden

        share = response.count(mask) / 4
        sigma = -torch.log(torch.tensor([max(0.001, 1 - share)]))
        lm(torch.tensor([start + response]), None, keep, sigma)
        places = [0, 0, 1, 2] if name == "dream" else [len(start) + i for i in range(4)]
        expected = sae.relu(kept[1][places])[:, [4, 9]].mean(0)
        torch.testing.assert_close(found[slice_], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], (found[0] + found[2]) / 2)


def test_samples_may_differ_in_length_and_one_without_tokens_has_no_curve() -> None:
    lm, sae = made.family("llada"), tiny.sae(1)
    samples = [GeneratedText("", (7, 9, 11), (0, 1, 2)), GeneratedText("", (), ()), GeneratedText("", (8,), (5,))]
    found = feature_curves(lm, samples, {1: sae}, {1: [4, 9]}, 8, 100)[1]
    alone = [feature_curves(lm, [one], {1: sae}, {1: [4, 9]}, 8, 100)[1][0] for one in samples]
    torch.testing.assert_close(found, torch.stack(alone))
    assert not found[1].any() and found[0].any() and found[2].any()


def test_a_token_has_the_step_of_its_own_position_where_the_model_drew_its_mask(tmp_path: Path) -> None:
    lm = tiny.llada()
    served = tiny.engine(lm, tmp_path)
    params = [
        GenerationParams(max_tokens=8, steps=8, order="random", ignore_eos=True, temperature=2.0, row=i)
        for i in range(200)
    ]
    written = write(served, params, "texts")
    short = [i for i, one in enumerate(written) if len(one.tokens) < 8]
    assert short
    for i in short:
        request, events = tiny.solo(served, params[i])
        response, when = tiny.replayed(events, request)
        kept = [position for position in range(8) if response[position] != lm.facts.mask_id]
        assert written[i].tokens == tuple(response[position] for position in kept)
        assert written[i].committed_at == tuple(when[position] for position in kept)


def test_a_text_without_tokens_counts_as_the_worst_of_texts() -> None:
    lm = made.family("llada")
    runner = TrialRunner(lm, tiny.tokenizer(), {}, {}, lm.defaults, CalibrationRecipe(quality_masks=2))
    full = GeneratedText("", (7, 9, 7, 9), (0, 1, 2, 3))
    loss = float(text_losses(lm, [full.tokens], 2)[0])
    assert runner._figures([full]) == pytest.approx((loss, 2 / 3))
    worst = math.log(lm.facts.vocab_size)
    assert runner._figures([full, GeneratedText("", (), ())]) == pytest.approx(((loss + worst) / 2, 1 / 3))
    assert runner._figures([GeneratedText("", (), ())]) == pytest.approx((worst, 0.0))
