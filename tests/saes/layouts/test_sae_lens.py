"""The reader of SAELens' layout: what it accepts, and what it refuses by name."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.saes import SparseAutoencoder, load_sae, load_saes
from steerserve.saes.activation import Relu
from steerserve.saes.layouts.files import checked

HIDDEN, FEATURES = 6, 15


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (HIDDEN, FEATURES), "b_enc": (FEATURES,), "W_dec": (FEATURES, HIDDEN), "b_dec": (HIDDEN,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def config(**changes: Any) -> dict[str, Any]:
    metadata = {"hook_name": "blocks.3.hook_resid_post", "policy": "mask", "residual_norm": 2.5}
    base = {"architecture": "topk", "d_in": HIDDEN, "d_sae": FEATURES, "k": 4, "dtype": "float32", "metadata": metadata}
    base |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    return {name: value for name, value in (base | changes).items() if value is not ...}


def write(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def test_facts_come_from_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "layer-3-mask", config(), tensors())
    facts = load_sae(folder).facts
    assert (facts.id, facts.layer, facts.hidden_size, facts.features) == ("layer-3-mask", 3, HIDDEN, FEATURES)
    assert (facts.activation, facts.policy, facts.k) == ("topk", "mask", 4)
    assert facts.metadata["residual_norm"] == 2.5
    assert facts.sha256 == hashlib.sha256((folder / "sae_weights.safetensors").read_bytes()).hexdigest()


def test_a_directory_is_read_folder_by_folder(tmp_path: Path) -> None:
    write(tmp_path / "b", config(), tensors(1))
    write(tmp_path / "a", config(architecture="standard", k=...), tensors(2))
    (tmp_path / "elsewhere").mkdir()
    saes = load_saes(tmp_path)
    assert list(saes) == ["a", "b"]
    assert isinstance(saes["a"].activation, Relu) and saes["a"].facts.k is None
    assert saes["a"].stats is None
    with pytest.raises(ArtifactError, match="no SAE directory"):
        load_saes(tmp_path / "none")


def test_feature_stats_beside_the_weights_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", config(), tensors())
    stats = {name: torch.rand(FEATURES) for name in ("max_act", "mean_act", "density")}
    save_file(stats, folder / "feature_stats.safetensors")
    loaded = load_sae(folder).stats
    assert (
        loaded is not None
        and torch.equal(loaded.max_act, stats["max_act"])
        and torch.equal(loaded.density, stats["density"])
    )
    save_file(stats | {"max_act": torch.rand(3)}, folder / "feature_stats.safetensors")
    with pytest.raises(ArtifactError, match=r"feature_stats.safetensors: max_act has shape \[3\], expected \[15\]"):
        load_sae(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk_is_held_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write(tmp_path / "s", config(), {name: tensor.to(dtype) for name, tensor in tensors().items()})
    sae = load_sae(folder)
    assert sae.W_enc.dtype == torch.float32 and torch.equal(sae.W_enc, tensors()["W_enc"].to(dtype).float())


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_sae_lens_computes_the_same(tmp_path: Path, architecture: str, subtract: bool, rescale: bool) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    cfg = config(architecture=architecture, apply_b_dec_to_input=subtract)
    if architecture == "topk":
        cfg["rescale_acts_by_decoder_norm"] = rescale
    folder = write(tmp_path / "s", cfg, tensors())
    theirs, ours = sae_lens.SAE.load_from_disk(folder), load_sae(folder)
    hidden = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours.encode(hidden), theirs.encode(hidden).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(hidden), theirs(hidden).detach(), rtol=1e-4, atol=1e-5)


def random_sae(made: Any, seed: int = 0) -> Any:
    """One of SAELens' own, with weights so large that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(drawn.abs() if name == "threshold" else 0.5 * drawn if name == "r_mag" else drawn)
    return made


def assert_alike(ours: SparseAutoencoder, theirs: Any, seed: int = 3) -> None:
    hidden = 2 * torch.randn(4, 30, HIDDEN, generator=torch.Generator().manual_seed(seed))
    wanted = theirs.encode(hidden).detach()
    assert 0.02 < float((wanted != 0).float().mean()) < 0.95
    torch.testing.assert_close(ours.encode(hidden), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(wanted), theirs.decode(wanted).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("topk", {"k": 4}),
        ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
        ("abstopk", {"k": 4}),
        ("abstopk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("gated", {}),
        ("matching_pursuit", {}),
        ("matching_pursuit", {"residual_threshold": 1.5, "max_iterations": 4}),
        ("matching_pursuit", {"residual_threshold": 0.0, "stop_on_duplicate_support": False, "max_iterations": 5}),
    ],
)
def test_every_architecture_that_sae_lens_writes_is_read(
    tmp_path: Path, architecture: str, options: dict[str, Any], subtract: bool
) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    kind, options_of = sae_lens.registry.get_sae_class(architecture)
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_post")
    theirs = random_sae(
        kind(options_of(d_in=HIDDEN, d_sae=FEATURES, apply_b_dec_to_input=subtract, metadata=metadata, **options))
    )
    if architecture == "matching_pursuit":
        theirs.W_dec.data /= theirs.W_dec.data.norm(dim=1, keepdim=True)
    theirs.save_model(tmp_path / "s")
    ours = load_sae(tmp_path / "s")
    assert (ours.facts.activation, ours.facts.layer, ours.facts.k) == (architecture, 3, options.get("k"))
    assert_alike(ours, theirs)


@pytest.mark.parametrize("factor", [1.0, 0.4])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("topk", {"k": 4}),
        ("abstopk", {"k": 4, "rescale_acts_by_decoder_norm": False}),
        ("batchtopk", {"k": 4.0}),
        ("batchtopk", {"k": 4.5, "rescale_acts_by_decoder_norm": False}),
        ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": [5, FEATURES]}),
        ("jumprelu", {}),
        ("gated", {}),
        ("matching_pursuit", {"decoder_init_norm": 1.0, "residual_threshold": 0.8}),
    ],
)
def test_a_checkpoint_of_training_computes_what_is_saved_for_inference(
    tmp_path: Path, architecture: str, options: dict[str, Any], factor: float
) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    kind, options_of = sae_lens.registry.get_sae_training_class(architecture)
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_post")
    options = options | ({} if factor == 1.0 else {"normalize_activations": "expected_average_only_in"})
    trained = random_sae(kind(options_of(d_in=HIDDEN, d_sae=FEATURES, metadata=metadata, **options)))
    if architecture == "matching_pursuit":
        trained.W_dec.data /= trained.W_dec.data.norm(dim=1, keepdim=True)
    if "batchtopk" in architecture:
        trained.topk_threshold.fill_(1.5)
    trained.save_model(tmp_path / "checkpoint")
    if factor != 1.0:
        (tmp_path / "checkpoint" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        trained.fold_activation_norm_scaling_factor(factor)
    trained.save_inference_model(tmp_path / "final")
    if architecture == "matching_pursuit" and factor != 1.0:
        # SAELens keeps the threshold of the residual in its config, which it writes from the folded one.
        assert json.loads((tmp_path / "final" / "cfg.json").read_text())["residual_threshold"] == 0.8 / factor
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "final")
    assert_alike(load_sae(tmp_path / "checkpoint"), theirs)
    assert_alike(load_sae(tmp_path / "final"), theirs)


def test_a_gated_sae_follows_its_definition(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in tensors(1).items() if name != "b_enc"}
    generator = torch.Generator().manual_seed(5)
    weights |= {name: 0.5 * torch.randn(FEATURES, generator=generator) for name in ("b_gate", "b_mag", "r_mag")}
    sae = load_sae(write(tmp_path / "s", config(architecture="gated", k=...), weights))
    for token in torch.randn(20, HIDDEN, generator=generator):
        reached = (token - weights["b_dec"]) @ weights["W_enc"]
        gate = reached + weights["b_gate"] > 0
        magnitude = torch.relu(torch.exp(weights["r_mag"]) * reached + weights["b_mag"])
        torch.testing.assert_close(sae.encode(token), gate * magnitude, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.relu(token), magnitude, rtol=1e-5, atol=1e-5)


def test_a_jump_relu_sae_follows_its_definition(tmp_path: Path) -> None:
    weights = tensors(1) | {"threshold": torch.rand(FEATURES, generator=torch.Generator().manual_seed(5))}
    sae = load_sae(write(tmp_path / "s", config(architecture="jumprelu", apply_b_dec_to_input=False), weights))
    for token in torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(6)):
        pre = token @ weights["W_enc"] + weights["b_enc"]
        wanted = [float(x) if x > t and x > 0 else 0.0 for x, t in zip(pre, weights["threshold"], strict=True)]
        torch.testing.assert_close(sae.encode(token), torch.tensor(wanted), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.relu(token), torch.relu(pre), rtol=1e-5, atol=1e-5)


def test_weights_in_float32_are_not_copied() -> None:
    found = tensors()
    held = checked("f", found, {name: tuple(tensor.shape) for name, tensor in found.items()})
    assert all(held[name] is found[name] for name in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_iterations": 0}, "max_iterations: 0, but a whole number of 1 or more"),
        ({"residual_threshold": "small"}, "residual_threshold: 'small', but a number"),
        ({"stop_on_duplicate_support": 1}, "stop_on_duplicate_support: 1, but a bool"),
    ],
)
def test_a_pursuit_without_sense_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    weights = {name: tensor for name, tensor in tensors().items() if name in ("W_dec", "b_dec")}
    with pytest.raises(ArtifactError, match=message):
        load_sae(write(tmp_path / "s", config(architecture="matching_pursuit", k=..., **changes), weights))


@pytest.mark.parametrize("factor", [None, 0, "1", float("inf")])
def test_a_scaling_factor_must_be_a_number_above_zero(tmp_path: Path, factor: Any) -> None:
    folder = write(tmp_path / "s", config(normalize_activations="expected_average_only_in"), tensors())
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    with pytest.raises(ArtifactError, match="scaling_factor is .*, but a number above 0 is needed"):
        load_sae(folder)


def test_flat_configs_of_old_versions_are_read(tmp_path: Path) -> None:
    old = {"d_in": HIDDEN, "d_sae": FEATURES, "hook_point": "blocks.1.hook_resid_post", "hook_point_layer": 1}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "finetuning_scaling_factor": False}
    facts = load_sae(write(tmp_path / "s", old, tensors())).facts
    assert (facts.layer, facts.activation, facts.k, facts.policy) == (1, "topk", 2, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, "architecture: 'temporal' is not supported, allowed are .*topk"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations: 'layer_norm' is not supported, allowed are"),
        ({"architecture": "transcoder"}, "architecture: 'transcoder' is not supported"),
        ({"architecture": ["topk"]}, r"architecture: \['topk'\] is not supported"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations: 'constant_norm_rescale' is not"),
        (
            {"normalize_activations": "expected_average_only_in"},
            "normalize_activations: 'expected_average_only_in' needs the factor .* activation_scaler.json",
        ),
        ({"reshape_activations": "hook_z"}, "reshape_activations: 'hook_z'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor: True"),
        ({"k": 0}, "k: 0, but a topk SAE of 15 features needs a whole number from 1 to 15"),
        ({"k": FEATURES + 1}, "k: 16"),
        ({"k": ...}, "k: None"),
        ({"d_in": "6"}, "d_in: '6'"),
        ({"metadata": []}, "metadata must be an object"),
        (
            {"metadata": {"hook_name": "blocks.3.hook_mlp_out"}},
            "hook_name: 'blocks.3.hook_mlp_out', but a layer's output",
        ),
        ({"metadata": {}}, "hook_name: None"),
        ({"metadata": {"hook_name": "layers.3", "hook_layer": 4}}, "hook_layer: 4 contradicts"),
        ({"metadata": {"hook_name": "layers.3", "hook_head_index": 2}}, "hook_head_index: 2"),
        ({"metadata": {"hook_name": "layers.3", "policy": "both"}}, "policy: 'both'"),
    ],
)
def test_a_config_we_cannot_honour_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_sae(write(tmp_path / "s", config(**changes), tensors()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_dec": None}, r"missing tensors \['b_dec'\]"),
        ({"threshold": torch.ones(FEATURES)}, r"unexpected tensors \['threshold'\]"),
        (
            {"W_enc": torch.ones(FEATURES, HIDDEN)},
            r"W_enc has shape \[15, 6\], expected \[6, 15\] \(it is transposed\)",
        ),
        ({"b_enc": torch.ones(HIDDEN)}, r"b_enc has shape \[6\], expected \[15\]"),
        ({"W_dec": torch.full((FEATURES, HIDDEN), float("nan"))}, "W_dec has 90 values that are not finite"),
        ({"b_dec": torch.ones(HIDDEN, dtype=torch.int64)}, "b_dec has type torch.int64"),
        ({"scaling_factor": torch.full((FEATURES,), 1.5)}, "scaling_factor is not 1"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    weights = {name: tensor for name, tensor in (tensors() | changes).items() if tensor is not None}
    with pytest.raises(ArtifactError, match=message):
        load_sae(write(tmp_path / "s", config(), weights))


@pytest.mark.parametrize("asked", [False, True])
def test_a_scaling_factor_of_ones_is_no_hindrance(tmp_path: Path, asked: bool) -> None:
    plain = load_sae(write(tmp_path / "plain", config(), tensors()))
    with_ones = tensors() | {"scaling_factor": torch.ones(FEATURES)}
    same = load_sae(write(tmp_path / "ones", config(finetuning_scaling_factor=asked), with_ones))
    states = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert torch.equal(same.encode(states), plain.encode(states))


def test_a_zero_row_cannot_be_rescaled(tmp_path: Path) -> None:
    weights = tensors()
    weights["W_dec"][5] = 0.0
    with pytest.raises(ArtifactError, match="W_dec: row 5 is zero"):
        load_sae(write(tmp_path / "s", config(rescale_acts_by_decoder_norm=True), weights))


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", config(), tensors())
    (folder / "sae_weights.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        load_sae(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_sae(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ArtifactError, match="cfg.json cannot be read"):
        load_sae(folder)


def test_reading_changes_nothing_on_disk(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", config(rescale_acts_by_decoder_norm=True), tensors())
    sae = load_sae(folder)
    torch.testing.assert_close(sae.decoder_norm, torch.ones(FEATURES))
    assert torch.equal(load_file(folder / "sae_weights.safetensors")["W_dec"], tensors()["W_dec"])
