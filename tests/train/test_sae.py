"""The SAE recipe from texts to folders, on a tiny model, with SAELens' real trainer."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from steerserve.errors import ArtifactError
from steerserve.models.families.bert import BertConfig, BertDiffusionLM
from steerserve.saes import load_saes
from steerserve.train.sae import SaeRecipe, train_saes
from steerserve.train.tokenizer import SPECIAL, build_tokenizer


@pytest.fixture(scope="module", autouse=True)
def sae_lens() -> Any:
    """SAELens, imported when the first test needs it and past its warnings of what it will deprecate."""
    return pytest.importorskip("sae_lens")


WORDS = [f"w{i}" for i in range(40)]
RECIPE = SaeRecipe(
    features=64,
    k=4,
    gathered=1500,
    states=12_000,
    batch=100,
    learning_rate=5e-3,
    dead_after=500,
    held_out=200,
    held_out_crops=20,
    batch_tokens=512,
    context=24,
)


@pytest.fixture(scope="module")
def lm() -> BertDiffusionLM:
    torch.manual_seed(0)
    return BertDiffusionLM(BertConfig(len(SPECIAL) + len(WORDS), 16, 3, 2, 32, 24, 4, 3, 2)).requires_grad_(False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 40))) for _ in range(300)]
    (folder / "some.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer((*SPECIAL, *WORDS))


@pytest.fixture(scope="module")
def trained(lm: BertDiffusionLM, data: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saes")
    train_saes(lm, tokenizer, data, out, [0, 2], RECIPE, "aa")
    return out


def test_one_folder_for_each_layer_and_policy(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == [
        "layer-0-mask",
        "layer-0-visible",
        "layer-2-mask",
        "layer-2-visible",
    ]
    for name, sae in load_saes(trained).items():
        assert name == f"layer-{sae.facts.layer}-{sae.facts.policy}"
        assert (sae.facts.features, sae.facts.k, sae.facts.activation) == (64, 4, "topk")
        sae.facts.check_model(16, 3, "aa")
        torch.testing.assert_close(sae.decoder_norm, torch.ones(64), rtol=0, atol=1e-5)
        card = json.loads((trained / name / "card.json").read_text())
        assert card["sha256"] == sae.facts.sha256 and card["model_sha256"] == "aa"
        assert sae.facts.metadata["residual_norm"] == pytest.approx(card["results"]["residual_norm"], rel=1e-5)
        assert sae.stats is not None and float(sae.stats.max_act.max()) > 0


def test_the_features_explain_raw_states(trained: Path) -> None:
    for folder in trained.iterdir():
        results = json.loads((folder / "card.json").read_text())["results"]
        assert results["explained_variance"] > 0.5
        assert abs(results["explained_variance"] - results["explained_variance_before_float16"]) < 1e-3
        assert 0 < results["l0"] <= 4
        assert abs(results["loss_delta"]) < 0.5


def test_sae_lens_reads_what_was_saved(trained: Path, sae_lens: Any) -> None:
    for name, ours in load_saes(trained).items():
        theirs = sae_lens.SAE.load_from_disk(trained / name)
        hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours.encode(hidden), theirs.encode(hidden).detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(hidden), theirs(hidden).detach(), rtol=1e-4, atol=1e-5)


def test_a_second_run_adds_only_what_is_missing_and_is_the_same(
    trained: Path, lm: BertDiffusionLM, data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = train_saes(lm, tokenizer, data, tmp_path, [2], replace(RECIPE), "aa")
    kept = (tmp_path / "layer-2-mask" / "card.json").stat().st_mtime_ns
    assert first["layer-2-mask"]["sha256"] == json.loads((trained / "layer-2-mask" / "card.json").read_text())["sha256"]
    both = train_saes(lm, tokenizer, data, tmp_path, [2, 1], RECIPE, "aa")
    assert sorted(both) == ["layer-1-mask", "layer-1-visible", "layer-2-mask", "layer-2-visible"]
    assert (tmp_path / "layer-2-mask" / "card.json").stat().st_mtime_ns == kept


def test_an_interrupted_run_keeps_what_it_gathered_and_ends_the_same(
    trained: Path,
    lm: BertDiffusionLM,
    data: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(_: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lm, "head", stop)  # called first when the first SAE is evaluated
        train_saes(lm, tokenizer, data, tmp_path, [0, 2], RECIPE, "aa")
    assert (tmp_path / ".activations" / "layer-2-visible.f16").exists()
    assert load_saes(tmp_path) == {}
    cards = train_saes(lm, tokenizer, data, tmp_path, [0, 2], RECIPE, "aa")
    assert not (tmp_path / ".activations").exists()
    for name, card in cards.items():
        assert card["sha256"] == json.loads((trained / name / "card.json").read_text())["sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 65}, r"k must be 1 to features \(64\), got 65"),
        ({"batch": 1501}, r"batch must be 1 to gathered \(1500\), got 1501"),
        ({"mask_ratios": (0.5, 0.2)}, "mask_ratios must be two shares in order"),
        ({"mask_ratios": (1.0, 1.0)}, "must leave visible positions"),
        ({"policies": ("both",)}, r"policies must be 'mask' or 'visible', got \['both'\]"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **changes)


def test_saes_of_another_recipe_or_model_are_not_mixed_in(
    trained: Path, lm: BertDiffusionLM, data: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ArtifactError, match="made with another recipe"):
        train_saes(lm, tokenizer, data, trained, [0], replace(RECIPE, k=5), "aa")
    with pytest.raises(ArtifactError, match="made with another model_sha256"):
        train_saes(lm, tokenizer, data, trained, [0], RECIPE, "bb")


def test_a_layer_the_model_lacks_is_refused(
    lm: BertDiffusionLM, data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"layers: \[3\], but the model has layers 0 to 2"):
        train_saes(lm, tokenizer, data, tmp_path, [1, 3], RECIPE, "aa")
