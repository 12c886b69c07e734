"""Contrastive features against the published steps, written out one token at a time."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from steerserve.calibrate.features.selection import bonferroni, select
from steerserve.calibrate.features.statistics import class_statistics, residual_norms
from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.calibrate.texts.noising import noised_texts
from steerserve.errors import ArtifactError
from steerserve.models import DiffusionLM
from tests import tiny

RECIPE = CalibrationRecipe(crop=12, candidates=20, kept=6, steering=3, p_value=0.9, batch_tokens=100)
KINDS = {"win": ("team", "won", "match"), "sea": ("ship", "lost", "city"), "rule": ("king", "and", "then")}


def texts(kind: str, count: int = 25) -> list[str]:
    draw = random.Random(kind)
    return [" ".join(draw.choices(KINDS[kind] + ("the",), k=draw.randint(3, 18))) for _ in range(count)]


def outputs(lm: DiffusionLM, canvas: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(_: int, hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return hidden

    lm(canvas, lengths, keep)
    return kept


def test_every_text_is_noised_once_at_each_ratio() -> None:
    lm, some = tiny.bert(), texts("win")
    seen: dict[int, list[float]] = {}
    for batch, index in noised_texts(some, tiny.tokenizer(), lm.facts, (0.3, 0.5, 1.0), 12, 0, 100):
        assert batch.canvas.numel() <= 100
        assert torch.equal(batch.canvas, torch.where(batch.masked, tiny.MASK, batch.tokens))
        assert (batch.tokens[:, 0] == tiny.CLS).all() and not batch.masked[:, 0].any()
        assert not (batch.masked & ~batch.text).any()
        for row, i in enumerate(index.tolist()):
            length = int(batch.lengths[row]) - 1
            ids = tiny.tokenizer().encode(some[i], add_special_tokens=False).ids
            assert length == min(len(ids), 12)
            assert " ".join(map(str, batch.tokens[row, 1 : 1 + length].tolist())) in " ".join(map(str, ids))
            seen.setdefault(i, []).append(int(batch.masked[row].sum()) / length)
    assert sorted(seen) == list(range(len(some)))
    for shares in seen.values():
        # Counts are rounded up.
        assert len(shares) == 3 and 0.3 <= min(shares) <= max(shares) == 1.0


@pytest.mark.parametrize("weights", ["equal", "d", "diff_means"])
def test_features_and_direction_are_those_of_the_published_steps(weights: str) -> None:
    from scipy.stats import mannwhitneyu

    recipe = CalibrationRecipe(**(vars(RECIPE) | {"weights": weights}))
    lm, sae, tokenizer = tiny.bert(), tiny.sae(1), tiny.tokenizer()
    found = {kind: class_statistics(lm, tokenizer, {1: sae}, texts(kind), recipe, kind)[1] for kind in KINDS}
    selection = select(found["win"], [found["sea"], found["rule"]], sae, recipe)

    tokens: dict[bool, list[np.ndarray]] = {True: [], False: []}
    hiddens: dict[bool, list[np.ndarray]] = {True: [], False: []}
    means: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for kind in KINDS:
        some = texts(kind)
        by_text: dict[int, list[np.ndarray]] = {i: [] for i in range(len(some))}
        for batch, index in noised_texts(
            some, tokenizer, lm.facts, recipe.mask_ratios, recipe.crop, recipe.seed, recipe.batch_tokens
        ):
            kept = outputs(lm, batch.canvas, batch.lengths)
            for row, column in batch.masked.nonzero().tolist():
                h = kept[1][row, column]
                a = ((h - sae.b_dec) @ sae.W_enc + sae.b_enc).clamp(min=0).double().numpy()
                tokens[kind == "win"].append(a)
                hiddens[kind == "win"].append(h.double().numpy())
                by_text[int(index[row])].append(a)
        means[kind == "win"] += [np.mean(several, axis=0) for several in by_text.values()]
    ours, others = np.array(tokens[True]), np.array(tokens[False])
    gap = ours.mean(0) - others.mean(0)
    spread = np.sqrt((ours.var(0, ddof=1) + others.var(0, ddof=1)) / 2)
    d = np.where(spread > 0, gap / np.where(spread > 0, spread, 1), 0)
    best = np.argsort(-np.abs(d))[:20]
    p = {j: min(1.0, 20 * mannwhitneyu([m[j] for m in means[True]], [m[j] for m in means[False]]).pvalue) for j in best}
    positive = [int(j) for j in best if d[j] > 0 and p[j] < 0.9][:6]
    negative = [int(j) for j in best if d[j] < 0 and p[j] < 0.9][:6]
    assert [feature.index for feature in selection.features] == positive + negative
    assert selection.steering == positive[:3]
    for feature in selection.features:
        assert feature.d == pytest.approx(d[feature.index], abs=1e-4)
        assert feature.p_value == pytest.approx(p[feature.index], rel=0.05)
    raw = {"equal": np.ones(3), "d": d[positive[:3]], "diff_means": gap[positive[:3]]}[weights]
    direction = (raw / raw.sum()) @ sae.W_dec[positive[:3]].double().numpy()
    np.testing.assert_allclose(selection.direction, direction / np.linalg.norm(direction), atol=1e-4)
    difference = np.mean(hiddens[True], axis=0) - np.mean(hiddens[False], axis=0)
    np.testing.assert_allclose(selection.diff_means, difference / np.linalg.norm(difference), atol=1e-4)
    assert selection.note is None
    assert sum(feature.weight for feature in selection.features) == pytest.approx(1.0)


def test_without_a_significant_feature_the_largest_steer_and_a_note_says_so() -> None:
    recipe = CalibrationRecipe(**(vars(RECIPE) | {"p_value": 1e-12}))
    lm, sae = tiny.bert(), tiny.sae(1)
    found = [class_statistics(lm, tiny.tokenizer(), {1: sae}, texts(kind, 6), recipe, kind)[1] for kind in KINDS]
    selection = select(found[0], found[1:], sae, recipe)
    assert "no feature is significantly" in (selection.note or "") and len(selection.steering) == 3


def test_classes_that_are_the_same_have_no_direction() -> None:
    lm, sae = tiny.bert(), tiny.sae(1)
    same = class_statistics(lm, tiny.tokenizer(), {1: sae}, texts("win", 5), RECIPE, "win")[1]
    with pytest.raises(ArtifactError, match="no feature is more active"):
        select(same, [same], sae, RECIPE)


def test_a_column_without_differences_is_never_significant() -> None:
    p = bonferroni(torch.zeros(30, 2) + torch.tensor([0.0, 1.0]), torch.zeros(40, 2))
    assert p[0] == 1.0 and p[1] < 1e-10


def test_the_residual_norm_is_the_mean_norm_at_masked_positions() -> None:
    lm, tokenizer, some = tiny.bert(), tiny.tokenizer(), texts("sea", 8)
    norms: dict[int, list[float]] = {0: [], 2: []}
    for batch, _ in noised_texts(some, tokenizer, lm.facts, RECIPE.mask_ratios, RECIPE.crop, 0, RECIPE.batch_tokens):
        kept = outputs(lm, batch.canvas, batch.lengths)
        for layer, values in norms.items():
            values += kept[layer][batch.masked].norm(dim=1).tolist()
    found = residual_norms(lm, tokenizer, [0, 2], some, RECIPE)
    assert found == pytest.approx({layer: float(np.mean(values)) for layer, values in norms.items()}, rel=1e-4)


def test_statistics_do_not_depend_on_how_much_is_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sae, some = tiny.bert(), tiny.sae(1), texts("sea", 6)
    whole = class_statistics(lm, tiny.tokenizer(), {1: sae}, some, RECIPE, "sea")[1]
    monkeypatch.setattr("steerserve.calibrate.features.statistics._BLOCK", 5 * tiny.FEATURES)
    parts = class_statistics(lm, tiny.tokenizer(), {1: sae}, some, RECIPE, "sea")[1]
    assert parts.activations.count == whole.activations.count
    torch.testing.assert_close(parts.activations.mean, whole.activations.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.activations.variance, whole.activations.variance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.text_means, whole.text_means, rtol=1e-4, atol=1e-5)
