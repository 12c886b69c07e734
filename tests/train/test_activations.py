"""Gathering hidden states: the right positions, unchanged, shuffled without loss."""

import json
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models.bert import BertConfig, BertDiffusionLM
from steerserve.train.activations import NoisedBatch, Store, gather, noised_batches, states
from steerserve.train.dlm import Documents
from steerserve.train.tokenizer import SPECIAL, build_tokenizer

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
