"""Gathering hidden states: the right positions, unchanged, shuffled without loss."""

import json
import math
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models import DiffusionLM
from steerserve.models.families.bert import BertConfig, BertDiffusionLM
from steerserve.models.sigma import Geometric, LogLinear, Sigma, level_of_share
from steerserve.train.activations import (
    NoisedBatch,
    Store,
    final_states,
    gather,
    noised_batches,
    states,
)
from steerserve.train.dlm import Documents
from steerserve.train.tokenizer import SPECIAL, build_tokenizer
from tests.calibrate import made

WORDS = [f"w{i}" for i in range(40)]


def model() -> BertDiffusionLM:
    torch.manual_seed(0)
    return BertDiffusionLM(BertConfig(len(SPECIAL) + len(WORDS), 16, 3, 2, 32, 24, 4, 3, 2)).requires_grad_(False)


def documents(folder: Path) -> Documents:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 40))) for _ in range(120)]
    (folder / "some.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return Documents(folder, build_tokenizer((*SPECIAL, *WORDS)), held_out=False, context=24, bos_id=2, eos_id=3)


def test_only_text_is_chosen_and_each_position_by_one_policy(tmp_path: Path) -> None:
    tails = 0
    for batch in islice(noised_batches(documents(tmp_path), model(), (0.05, 1.0), 0, 256), 20):
        assert torch.equal(batch.canvas, torch.where(batch.masked, 4, batch.tokens))
        assert not (batch.chosen("mask") & batch.chosen("visible")).any()
        assert torch.equal(batch.chosen("mask") | batch.chosen("visible"), batch.text)
        for row in range(len(batch.tokens)):
            tokens = batch.tokens[row, : int(batch.lengths[row])].tolist()
            end = tokens.index(3) + 1 if 3 in tokens else len(tokens)
            tails += len(tokens) - end
            assert batch.text[row].nonzero()[:, 0].tolist() == list(range(1, end))
    assert tails > 0


def test_mask_ratios_cover_the_range(tmp_path: Path) -> None:
    shares = []
    for batch in islice(noised_batches(documents(tmp_path), model(), (0.4, 0.6), 0, 256), 40):
        shares += (batch.masked.sum(1) / (batch.lengths - 1)).tolist()
    # Counts are rounded up, and short rows are coarse.
    assert min(shares) >= 0.4
    assert max(shares) <= 0.6 + 1 / 4
    assert abs(np.mean(shares) - 0.5) < 0.06


def test_states_are_those_of_a_whole_forward() -> None:
    lm = model()
    canvas = torch.randint(5, 40, (3, 10), generator=torch.Generator().manual_seed(0))
    whole: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> Tensor:
        whole[layer] = hidden
        return hidden

    lengths = torch.tensor([10, 7, 4])
    lm(canvas, lengths, keep)
    found = states(lm, NoisedBatch(canvas, canvas, lengths, canvas > 0, canvas > 0), [0, 1])
    assert sorted(found) == [0, 1]
    assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])


def noised(lm: DiffusionLM) -> NoisedBatch:
    """Three rows of different lengths; the last has no text at all."""
    facts, generator = lm.facts, torch.Generator().manual_seed(2)
    start = 0 if facts.bos_id is None else 1
    tokens = torch.randint(5, 40, (3, 10), generator=generator)
    tokens[:, :start] = facts.bos_id or 0
    lengths = torch.tensor([10, 7, 4])
    text = (torch.arange(10) >= start) & (torch.arange(10) < torch.tensor([10, 7, 0])[:, None])
    masked = text & (torch.rand(3, 10, generator=generator) < 0.5)
    return NoisedBatch(tokens, tokens.masked_fill(masked, facts.mask_id), lengths, masked, text)


def by_hand(lm: DiffusionLM, batch: NoisedBatch, row: int) -> list[Tensor]:
    """Every layer's output, then the final states, of one row alone at the noise level of its masked share."""
    outputs: list[Tensor] = []

    def keep(_: int, hidden: Tensor) -> Tensor:
        outputs.append(hidden[0])
        return hidden

    sigma = None
    if lm.facts.sigma is not None:
        text = [position for position in range(10) if batch.text[row, position]]
        share = sum(bool(batch.masked[row, position]) for position in text) / max(1, len(text))
        sigma = torch.tensor([-math.log(max(0.001, 1 - share))])
    final = lm(batch.canvas[row : row + 1, : int(batch.lengths[row])], None, keep, sigma)
    return [*outputs, final[0]]


@pytest.mark.parametrize("family", made.FAMILIES)
def test_each_token_has_the_state_that_decides_it_at_the_noise_level_of_its_text(family: str) -> None:
    lm = made.family(family)
    batch = noised(lm)
    layers = range(lm.facts.num_layers)
    found, final = states(lm, batch, layers), final_states(lm, batch)
    for row in range(3):
        expected = by_hand(lm, batch, row)
        for token in range(int(batch.lengths[row])):
            place = max(token - 1, 0) if family == "dream" else token
            for layer in layers:
                torch.testing.assert_close(found[layer][row, token], expected[layer][place], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(final[row, token], expected[-1][place], rtol=1e-4, atol=1e-4)


@given(st.floats(0, 1), st.sampled_from([LogLinear(), LogLinear(0.2), Geometric(1e-4, 20.0), Geometric(0.1, 0.7)]))
def test_a_noise_level_masks_the_share_it_is_of_as_far_as_the_schedule_goes(share: float, schedule: Sigma) -> None:
    level = float(level_of_share(schedule, torch.tensor([share])))
    low, high = (float(schedule.total(torch.tensor(time))) for time in (0.0, 1.0))
    masked = 1 - math.exp(-level)
    assert low - 1e-6 <= level <= high + 1e-6
    if 1 - math.exp(-low) <= share <= 1 - math.exp(-high):
        assert masked == pytest.approx(share, abs=1e-6)
    else:
        assert level == pytest.approx(low if share < 0.5 else high, rel=1e-4, abs=1e-4)


def test_a_shift_of_two_moves_states_by_two() -> None:
    lm, batch = model(), noised(model())
    plain = states(lm, batch, [1])[1]
    lm.facts = replace(lm.facts, shift=2)
    assert torch.equal(states(lm, batch, [1])[1], plain[:, [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]])


def test_one_pass_fills_every_store_in_order(tmp_path: Path) -> None:
    lm, texts = model(), documents(tmp_path)
    batches = noised_batches(texts, lm, (0.05, 1.0), 0, 256)
    stores = gather(lm, batches, [(0, "mask"), (2, "mask"), (2, "visible")], 150, tmp_path / "states")
    rebuilt = []
    for batch in islice(noised_batches(texts, lm, (0.05, 1.0), 0, 256), 10):
        rebuilt.append(states(lm, batch, [2])[2][batch.chosen("visible")])
    want = torch.cat(rebuilt)[:150].half().float()
    assert torch.equal(stores[2, "visible"].sample(np.arange(150)), want)
    again = Store(stores[2, "visible"].path, 150, 16)
    assert torch.equal(again.sample(np.arange(150)), want)


def test_an_epoch_shows_each_state_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", 20, 2, write=True)
    assert store.add(torch.arange(60.0).view(30, 2)) == 20
    epochs = list(islice(store.shuffled(0, 5), 8))
    for epoch in (epochs[:4], epochs[4:]):
        assert sorted(torch.cat(epoch)[:, 0].tolist()) == [2.0 * i for i in range(20)]
    assert not torch.equal(torch.cat(epochs[:4]), torch.cat(epochs[4:]))
    assert all(torch.equal(a, b) for a, b in zip(epochs, islice(store.shuffled(0, 5), 8), strict=True))
    with pytest.raises(ValueError, match="at most the 20 states stored, got 21"):
        next(store.shuffled(0, 21))


def test_states_too_large_for_the_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="1e\\+05 do not fit float16"):
        Store(tmp_path / "s", 4, 2, write=True).add(torch.full((1, 2), 1e5))
