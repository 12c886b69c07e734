"""The same weights give the same bits, wherever in its file a tensor happens to start."""

import json
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerserve.models import DiffusionLM, load_model
from steerserve.numerics import LINE, aligned
from steerserve.saes import SparseAutoencoder, load_sae
from steerserve.steering.probe import Probe, read_probe
from tests import tiny

OFFSETS = (0, 4, 8, 56)
"""Bytes past a 64-byte line at which a file's tensors start; published files have every multiple of 8."""

HEADS = {"bert": tiny.bert, "llada": tiny.llada, "Dream": tiny.dream}
MDLM = {
    "model_type": "mdlm",
    "vocab_size": tiny.VOCAB,
    "model_length": tiny.CONTEXT,
    "hidden_dim": tiny.HIDDEN,
    "cond_dim": 32,
    "n_blocks": 3,
    "n_heads": 4,
    "mask_token_id": tiny.MASK,
    "eos_token_id": tiny.EOS,
}
SEDD = {
    "tokens": tiny.VOCAB - 1,
    "graph": {"type": "absorb"},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20.0},
    "model": {"type": "ddit", "scale_by_sigma": True, "hidden_size": tiny.HIDDEN, "cond_dim": 32}
    | {"length": tiny.CONTEXT, "n_blocks": 3, "n_heads": 4},
}


def move(path: Path, offset: int) -> None:
    """Write a safetensors file again with its data starting `offset` bytes past a 64-byte line."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].rstrip()
    header += b" " * ((offset - 8 - len(header)) % LINE)
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def write_model(folder: Path, family: str) -> None:
    if family in HEADS:
        model: Any = HEADS[family]()
        raw, tensors = {"model_type": family, **asdict(model.config)}, dict(model.state_dict())
    else:
        # MDLM's files have SEDD's tensors; "mdlm" folds its modulations at load, "mdlm timed" keeps them.
        raw = SEDD if family == "sedd" else MDLM | {"time_conditioning": family == "mdlm timed"}
        tensors = dict(tiny.sedd().state_dict())
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")


def outputs(model: DiffusionLM, dtype: torch.dtype) -> list[Tensor]:
    """Logits of rows of one token, whose products are of a matrix and a vector, and of more."""
    needs = model.facts.sigma is not None
    found = []
    for shape in ((1, 1), (1, 7), (3, 40)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape) % 80 + 5
        sigma = {"sigma": torch.full(shape[:1], 0.7, dtype=torch.float32)} if needs else {}
        found.append(model.head(model(ids, **sigma)).to(dtype))
    return found


@pytest.mark.parametrize("family", [*HEADS, "mdlm", "mdlm timed", "sedd"])
def test_a_models_bits_do_not_depend_on_where_its_file_puts_them(tmp_path: Path, family: str) -> None:
    write_model(tmp_path, family)
    for dtype in (torch.float32, torch.bfloat16):
        file = tmp_path / "model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
        wanted: list[Tensor] = []
        for offset in OFFSETS:
            if offset % dtype.itemsize == 0:
                move(file, offset)
                model = load_model(tmp_path, dtype)
                if dtype == torch.float32:
                    assert all(one.data_ptr() % LINE == 0 for one in model.state_dict().values())
                found = outputs(model, dtype)
                wanted = wanted or found
                assert all(map(torch.equal, found, wanted)), (dtype, offset)


def sae_lens(folder: Path, tensors: dict[str, Tensor]) -> Path:
    metadata = {"hook_name": "blocks.1.hook_resid_post"}
    # Without b_dec at the input, so that a product is made at load.
    config = {"architecture": "standard", "d_in": tiny.HIDDEN, "d_sae": tiny.FEATURES, "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": metadata}), encoding="utf-8")
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder / "sae_weights.safetensors"


def sparsify(folder: Path, tensors: dict[str, Tensor]) -> Path:
    config = {"activation": "topk", "num_latents": tiny.FEATURES, "k": 8, "d_in": tiny.HIDDEN}
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    named = {"encoder.weight": tensors["W_enc"].T.contiguous(), "encoder.bias": tensors["b_enc"]}
    save_file(named | {name: tensors[name] for name in ("W_dec", "b_dec")}, folder / "sae.safetensors")
    return folder / "sae.safetensors"


def dictionary_learning(folder: Path, tensors: dict[str, Tensor]) -> Path:
    trainer = {"dict_class": "AutoEncoder", "activation_dim": tiny.HIDDEN, "dict_size": tiny.FEATURES, "layer": 1}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}), encoding="utf-8")
    named = {"encoder.weight": tensors["W_enc"].T.contiguous(), "decoder.weight": tensors["W_dec"].T.contiguous()}
    torch.save(named | {"encoder.bias": tensors["b_enc"], "bias": tensors["b_dec"]}, folder / "ae.pt")
    load_sae(folder)
    return folder / "ae.pt.converted.safetensors"


@pytest.mark.parametrize("layout", [sae_lens, sparsify, dictionary_learning], ids=lambda layout: layout.__name__)
def test_an_saes_bits_do_not_depend_on_where_its_file_puts_them(
    tmp_path: Path, layout: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    folder = tmp_path / "layers.1"
    folder.mkdir()
    tensors = {name: getattr(tiny.sae(1), name).contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    file = layout(folder, tensors)
    hidden = torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(2))

    def found(sae: SparseAutoencoder) -> list[Tensor]:
        return [*sae.state_dict().values(), sae.encode(hidden), sae(hidden[0]), sae.pre(hidden[:1]), sae.direction(3)]

    wanted = found(load_sae(folder))
    for offset in OFFSETS:
        move(file, offset)
        assert all(map(torch.equal, found(load_sae(folder)), wanted)), offset


def test_a_probes_bits_do_not_depend_on_where_its_file_puts_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    Probe(1, torch.randn(tiny.HIDDEN, generator=generator), 0.5, 0.9, 12).save(tmp_path)
    state = torch.randn(tiny.HIDDEN, generator=generator)
    scores = set()
    for offset in OFFSETS:
        move(tmp_path / "probe.safetensors", offset)
        probe = read_probe(tmp_path)
        assert probe is not None
        scores.add(float(state @ probe.weights))
    assert len(scores) == 1


def test_only_what_could_be_rounded_otherwise_is_copied() -> None:
    memory = torch.zeros(65, dtype=torch.float64)
    assert aligned(memory) is memory and aligned(memory[8:]).data_ptr() == memory[8:].data_ptr()
    turned = memory[1:].reshape(8, 8).T
    moved = aligned(turned)
    assert moved.data_ptr() % LINE == 0 and moved.stride() == turned.stride()
    half = memory.half()[1:]
    assert aligned(half) is half
