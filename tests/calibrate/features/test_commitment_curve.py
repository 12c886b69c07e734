"""Commitment curves: what a replay sees is what the engine saw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from steerserve.calibrate.features.commitment_curve import confident, feature_curves, profile, some_activations
from steerserve.calibrate.generation import GeneratedText, unsteered_samples, write
from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.engine.api.params import GenerationParams
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from tests import tiny

LENGTH = 8


def params(count: int, steps: int = LENGTH) -> list[GenerationParams]:
    return [
        GenerationParams(max_tokens=LENGTH, steps=steps, order="random", ignore_eos=True, seed=3, row=i)
        for i in range(count)
    ]


def outputs(lm: DiffusionLM, canvas: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(_: int, hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return hidden

    lm(canvas, lengths, keep)
    return kept


def test_texts_come_in_order_with_the_step_of_every_token(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=3, max_queue=16)
    written = write(served, params(7, steps=4), "texts")
    alone = [tiny.run(served, one)[0][1] for one in params(7, steps=4)]
    assert [one.tokens for one in written] == [result.tokens for result in alone]
    assert [one.text for one in written] == [result.text for result in alone]
    for one in written:
        assert sorted(one.committed_at) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_bad_row_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    with pytest.raises(RequestError, match="temperature"):
        write(served, [*params(2), GenerationParams(temperature=-1.0)], "texts")
    assert not served.waiting


def test_the_curve_is_read_from_the_canvases_that_the_engine_went_through(tmp_path: Path) -> None:
    lm, saes, features = tiny.bert(), {0: tiny.sae(0, 4), 2: tiny.sae(2, 5)}, {0: [3, 7, 11], 2: [40]}
    served = tiny.engine(lm, tmp_path)
    canvases: list[torch.Tensor] = []
    lm.register_forward_pre_hook(lambda _, arguments: canvases.append(arguments[0][0, : 1 + LENGTH].clone()))
    (sample,) = write(served, params(1), "text")
    went_through = [*canvases, torch.tensor([tiny.CLS, *sample.tokens])]
    found = feature_curves(lm, [sample], saes, features, LENGTH, 40)
    assert len(went_through) == LENGTH + 1
    for i, canvas in enumerate(went_through):
        kept = outputs(lm, canvas[None])
        for layer, ids in features.items():
            expected = saes[layer].relu(kept[layer][0, 1:])[:, ids].mean(0)
            torch.testing.assert_close(found[layer][0, i], expected, rtol=1e-4, atol=1e-4)


def test_fewer_steps_than_slices_are_joined_by_straight_lines() -> None:
    lm, saes = tiny.bert(), {1: tiny.sae(1)}
    sample = GeneratedText("", tuple(range(10, 18)), (0, 1, 1, 0, 0, 1, 0, 1))
    fine = feature_curves(lm, [sample], saes, {1: [2, 5]}, 8, 1000)[1][0]
    coarse = feature_curves(lm, [sample], saes, {1: [2, 5]}, 2, 1000)[1][0]
    torch.testing.assert_close(fine[::4], coarse)
    torch.testing.assert_close(fine[2], (coarse[0] + coarse[1]) / 2)


def test_some_activations_are_those_of_the_full_encoding() -> None:
    sae, hidden = tiny.sae(1), torch.randn(5, 4, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(some_activations(sae, hidden, [9, 0, 30]), sae.relu(hidden)[..., [9, 0, 30]])


def test_only_confident_samples_are_kept_unless_too_few_are() -> None:
    probabilities = np.array([0.9, 0.2, 0.85, 0.7, 0.1])
    assert confident(probabilities, 0.8, 2) == ([0, 2], False)
    assert confident(probabilities, 0.8, 3) == ([0, 2, 3], True)
    assert confident(probabilities, 0.8, 9) == ([0, 1, 2, 3, 4], True)
    assert confident(np.array([0.9, 0.9]), 0.8, 8) == ([0, 1], False)


def test_a_profile_is_the_mean_over_samples_and_features_of_all_layers() -> None:
    curves = [torch.rand(5, 9, n, generator=torch.Generator().manual_seed(n)) for n in (2, 3)]
    found = profile(curves, [0, 3, 4])
    values = torch.cat(curves, dim=2)[[0, 3, 4]].mean(2)
    assert found.curve == pytest.approx(values.mean(0).tolist(), abs=1e-5)
    assert found.standard_error == pytest.approx((values.std(0) / 3**0.5).tolist(), abs=1e-5)
    assert found.samples == 3
    assert profile(curves, [1]).standard_error is None


def test_samples_are_read_back_unless_their_origin_changed(tmp_path: Path) -> None:
    recipe = CalibrationRecipe(samples=3, sample_tokens=6, sample_steps=6)
    served, cache = tiny.engine(tiny.bert(), tmp_path / "engine"), tmp_path / "cache" / "samples.json"
    first = unsteered_samples(served, recipe, {"model_sha256": "aa"}, cache)
    stamp = cache.stat().st_mtime_ns
    assert unsteered_samples(served, recipe, {"model_sha256": "aa"}, cache) == first
    assert cache.stat().st_mtime_ns == stamp
    assert unsteered_samples(served, recipe, {"model_sha256": "bb"}, cache) == first
    assert cache.stat().st_mtime_ns != stamp
