"""Labelled texts, and models of every family with SAEs: everything a calibration reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.models import DiffusionLM, weights_sha256
from steerserve.models.families.bert import BertDiffusionLM
from steerserve.models.families.dream import DreamDiffusionLM
from steerserve.models.families.llada import LladaDiffusionLM
from steerserve.models.families.llada2 import Llada2DiffusionLM
from steerserve.models.families.lladamoe import LladaMoeDiffusionLM
from steerserve.models.families.mdlm import MdlmDiffusionLM
from steerserve.models.families.sedd import SeddDiffusionLM
from tests import tiny
from tests.conftest import SENTENCES

HIDDEN, FEATURES = 32, 48
_CLASSES: dict[str, type[Any]] = {
    "bert": BertDiffusionLM,
    "llada": LladaDiffusionLM,
    "llada2": Llada2DiffusionLM,
    "lladamoe": LladaMoeDiffusionLM,
    "dream": DreamDiffusionLM,
    "mdlm": MdlmDiffusionLM,
    "mdlm-timed": MdlmDiffusionLM,
    "sedd": SeddDiffusionLM,
}
FAMILIES = tuple(name for name in _CLASSES if name != "llada2")
"""Those that are calibrated and trained on here; LLaDA2's states are another mixture of experts'."""
TASKS: list[dict[str, Any]] = [
    {"name": "who/king", "file": "who", "field": "who", "target": "king", "contrast": ["team", "crew"]},
    {"name": "who/crew", "file": "who", "field": "who", "target": "crew", "contrast": ["team", "king"]},
    {"name": "deed/won", "file": "who", "field": "deed", "target": "won", "contrast": "lost", "confidence": 0.6},
]
SMALL: dict[str, Any] = {
    "texts": 20,
    "candidates": 20,
    "kept": 8,
    "steering": 4,
    "p_value": 0.9,
    "judge_texts": 60,
    "samples": 5,
    "sample_tokens": 12,
    "sample_steps": 12,
    "slices": 64,
    "min_confident": 2,
    "strengths": (0.2, 0.6, 1.2),
    "search_texts": 2,
    "confirm_texts": 3,
    "trial_tokens": 8,
    "trial_steps": 4,
    "quality_masks": 2,
}


def family_config(name: str, vocabulary: int = 60, mask: int = 4, end: int = 3, start: int = 2) -> dict[str, Any]:
    """A `config.json` of two layers of size HIDDEN, under the keys of the published ones."""
    if name in tiny.HUGGING_FACE:
        ids = {"mask_token_id": mask, "eos_token_id": end, "bos_token_id": start}
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
        return tiny.huggingface_config(name, vocab_size=vocabulary, **sizes, **ids)
    if name == "sedd":
        # Its graph adds the mask to the vocabulary.
        return {
            "tokens": vocabulary,
            "graph": {"type": "absorb"},
            "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
            "model": {
                "name": "tiny",
                "type": "ddit",
                "hidden_size": HIDDEN,
                "cond_dim": 16,
                "length": 64,
                "n_blocks": 2,
                "n_heads": 2,
                "scale_by_sigma": True,
                "dropout": 0.1,
            },
        }
    dit = {"model_length": 64, "hidden_dim": HIDDEN, "cond_dim": 16, "n_blocks": 2, "n_heads": 2}
    encoder = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    own: dict[str, dict[str, Any]] = {
        "bert": {"model_type": "bert", **encoder, "cls_token_id": start, "sep_token_id": end, "pad_token_id": 0},
        "llada": {
            "model_type": "llada",
            "d_model": HIDDEN,
            "n_layers": 2,
            "n_heads": 2,
            "max_sequence_length": 64,
            "mlp_hidden_size": 48,
            "embedding_size": vocabulary,
            "rope_theta": 500000.0,
        },
        "llada2": {
            "model_type": "llada2_moe",
            **encoder,
            "num_key_value_heads": 1,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "rope_theta": 600000,
            "block_size": 4,
        },
        "lladamoe": {
            "model_type": "llada",
            **encoder,
            "expert_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_layer_freq": [1, 1],
            "rope_theta": 1e6,
        },
        "dream": {
            "model_type": "Dream",
            **encoder,
            "num_key_value_heads": 1,
            "rope_theta": 1e6,
            "pad_token_id": end,
        },
        "mdlm": {"model_type": "mdlm", **dit, "time_conditioning": False},
        "mdlm-timed": {"model_type": "mdlm", **dit, "time_conditioning": True},
    }
    return {
        **own[name],
        "vocab_size": vocabulary,
        "max_position_embeddings": 64,
        "mask_token_id": mask,
        "eos_token_id": end,
    }


def family(name: str, **ids: int) -> DiffusionLM:
    """A tiny model of random weights; `ids` as in `family_config`."""
    if name in tiny.HUGGING_FACE:
        return tiny.huggingface(name, **family_config(name, **ids))
    model: DiffusionLM = _CLASSES[name].from_config(family_config(name, **ids))
    tiny.randomise(model, 0)
    return model


def make_family(folder: Path, name: str, tokenizer: Path) -> Path:
    """A model folder as its authors write it, with a copy of the tokenizer of the folder given."""
    folder.mkdir(parents=True)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    (folder / "config.json").write_text(json.dumps(family_config(name, vocabulary)))
    # Published DiT files hold the layers that give the modulations, also where sigma is constant.
    whole = family({"mdlm": "mdlm-timed"}.get(name, name), vocabulary=vocabulary)
    save_file({key: tensor.contiguous() for key, tensor in whole.state_dict().items()}, folder / "model.safetensors")
    return folder


def make_data(folder: Path) -> Path:
    """SENTENCES with who did what as labels, twice in other words, so that every split has some of every label."""
    folder.mkdir(parents=True)
    rows = []
    for sentence in SENTENCES:
        words = sentence.split()
        for text in (sentence, f"then {sentence}", f"{sentence} nobody saw it"):
            rows.append({"text": text, "who": words[1], "deed": next(w for w in words[2:] if w != "man")})
    (folder / "who.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def make_saes(folder: Path, model: Path) -> Path:
    """SAEs of random weights in SAELens' layout: two for masked positions and one for visible ones."""
    for layer, policy in ((0, "mask"), (1, "mask"), (1, "visible")):
        generator = torch.Generator().manual_seed(layer)
        made = folder / f"layer-{layer}-{policy}"
        made.mkdir(parents=True)
        rows = torch.randn(FEATURES, HIDDEN, generator=generator)
        rows = rows / rows.norm(dim=1, keepdim=True)
        tensors = {
            "W_enc": rows.T.contiguous(),
            "W_dec": rows,
            "b_enc": torch.zeros(FEATURES),
            "b_dec": torch.zeros(HIDDEN),
        }
        save_file(tensors, made / "sae_weights.safetensors")
        metadata = {
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "policy": policy,
            "model_sha256": weights_sha256(model),
        }
        config = {"architecture": "topk", "k": 8, "d_in": HIDDEN, "d_sae": FEATURES, "metadata": metadata}
        (made / "cfg.json").write_text(json.dumps(config))
    return folder


def make_recipe(folder: Path, **changes: Any) -> CalibrationRecipe:
    """The smallest recipe that goes through every step."""
    path = folder / "tasks.json"
    path.write_text(json.dumps(TASKS))
    return CalibrationRecipe(**({"tasks": path} | SMALL | changes))
