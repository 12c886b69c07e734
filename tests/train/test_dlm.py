"""The training objective: masks of the stated counts, a loss whose mean over t is the NELBO, and exact resumption."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from steerserve.models.families.bert import BertConfig, BertDiffusionLM
from steerserve.train.dlm import DlmRecipe, Documents, draw_masks, evaluate, nelbo, rate, train
from steerserve.train.tokenizer import SPECIAL, build_tokenizer

WORDS = [f"w{i}" for i in range(30)]


def model(seed: int = 0) -> BertDiffusionLM:
    torch.manual_seed(seed)
    return BertDiffusionLM(BertConfig(len(SPECIAL) + len(WORDS), 16, 2, 2, 32, 24, 4, 3, 2))


def write_texts(folder: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 30))) for _ in range(300)]
    (folder / "some.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


def nelbo_of(lm: BertDiffusionLM, data: Path, tokenizer: Tokenizer) -> float:
    return evaluate(lm, Documents(data, tokenizer, True, 24, 2, 3), rounds=1)["nelbo_nats_per_token"]


def test_as_many_positions_are_masked_as_the_time_says_and_never_the_first_nor_padding() -> None:
    lengths, times = torch.tensor([9, 5, 2]), torch.tensor([0.5, 0.01, 1.0])
    masked, weight = draw_masks(lengths, times, 9, torch.Generator().manual_seed(0))
    assert masked.sum(1).tolist() == [4, 1, 1]
    assert not masked[:, 0].any()
    assert not masked[1, 5:].any()
    torch.testing.assert_close(weight, torch.tensor([2.0, 4.0, 1.0]))


def test_every_position_is_masked_equally_often() -> None:
    lengths, times = torch.full((4000,), 7), torch.full((4000,), 0.5)
    masked, _ = draw_masks(lengths, times, 7, torch.Generator().manual_seed(0))
    shares = masked[:, 1:].float().mean(0)
    assert (shares - 0.5).abs().max() < 0.03


@torch.no_grad()
def test_the_mean_loss_over_times_is_the_nelbo_summed_over_all_mask_sets() -> None:
    lm = model().eval()
    tokens = torch.tensor([[2, 7, 9, 11]])
    # NELBO of n tokens: mean over counts k of n/k times the expected cross-entropy of k masked ones, set by set.
    exact = 0.0
    for k in (1, 2, 3):
        sets = list(itertools.combinations((1, 2, 3), k))
        for chosen in sets:
            canvas = tokens.clone()
            canvas[0, list(chosen)] = lm.facts.mask_id
            log_p = lm.head(lm(canvas))[0].log_softmax(1)
            loss = -sum(float(log_p[i, tokens[0, i]]) for i in chosen)
            exact += loss * 3 / k / len(sets) / 3
    count = 6000
    many, lengths = tokens.expand(count, 4), torch.full((count,), 4)
    times = (torch.arange(count) + 0.5) / count
    estimates = nelbo(lm, many, lengths, times, torch.Generator().manual_seed(0))
    assert abs(float(estimates.mean()) - exact) < 4 * float(estimates.std()) / math.sqrt(count)


def test_times_of_a_round_are_spread_evenly(tmp_path: Path) -> None:
    write_texts(tmp_path)
    documents = Documents(tmp_path, build_tokenizer((*SPECIAL, *WORDS)), False, 24, 2, 3)
    times: list[float] = []
    for _, _, drawn in documents.batches(seed=0, start=0, batch_tokens=200):
        times += drawn.tolist()
        if len(times) >= 384:
            break
    slots = sorted(int(t * 384) for t in times)
    assert slots == list(range(384))


def test_the_rate_rises_stays_and_falls() -> None:
    recipe = DlmRecipe(tokens=1000, learning_rate=1.0, warmup=0.1, decay=0.5)
    assert [rate(recipe, seen) for seen in (0, 50, 100, 500, 750, 1000)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0])


def test_training_lowers_the_loss_and_a_resumed_run_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_texts(data)
    tokenizer = build_tokenizer((*SPECIAL, *WORDS))
    recipe = DlmRecipe(tokens=30_000, batch_tokens=600, learning_rate=3e-3, context=24)
    whole, first = model(), model()
    scores = train(whole, data, tokenizer, tmp_path / "whole", recipe)
    assert scores["nelbo_nats_per_token"] < 5.0 < 9.0 < nelbo_of(model(), data, tokenizer)

    class Stop(Exception):
        pass

    rounds = 0
    original = Documents.batches

    def stops_in_the_third_round(self, seed, start, batch_tokens):  # type: ignore[no-untyped-def]
        nonlocal rounds
        if seed == recipe.seed:
            rounds += 1
            if rounds == 3:
                raise Stop
        return original(self, seed, start, batch_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Documents, "batches", stops_in_the_third_round)
        patch.setattr("steerserve.train.dlm.SAVE_SECONDS", 0.0)
        with pytest.raises(Stop):
            train(first, data, tokenizer, tmp_path / "stopped", recipe)
    train(model(seed=5), data, tokenizer, tmp_path / "stopped", recipe)
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "stopped"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)
