"""The reader of Gemma Scope's layout."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steerserve.errors import ArtifactError
from steerserve.saes import load_sae

HIDDEN, FEATURES = 6, 15


def arrays(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    shapes = {"W_enc": (HIDDEN, FEATURES), "W_dec": (FEATURES, HIDDEN), "b_enc": (FEATURES,), "b_dec": (HIDDEN,)}
    made = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return made | {"threshold": random.uniform(0, 1.5, FEATURES).astype(np.float32)}


def write(folder: Path, given: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **(arrays() if given is None else given))
    return folder


def test_it_computes_a_jump_relu_of_raw_states(tmp_path: Path) -> None:
    sae = load_sae(write(tmp_path / "layer_20" / "width_16k" / "average_l0_71"))
    w = {name: torch.from_numpy(array) for name, array in arrays().items()}
    for token in 2 * torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1)):
        pre = token @ w["W_enc"] + w["b_enc"]
        code = torch.where(pre > w["threshold"], torch.relu(pre), 0.0)
        torch.testing.assert_close(sae.encode(token), code, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(code), code @ w["W_dec"] + w["b_dec"], rtol=1e-5, atol=1e-5)
    assert (sae.facts.id, sae.facts.layer, sae.facts.activation) == ("average_l0_71", 20, "jumprelu")
    assert (sae.facts.hidden_size, sae.facts.features, sae.facts.k) == (HIDDEN, FEATURES, None)


@pytest.mark.parametrize("name", ["layer_3", "layer_3/width_16k", "layer_3/width_16k/canonical"])
def test_the_layer_is_in_a_folders_name(tmp_path: Path, name: str) -> None:
    assert load_sae(write(tmp_path / name)).facts.layer == 3


def test_elsewhere_the_layer_is_noted_beside(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine")
    with pytest.raises(ArtifactError, match=r'which layer it reads; put steerserve.json beside .* \{"layer": 3\}'):
        load_sae(folder)
    (folder / "steerserve.json").write_text('{"layer": 3, "policy": "mask", "residual_norm": 4.5}')
    facts = load_sae(folder).facts
    assert (facts.layer, facts.policy, facts.metadata["residual_norm"]) == (3, "mask", 4.5)


@pytest.mark.parametrize("release", ["gemma-scope-2b-pt-mlp", "gemma-scope-2b-pt-att", "gemma-scope-2b-pt-transcoders"])
def test_other_sites_are_refused(tmp_path: Path, release: str) -> None:
    with pytest.raises(ArtifactError, match=f"{release} does not hold SAEs of a layer's output"):
        load_sae(write(tmp_path / release / "layer_3" / "width_16k" / "canonical"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": None}, r"missing tensors \['threshold'\]"),
        ({"b_dec": None}, r"missing tensors \['b_dec'\]"),
        ({"extra": np.zeros(3)}, r"unexpected arrays \['extra'\]"),
        ({"W_enc": np.zeros((FEATURES, HIDDEN))}, r"W_enc has shape \[15, 6\], expected \[6, 15\] .it is transposed"),
        ({"W_dec": np.full((FEATURES, HIDDEN), np.nan)}, "W_dec has 90 values that are not finite"),
        ({"b_enc": np.zeros(FEATURES, dtype=np.int32)}, "b_enc has type torch.int32"),
        ({"b_enc": np.array(["a"] * FEATURES)}, "cannot be read as an archive"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given = {name: array for name, array in (arrays() | changes).items() if array is not None}
    with pytest.raises(ArtifactError, match=message):
        load_sae(write(tmp_path / "layer_3", given))


class Payload:
    """What a pickled array may ask for: here, to make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_an_array_of_objects_is_refused_and_does_not_run(tmp_path: Path) -> None:
    payload = np.array([Payload(tmp_path / "ran")], dtype=object)
    folder = write(tmp_path / "layer_3", arrays() | {"threshold": payload})
    with pytest.raises(ArtifactError, match="cannot be read as an archive of arrays"):
        load_sae(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_truncated_archive_is_refused(tmp_path: Path, share: float) -> None:
    folder = write(tmp_path / "layer_3")
    whole = (folder / "params.npz").read_bytes()
    (folder / "params.npz").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ArtifactError, match="cannot be read as an archive of arrays"):
        load_sae(folder)


def test_one_array_is_no_archive(tmp_path: Path) -> None:
    folder = write(tmp_path / "layer_3")
    with open(folder / "params.npz", "wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(ArtifactError, match="holds one array, but an archive of them is needed"):
        load_sae(folder)
