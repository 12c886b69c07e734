"""Probes on disk, and what they say."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steerserve.errors import ArtifactError
from steerserve.runtime.cards import attribute_card
from steerserve.steering.attribute import load_attribute
from steerserve.steering.probe import FILE, Probe, load_probe
from tests import tiny

TOLD: dict[str, Any] = {"layer": 2, "bias": -0.25, "accuracy": 0.875, "texts": 120}


def probe(seed: int = 0) -> Probe:
    weights = torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))
    return Probe(layer=2, weights=weights, bias=-0.1 - 1e-9, accuracy=0.9137, texts=1234)


def write(folder: Path, name: str, weights: torch.Tensor, told: Any) -> None:
    save_file({name: weights}, folder / FILE, {"probe": json.dumps(told)})


def load(folder: Path) -> Probe | None:
    return load_probe(folder, num_layers=3, hidden_size=tiny.HIDDEN)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    made = probe()
    made.save(tmp_path)
    found = load(tmp_path)
    assert found is not None and torch.equal(found.weights, made.weights)
    assert (found.layer, found.bias, found.accuracy, found.texts) == (2, made.bias, 0.9137, 1234)
    assert found.sha256 == hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest()
    assert found.card() == {"layer": 2, "accuracy": 0.9137, "texts": 1234, "sha256": found.sha256}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    before = (tmp_path / FILE).read_bytes()
    made.save(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert load(tmp_path) is None


def test_log_odds_are_a_weighted_sum_and_the_bias() -> None:
    made = probe()
    means = torch.randn(3, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    for mean, found in zip(means.tolist(), made.log_odds(means).tolist(), strict=True):
        expected = made.bias + sum(w * x for w, x in zip(made.weights.tolist(), mean, strict=True))
        assert found == pytest.approx(expected, abs=1e-5)
    assert float(made.log_odds(means[0].double())) == pytest.approx(float(made.log_odds(means)[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 3}, "of layer 3, which does not fit a model of 3 layers of size 32"),
        ({"layer": -1}, "of layer -1, which does not fit"),
        ({"layer": "two"}, "is no probe: ValueError"),
        ({"layer": [2]}, "is no probe: TypeError"),
        ({"bias": math.nan}, "weights and bias must be finite"),
        ({"bias": "much"}, "is no probe: ValueError"),
        ({"accuracy": math.nan}, "accuracy must be between 0 and 1 and texts 0 or more, got nan and 120"),
        ({"accuracy": 1.5}, "got 1.5 and 120"),
        ({"texts": -1}, "got 0.875 and -1"),
    ],
)
def test_facts_that_cannot_be_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "weights", torch.ones(tiny.HIDDEN), TOLD | change)
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("weights", torch.ones(tiny.HIDDEN + 1), r"reads \[33\] states of layer 2, which does not fit"),
        ("weights", torch.ones(1, tiny.HIDDEN), r"reads \[1, 32\] states"),
        ("weights", torch.full((tiny.HIDDEN,), math.inf), "weights and bias must be finite"),
        ("other", torch.ones(tiny.HIDDEN), "is no probe: SafetensorError"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name: str, weights: torch.Tensor, message: str, tmp_path: Path) -> None:
    write(tmp_path, name, weights, TOLD)
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path)


def test_a_file_that_is_no_probe_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no tensors here")
    with pytest.raises(ArtifactError, match="is no probe: SafetensorError"):
        load(tmp_path)
    save_file({"weights": torch.ones(tiny.HIDDEN)}, tmp_path / FILE)
    with pytest.raises(ArtifactError, match="is no probe: KeyError: 'probe'"):
        load(tmp_path)
    for told, message in (([], "TypeError"), ({"layer": 2}, "KeyError: 'bias'")):
        write(tmp_path, "weights", torch.ones(tiny.HIDDEN), told)
        with pytest.raises(ArtifactError, match=f"is no probe: {message}"):
            load(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(ArtifactError, match="is no probe"):
        load(tmp_path)


def test_an_attribute_comes_with_its_probe_and_keeps_its_hash(tmp_path: Path) -> None:
    bare = tiny.attribute(tmp_path, "topic/sports")
    assert bare.probe is None and attribute_card(bare)["probe"] is None
    probe().save(tmp_path)
    found = load_attribute(tmp_path, tiny.MODEL_SHA, 3, tiny.HIDDEN)
    assert found.probe is not None and torch.equal(found.probe.weights, probe().weights)
    assert found.sha256 == bare.sha256
    assert attribute_card(found)["probe"] == found.probe.card()


def test_saving_an_attribute_leaves_no_probe_of_another(tmp_path: Path) -> None:
    bare = tiny.attribute(tmp_path, "topic/sports")
    replace(bare, probe=probe()).save(tmp_path)
    assert load(tmp_path) is not None
    bare.save(tmp_path)
    assert load(tmp_path) is None
