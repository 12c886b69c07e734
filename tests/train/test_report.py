"""The numbers of a model's card."""

import json
import math
import random
from pathlib import Path

from steerserve.models import load_model, load_tokenizer
from steerserve.train import corpus
from steerserve.train.report import held_out, samples
from tests.conftest import SENTENCES


def test_loss_per_token_and_bits_per_byte_are_of_the_held_out_texts(tmp_path: Path, tiny_model: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(SENTENCES, k=2)) for _ in range(400)]
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    scores = held_out(model, tokenizer, tmp_path, 64)["some"]
    kept = [text for text in texts if corpus.split_of(text) == "valid"]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in kept]
    assert scores["texts"] == len(kept)
    assert scores["tokens"] == sum(map(len, ids))
    # Random weights know nothing: about the entropy of a uniform draw from the vocabulary.
    assert abs(scores["nelbo_nats_per_token"] - math.log(tokenizer.get_vocab_size())) < 0.3
    size = sum(len(text.encode()) for text in kept)
    expected = scores["nelbo_nats_per_token"] * scores["tokens"] / math.log(2) / size
    assert math.isclose(scores["bits_per_byte"], expected, rel_tol=1e-2)


def test_samples_come_in_the_order_of_their_prompts(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    drawn = samples(model, tokenizer, ["the team", ""], max_tokens=6, ignore_eos=True)
    assert [one["prompt"] for one in drawn] == ["the team", ""]
    assert drawn == samples(model, tokenizer, ["the team", ""], max_tokens=6, ignore_eos=True)
