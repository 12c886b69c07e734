"""The reader of dictionary_learning's layout: its classes by their definitions, DLM-Scope's trees, and refusals."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.runtime.cards import sae_card
from steerserve.saes import load_sae

HIDDEN, FEATURES, K = 6, 16, 4


def linear() -> dict[str, tuple[int, ...]]:
    return {"encoder.weight": (FEATURES, HIDDEN), "encoder.bias": (FEATURES,), "decoder.weight": (HIDDEN, FEATURES)}


def matrices() -> dict[str, tuple[int, ...]]:
    return {
        "W_enc": (HIDDEN, FEATURES),
        "b_enc": (FEATURES,),
        "W_dec": (FEATURES, HIDDEN),
        "b_dec": (HIDDEN,),
    }


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "AutoEncoder": linear() | {"bias": (HIDDEN,)},
    "AutoEncoderNew": linear() | {"decoder.bias": (HIDDEN,)},
    "AutoEncoderTopK": linear() | {"b_dec": (HIDDEN,)},
    "BatchTopKSAE": linear() | {"b_dec": (HIDDEN,)},
    "MatryoshkaBatchTopKSAE": matrices(),
    "GatedAutoEncoder": {
        "encoder.weight": (FEATURES, HIDDEN),
        "decoder.weight": (HIDDEN, FEATURES),
        "decoder_bias": (HIDDEN,),
        **dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), (FEATURES,)),
    },
    "JumpReluAutoEncoder": matrices() | {"threshold": (FEATURES,)},
}


def state(dict_class: str = "AutoEncoderTopK", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES[dict_class].items()}
    if dict_class == "JumpReluAutoEncoder":
        made["threshold"] = made["threshold"].abs()
    if "TopK" in dict_class:
        made |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(1.25)}
    if dict_class == "MatryoshkaBatchTopKSAE":
        made["group_sizes"] = torch.tensor([6, 10])
    return made


def config(dict_class: str = "AutoEncoderTopK", buffer: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    trainer = {
        "trainer_class": "TopKTrainer",
        "dict_class": dict_class,
        "activation_dim": HIDDEN,
        "dict_size": FEATURES,
        "k": K,
        "layer": 5,
        "lm_name": "GSAI-ML/LLaDA-8B-Base",
        "submodule_name": "resid_post_layer_5",
    } | changes
    place = {"d_submodule": HIDDEN, "io": "out", "n_ctxs": 122, "dlm_mask_policy": "mask"} | (buffer or {})
    return {"trainer": {key: value for key, value in trainer.items() if value is not ...}, "buffer": place}


def write(folder: Path, cfg: dict[str, Any], weights: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    torch.save(weights, folder / "ae.pt")
    return folder


def top(pre: Tensor, k: int) -> Tensor:
    kept = set(sorted(range(FEATURES), key=lambda f: -float(pre[f]))[:k])
    return torch.tensor([max(0.0, float(value)) if f in kept else 0.0 for f, value in enumerate(pre)])


def reference(dict_class: str, w: dict[str, Tensor], token: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction of one token, by the classes of dictionary_learning."""
    if dict_class == "AutoEncoder":
        norm = w["decoder.weight"].norm(dim=0)
        code = torch.relu(w["encoder.weight"] @ (token - w["bias"]) + w["encoder.bias"]) * norm
        return code, (w["decoder.weight"] / norm) @ code + w["bias"]
    if dict_class == "AutoEncoderNew":
        code = torch.relu(w["encoder.weight"] @ token + w["encoder.bias"])
        return code, w["decoder.weight"] @ code + w["decoder.bias"]
    if dict_class == "GatedAutoEncoder":
        reached = w["encoder.weight"] @ (token - w["decoder_bias"])
        code = (reached + w["gate_bias"] > 0) * torch.relu(w["r_mag"].exp() * reached + w["mag_bias"])
        return code, w["decoder.weight"] @ code + w["decoder_bias"]
    if dict_class == "JumpReluAutoEncoder":
        pre = token @ w["W_enc"] + w["b_enc"]
        code = torch.relu(pre * (pre > w["threshold"]))
        return code, code @ w["W_dec"] + w["b_dec"]
    if dict_class == "MatryoshkaBatchTopKSAE":
        code = torch.relu((token - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        code = code * (code > w["threshold"])
        return code, code @ w["W_dec"] + w["b_dec"]
    pre = w["encoder.weight"] @ (token - w["b_dec"]) + w["encoder.bias"]
    code = top(pre, K) if dict_class == "AutoEncoderTopK" else torch.relu(pre) * (pre > w["threshold"])
    return code, w["decoder.weight"] @ code + w["b_dec"]


@pytest.mark.parametrize("dict_class", SHAPES)
def test_every_class_follows_its_definition(tmp_path: Path, dict_class: str) -> None:
    weights = state(dict_class)
    folder = write(tmp_path / "trainer_0", config(dict_class), weights)
    for _ in ("from the pickle", "from its copy"):
        sae = load_sae(folder)
        for token in 2 * torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1)):
            code, rebuilt = reference(dict_class, weights, token)
            torch.testing.assert_close(sae.encode(token), code, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sae.decode(code), rebuilt, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dict_class", SHAPES)
def test_the_library_computes_the_same(tmp_path: Path, dict_class: str) -> None:
    modules = {
        "AutoEncoderTopK": "trainers.top_k",
        "BatchTopKSAE": "trainers.batch_top_k",
        "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k",
    }
    name = f"dictionary_learning.{modules.get(dict_class, 'dictionary')}"
    library = pytest.importorskip(name, exc_type=ImportError)
    folder = write(tmp_path / "trainer_0", config(dict_class), state(dict_class))
    ours, theirs = load_sae(folder), getattr(library, dict_class).from_pretrained(folder / "ae.pt")
    hidden = 2 * torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
    code = theirs.encode(hidden).detach()
    torch.testing.assert_close(ours.encode(hidden), code, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(code), theirs.decode(code).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("stated", "policy"), [("mask", "mask"), ("unmask", "visible"), ("all", None), ("clean", None), (None, None)]
)
def test_facts_come_from_the_tree(tmp_path: Path, stated: str | None, policy: str | None) -> None:
    folder = tmp_path / "resid_post_layer_5" / "trainer_0"
    write(folder, config(buffer={"dlm_mask_policy": stated}), state())
    facts = load_sae(folder).facts
    assert (facts.id, facts.layer, facts.hidden_size, facts.features) == ("trainer_0", 5, HIDDEN, FEATURES)
    assert (facts.activation, facts.policy, facts.k) == ("AutoEncoderTopK", policy, K)
    assert facts.sha256 == hashlib.sha256((folder / "ae.pt").read_bytes()).hexdigest()
    assert facts.metadata["trainer"]["lm_name"] == "GSAI-ML/LLaDA-8B-Base"


@pytest.mark.parametrize(
    ("parent", "changes", "layer"),
    [
        ("resid_post_layer_5", {}, 5),
        ("resid_post_layer_7", {"layer": ..., "submodule_name": None}, 7),
        ("elsewhere", {"submodule_name": ...}, 5),
        ("elsewhere", {"layer": ..., "submodule_name": "model.layers.9"}, 9),
    ],
)
def test_the_layer_is_told_by_any_of_three(tmp_path: Path, parent: str, changes: dict[str, Any], layer: int) -> None:
    assert load_sae(write(tmp_path / parent / "trainer_0", config(**changes), state())).facts.layer == layer


def test_the_pickle_is_kept_as_safetensors_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "trainer_0", config(), state())
    first = load_sae(folder)
    [copy] = folder.glob("*.safetensors")
    stamp = copy.stat().st_mtime_ns
    second = load_sae(folder)
    assert copy.stat().st_mtime_ns == stamp and second.facts.sha256 == first.facts.sha256
    assert torch.equal(first.W_enc, second.W_enc)
    torch.save(state(seed=1), folder / "ae.pt")
    assert torch.equal(load_sae(folder).W_enc, state(seed=1)["encoder.weight"].T)


def test_matrices_are_views_of_what_is_on_disk(tmp_path: Path) -> None:
    sae = load_sae(write(tmp_path / "trainer_0", config(), state()))
    assert sae.W_enc.stride() == (1, HIDDEN) and sae.W_dec.stride() == (1, FEATURES)


def test_a_top_k_sae_without_a_threshold_is_read(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in state().items() if name != "threshold"}
    assert load_sae(write(tmp_path / "trainer_0", config(), weights)).facts.k == K


@pytest.mark.parametrize(
    ("weights", "buffer", "said"),
    [
        ({}, {}, ["DLM-Scope's own steering script leaves - b_dec out"]),
        ({"b_dec": torch.zeros(HIDDEN)}, {}, []),
        ({}, {"dlm_mask_policy": ...}, []),
        ({"threshold": torch.tensor(-1.0)}, {"dlm_mask_policy": ...}, ["ae.pt is of an unfinished training"]),
    ],
)
def test_what_is_to_be_known_of_a_file_is_said_where_it_is_loaded(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    weights: dict[str, Tensor],
    buffer: dict[str, Any],
    said: list[str],
) -> None:
    """In its facts, which `inspect` prints and the card repeats, and in the log."""
    made = config(buffer=buffer)
    made["buffer"] = {name: value for name, value in made["buffer"].items() if value is not ...}
    sae = load_sae(write(tmp_path / "trainer_0", made, state() | weights))
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(sae.facts.remarks) == len(logged) == len(said)
    for part, remark, line in zip(said, sae.facts.remarks, logged, strict=True):
        assert part in remark
        assert line == f"SAE trainer_0: {remark}"
    assert sae_card(sae, {})["remarks"] == list(sae.facts.remarks)


class Payload:
    """What a pickle may ask for: here, to write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["beside", "instead"])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path: Path, place: str) -> None:
    payload = Payload(tmp_path / "ran")
    folder = write(tmp_path / "trainer_0", config(), {**state(), "x": payload} if place == "beside" else payload)
    with pytest.raises(ArtifactError, match="code is never run"):
        load_sae(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "buffer", "message"),
    [
        ({"dict_class": "CrossCoder"}, {}, "dict_class: 'CrossCoder' is not supported, allowed are .*AutoEncoderTopK"),
        ({"dict_class": ...}, {}, "dict_class: None"),
        ({"layer": 4}, {}, "submodule_name 'resid_post_layer_5' contradicts layer 4 contradicts folder"),
        ({"layer": 4, "submodule_name": "resid_post_layer_4"}, {}, "contradicts folder 'resid_post_layer_5'"),
        ({"submodule_name": "mlp_out_layer_5"}, {}, "submodule_name: 'mlp_out_layer_5', but a layer's output"),
        ({"layer": "5"}, {}, "layer: '5'"),
        ({"k": 5}, {}, "ae.pt: k is 4, but config.json says 5"),
        ({"k": 0}, {}, "k: 0"),
        ({"activation_dim": HIDDEN + 1}, {"d_submodule": HIDDEN + 1}, r"expected \[16, 7\]"),
        ({}, {"d_submodule": 99}, "d_submodule: 99 contradicts activation_dim 6"),
        ({}, {"io": "in"}, "io: 'in'"),
        ({}, {"dlm_mask_policy": "both"}, "dlm_mask_policy: 'both'"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(
    tmp_path: Path, changes: dict[str, Any], buffer: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "resid_post_layer_5" / "trainer_0", config(buffer=buffer, **changes), state())
    with pytest.raises(ArtifactError, match=message):
        load_sae(folder)


@pytest.mark.parametrize(
    ("dict_class", "changes", "message"),
    [
        ("AutoEncoderTopK", {"b_dec": None}, r"missing tensors \['b_dec'\]"),
        ("AutoEncoderTopK", {"k": None}, r"missing tensors \['k'\]"),
        ("AutoEncoderTopK", {"k": torch.tensor(4.0)}, "k has type torch.float32"),
        ("AutoEncoderTopK", {"k": torch.tensor([4])}, r"k has shape \[1\], expected \[\]"),
        ("AutoEncoderTopK", {"bias": torch.zeros(HIDDEN)}, r"unexpected tensors \['bias'\]"),
        ("AutoEncoderTopK", {"encoder.weight": torch.ones(HIDDEN, FEATURES)}, "encoder.weight .*it is transposed"),
        ("AutoEncoderTopK", {"decoder.weight": torch.full((HIDDEN, FEATURES), torch.inf)}, "not finite"),
        ("AutoEncoderTopK", {"decoder.weight": torch.eye(HIDDEN, FEATURES)}, "W_dec: row 6 is zero .10 of 16 are"),
        ("BatchTopKSAE", {"threshold": torch.tensor(-1.0)}, "threshold is -1.0: it is of an unfinished training"),
        ("MatryoshkaBatchTopKSAE", {"group_sizes": torch.tensor([6, 6])}, r"group_sizes \[6, 6\] do not make 16"),
        ("AutoEncoderTopK", {"k": "4"}, "holds dict, but tensors by name"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, dict_class: str, changes: dict[str, Any], message: str) -> None:
    weights = {name: tensor for name, tensor in (state(dict_class) | changes).items() if tensor is not None}
    with pytest.raises(ArtifactError, match=message):
        load_sae(write(tmp_path / "trainer_0", config(dict_class), weights))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "trainer_0", config(), state())
    whole = (folder / "ae.pt").read_bytes()
    (folder / "ae.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"ae\.pt is not a whole torch checkpoint"):
        load_sae(folder)
    assert not list(folder.glob("*.safetensors"))
