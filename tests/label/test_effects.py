"""Promoted tokens and curves, against the model's own head, single pushes and single canvases."""

from dataclasses import replace

import pytest
import torch

from steerserve.calibrate.generation import GeneratedText
from steerserve.label.curves import mean_curves
from steerserve.label.effects import decoder_logits, ends, nearest, promoted_by_decoder, promoted_by_push, push_effects
from steerserve.label.texts import read_texts
from steerserve.models import DiffusionLM
from tests import tiny
from tests.conftest import SENTENCES


def test_a_decoder_row_goes_through_the_final_norm_and_the_head() -> None:
    model = tiny.llada()
    rows = torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    [(start, logits)] = decoder_logits(model, rows)
    weight = model.get_parameter("model.transformer.ln_f.weight")
    normed = rows / rows.square().mean(1, keepdim=True).add(1e-5).sqrt() * weight
    assert start == 0
    assert torch.allclose(logits, model.head(normed), atol=1e-3)
    up, raised, down, lowered = promoted_by_decoder(model, rows, 3, (tiny.MASK,))
    centred = logits - logits.mean(0)
    centred[:, tiny.MASK] = torch.nan
    for i, row in enumerate(centred):
        order = [j for j in row.argsort().tolist() if j != tiny.MASK]
        assert up[i].tolist() == order[::-1][:3] and down[i].tolist() == order[:3]
        assert raised[i, 0] == pytest.approx(float(row[order[-1]]), abs=1e-3) and float(lowered[i, 0]) < 0


@pytest.mark.parametrize("family", ["bert", "llada", "mdlm", "shifted"])
def test_effects_are_those_of_a_small_push_along_the_direction(family: str) -> None:
    models: dict[str, DiffusionLM] = {"llada": tiny.llada(), "mdlm": tiny.mdlm()}
    model = models.get(family) or tiny.bert()
    if family == "shifted":
        model.facts = replace(model.facts, shift=1)
    texts = read_texts(SENTENCES[:2], tiny.tokenizer(), model.facts, (0.5,), 10, seed=0, batch_tokens=400)
    [batch] = texts.batches
    chosen = batch.chosen("mask")
    effects = push_effects(model, batch, chosen, 1, 2e-3, 300, "pushes")
    direction = tiny.unit(torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(2)))
    changes = []
    for size in (0.0, 2e-3):
        means, count = torch.zeros(model.facts.vocab_size), 0
        for row in range(len(batch.tokens)):

            def site(layer: int, hidden: torch.Tensor, row: int = row, size: float = size) -> torch.Tensor:
                if layer != 1:
                    return hidden
                out = hidden.clone()
                for at in chosen[row].nonzero()[:, 0].tolist():
                    out[0, max(0, at - model.facts.shift)] = (
                        hidden[0, max(0, at - model.facts.shift)] + size * direction
                    )
                return out

            from steerserve.models.sigma import level_of_share

            sigma = (
                None if model.facts.sigma is None else level_of_share(model.facts.sigma, batch.share()[row : row + 1])
            )
            final = model(batch.canvas[row : row + 1], batch.lengths[row : row + 1], site, sigma)[0]
            for at in chosen[row].nonzero()[:, 0].tolist():
                means += model.head(final[max(0, at - model.facts.shift)]).log_softmax(-1)
                count += 1
        changes.append(means / count)
    measured = (changes[1] - changes[0]) / 2e-3
    predicted = direction @ effects
    there = measured.isfinite() & predicted.isfinite() & (measured.abs() < 1e3)
    error = float((measured - predicted)[there].norm() / measured[there].norm())
    assert error < 0.05
    up, nats, _, _ = promoted_by_push(effects, direction[None], 0.5, 2, ())
    assert float(nats[0, 0]) == pytest.approx(0.5 * float(predicted.max()), rel=1e-4)
    assert int(up[0, 0]) == int(predicted.argmax())


def test_ends_and_nearest_are_those_of_a_sort() -> None:
    values = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    up, _, down, _ = ends(values, 2, (0,))
    for row, high, low in zip(values, up, down, strict=True):
        order = [i for i in row.argsort().tolist() if i]
        assert (high.tolist(), low.tolist()) == (order[::-1][:2], order[:2])
    ids, cosines = nearest(values, 2)
    for i, row in enumerate(values):
        mine = {j: float(torch.cosine_similarity(row, other, 0)) for j, other in enumerate(values) if j != i}
        order = sorted(mine, key=lambda j: -mine[j])
        assert ids[i].tolist() == order[:2]
        assert cosines[i].tolist() == pytest.approx([mine[j] for j in order[:2]], abs=1e-5)


def test_a_curve_is_the_mean_over_the_response_at_each_step() -> None:
    model, sae = tiny.bert(), tiny.sae(1)
    samples = [
        GeneratedText("", (20, 31, 40, 50), (2, 0, 3, 1)),
        GeneratedText("", (33, 44, 55, 66), (0, 1, 2, 3)),
        GeneratedText("", (), ()),
    ]
    curve = mean_curves(model, samples, {1: sae}, slices=4, batch_tokens=64)[1]
    expected = torch.zeros(5, tiny.FEATURES)
    for sample in samples[:2]:
        for step in range(5):
            canvas = [tiny.CLS]
            for token, when in zip(sample.tokens, sample.committed_at, strict=True):
                canvas.append(token if when < step else tiny.MASK)
            kept: list[torch.Tensor] = []
            model(torch.tensor([canvas]), None, lambda at, h, kept=kept: (kept.append(h[0]) if at == 1 else None, h)[1])
            expected[step] += torch.relu(sae.pre(kept[0][1:])).mean(0) / 2
    assert torch.allclose(curve, expected, atol=1e-4)
