"""Finding the SAEs of a directory, and choosing among them by layer and k."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steerserve.errors import ArtifactError
from steerserve.saes import load_sae, load_saes
from steerserve.saes.tree import find_saes

HIDDEN, FEATURES = 4, 8


def trainer(folder: Path, layer: int, k: int, policy: str = "mask", seed: int = 0) -> None:
    """One of DLM-Scope's folders."""
    folder.mkdir(parents=True)
    config = {"dict_class": "AutoEncoderTopK", "activation_dim": HIDDEN, "dict_size": FEATURES, "k": k, "layer": layer}
    config["submodule_name"] = f"resid_post_layer_{layer}"
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"dlm_mask_policy": policy}}))
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder.weight": (FEATURES, HIDDEN), "encoder.bias": (FEATURES,)}
    shapes |= {"decoder.weight": (HIDDEN, FEATURES), "b_dec": (HIDDEN,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(weights | {"k": torch.tensor(k), "threshold": torch.tensor(0.5)}, folder / "ae.pt")


def sae_lens(folder: Path, layer: int, **metadata: Any) -> Path:
    folder.mkdir(parents=True)
    place = {"hook_name": f"blocks.{layer}.hook_resid_post"} | metadata
    config = {"architecture": "standard", "d_in": HIDDEN, "d_sae": FEATURES, "metadata": place}
    (folder / "cfg.json").write_text(json.dumps(config))
    shapes = {"W_enc": (HIDDEN, FEATURES), "b_enc": (FEATURES,), "W_dec": (FEATURES, HIDDEN), "b_dec": (HIDDEN,)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "sae_weights.safetensors")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """DLM-Scope's tree in small: two policies, two layers, three k."""
    for policy in ("mask", "unmask"):
        for layer in (1, 26):
            for i, k in enumerate((2, 3, 5)):
                trainer(tmp_path / policy / f"resid_post_layer_{layer}" / f"trainer_{i}", layer, k, policy)
    return tmp_path


def test_ids_are_the_paths_below_the_directory(sweep: Path) -> None:
    found = find_saes(sweep)
    assert len(found) == 12
    assert list(found)[:2] == ["mask/resid_post_layer_1/trainer_0", "mask/resid_post_layer_1/trainer_1"]
    assert found["unmask/resid_post_layer_26/trainer_2"] == sweep / "unmask/resid_post_layer_26/trainer_2"


def test_a_sweep_is_chosen_from_by_layer_and_k(sweep: Path) -> None:
    saes = load_saes(sweep, layers=[26], k=3)
    assert list(saes) == ["mask/resid_post_layer_26/trainer_1", "unmask/resid_post_layer_26/trainer_1"]
    for name, sae in saes.items():
        assert sae.facts.id == name and (sae.facts.layer, sae.facts.k) == (26, 3)
        assert sae.facts.policy == ("mask" if name.startswith("mask") else "visible")
    assert len(load_saes(sweep, k=5)) == 4


def test_what_is_not_chosen_is_not_read(sweep: Path) -> None:
    (sweep / "mask" / "resid_post_layer_1" / "trainer_0" / "ae.pt").write_bytes(b"broken")
    assert len(load_saes(sweep, k=3)) == 4


def test_several_k_for_a_layer_are_refused(sweep: Path) -> None:
    message = r"resid_post_layer_26 has SAEs of k \[2, 3, 5\] for layer 26, policy mask: choose one k"
    with pytest.raises(ArtifactError, match=message):
        load_saes(sweep, layers=[26])


@pytest.mark.parametrize(
    ("layers", "k", "asked"),
    [([1, 2, 7], 3, r"layers \[2, 7\] and k 3"), (None, 50, "k 50"), ([2], None, r"layers \[2\]")],
)
def test_what_is_not_to_be_had_is_refused(sweep: Path, layers: list[int] | None, k: int | None, asked: str) -> None:
    with pytest.raises(ArtifactError, match=rf"has no SAE of {asked}; it has layers \[1, 26\] and k \[2, 3, 5\]"):
        load_saes(sweep, layers, k)


def test_layouts_and_depths_may_be_mixed(tmp_path: Path) -> None:
    sae_lens(tmp_path / "layer-4-mask", 4, policy="mask")
    sae_lens(tmp_path / "deep" / "er" / "one", 2)
    sae_lens(tmp_path / ".cache" / "old", 2)
    trainer(tmp_path / "resid_post_layer_1" / "trainer_0", 1, 3)
    (tmp_path / "activations").mkdir()
    (tmp_path / "notes.txt").write_text("nothing")
    saes = load_saes(tmp_path)
    assert {name: sae.facts.layer for name, sae in saes.items()} == {
        "deep/er/one": 2,
        "layer-4-mask": 4,
        "resid_post_layer_1/trainer_0": 1,
    }


def test_a_directory_may_be_one_sae(tmp_path: Path) -> None:
    folder = sae_lens(tmp_path / "one", 2)
    assert list(load_saes(folder)) == ["one"]


def test_a_link_back_up_is_not_followed_for_ever(tmp_path: Path) -> None:
    sae_lens(tmp_path / "a" / "one", 2)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a" / "one")
    assert list(find_saes(tmp_path)) == ["a/one", "linked"]


def test_weights_of_two_layouts_in_a_folder_are_refused(tmp_path: Path) -> None:
    folder = sae_lens(tmp_path / "one", 2)
    (folder / "ae.pt").write_bytes(b"")
    with pytest.raises(ArtifactError, match="weights of several layouts, sae_lens, dictionary_learning"):
        load_saes(tmp_path)


def test_a_folder_without_weights_is_no_sae(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no weights in it; one of \['sae_weights.safetensors', 'ae.pt'"):
        load_sae(tmp_path)
    assert load_saes(tmp_path) == {}


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"layer": 3}, "layer 3 contradicts 2, which the SAE's own files say"),
        ({"policy": "visible"}, "policy 'visible' contradicts 'mask'"),
        ({"layer": -1}, "layer: -1"),
        ({"k": 3}, r"unknown fields \['k'\], allowed are"),
        ([2], "must hold an object, got list"),
    ],
)
def test_notes_that_contradict_are_refused(tmp_path: Path, notes: Any, message: str) -> None:
    folder = sae_lens(tmp_path / "one", 2, policy="mask")
    (folder / "steerserve.json").write_text(json.dumps(notes))
    with pytest.raises(ArtifactError, match=message):
        load_sae(folder)


def test_notes_add_what_the_layout_does_not_say(tmp_path: Path) -> None:
    folder = sae_lens(tmp_path / "one", 2)
    (folder / "steerserve.json").write_text(json.dumps({"layer": 2, "policy": "visible", "model_sha256": "ab"}))
    facts = load_sae(folder).facts
    assert (facts.policy, facts.metadata["model_sha256"]) == ("visible", "ab")
