"""The reader of sparsify's layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.saes import load_sae

HIDDEN, FEATURES, K = 6, 16, 4


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder.weight": (FEATURES, HIDDEN), "encoder.bias": (FEATURES,)}
    shapes |= {"W_dec": (FEATURES, HIDDEN), "b_dec": (HIDDEN,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def config(**changes: Any) -> dict[str, Any]:
    base = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": FEATURES, "k": K}
    base |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": HIDDEN}
    return {name: value for name, value in (base | changes).items() if value is not ...}


def write(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors() if weights is None else weights, folder / "sae.safetensors")
    return folder


def reference(cfg: dict[str, Any], token: Tensor) -> Tensor:
    w = tensors()
    pre = (w["encoder.weight"] @ (token - w["b_dec"]) + w["encoder.bias"]).tolist()
    out = [0.0] * FEATURES
    if cfg.get("activation") == "groupmax":
        for start in range(0, FEATURES, FEATURES // K):
            best = max(range(start, start + FEATURES // K), key=lambda f: pre[f])
            out[best] = max(0.0, pre[best])
        return torch.tensor(out)
    signed = cfg.get("signed", False)
    for f in sorted(range(FEATURES), key=lambda f: -abs(pre[f]) if signed else -pre[f])[:K]:
        out[f] = pre[f] if signed else max(0.0, pre[f])
    return torch.tensor(out)


CONFIGS = {
    "topk": config(),
    "groupmax": config(activation="groupmax"),
    "of the predecessor": config(activation=..., transcode=..., skip_connection=..., signed=False),
    "signed": config(activation=..., signed=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_activation_follows_its_definition(tmp_path: Path, name: str) -> None:
    sae, weights = load_sae(write(tmp_path / "layers.3", CONFIGS[name])), tensors()
    for token in torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1)):
        code = reference(CONFIGS[name], token)
        torch.testing.assert_close(sae.encode(token), code, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(token), code @ weights["W_dec"] + weights["b_dec"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify_computes_the_same(tmp_path: Path, activation: str) -> None:
    sparsify = pytest.importorskip("sparsify", exc_type=ImportError)
    made = sparsify.SparseCoder(HIDDEN, sparsify.SparseCoderConfig(k=K, num_latents=FEATURES, activation=activation))
    made.load_state_dict(tensors())
    made.save_to_disk(tmp_path / "layers.3")
    ours, theirs = load_sae(tmp_path / "layers.3"), sparsify.SparseCoder.load_from_disk(tmp_path / "layers.3")
    hidden = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(1))
    values, ids, _ = theirs.encode(hidden)
    code = torch.zeros(30, FEATURES).scatter(1, ids, values.detach())
    torch.testing.assert_close(ours.encode(hidden), code, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(hidden), theirs.decode(values, ids).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layer"), [("layers.3", 3), ("model.layers.12", 12), ("h.0", 0), ("model.transformer.blocks.7", 7)]
)
def test_the_layer_is_in_the_folders_name(tmp_path: Path, name: str, layer: int) -> None:
    facts = load_sae(write(tmp_path / name, config())).facts
    assert (facts.id, facts.layer, facts.k, facts.features, facts.policy) == (name, layer, K, FEATURES, None)


def test_the_number_of_features_may_be_a_factor(tmp_path: Path) -> None:
    weights = {name: tensor[:12] if len(tensor) == FEATURES else tensor for name, tensor in tensors().items()}
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    assert load_sae(write(tmp_path / "h.0", config(num_latents=0, expansion_factor=2), weights)).facts.features == 12


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("layers.3", {"transcode": True}, "transcode: True is not supported"),
        ("layers.3", {"skip_connection": True}, "skip_connection: True is not supported"),
        ("layers.3", {"activation": "jumprelu"}, "activation: 'jumprelu' is not supported, allowed are"),
        ("layers.3", {"activation": "groupmax", "k": 5}, "k: 5 groups do not divide the 16 features"),
        ("layers.3", {"k": 17}, "k: 17"),
        ("layers.3", {"d_in": ...}, "d_in: None"),
        ("layers.3", {"num_latents": 15}, r"shape \[16, 6\], expected \[15, 6\]"),
        ("layers.3.mlp", {}, "hook point 'layers.3.mlp', but a layer's output is needed"),
        ("other", {}, "which layer it reads; put steerserve.json"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_sae(write(tmp_path / name, config(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.weight": torch.ones(HIDDEN, FEATURES)}, "encoder.weight .*it is transposed"),
        ({"W_skip": torch.ones(HIDDEN, HIDDEN)}, r"unexpected tensors \['W_skip'\]"),
        ({"W_dec": None}, r"missing tensors \['W_dec'\]"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    weights = {name: tensor for name, tensor in (tensors() | changes).items() if tensor is not None}
    with pytest.raises(ArtifactError, match=message):
        load_sae(write(tmp_path / "layers.3", config(), weights))
