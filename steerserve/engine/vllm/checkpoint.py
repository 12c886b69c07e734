"""A checkpoint of ours in vLLM's terms: its config as a bidirectional Llama, its tensors by Llama's names.

LLaDA is a Llama under OLMo's names, Dream a Llama with biases on q, k and v (Qwen2), so both run through one model of
vLLM's own layers.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Final

from steerserve.errors import ArtifactError
from steerserve.models import DiffusionLM, ModelFacts
from steerserve.models.families.dream import DreamConfig, DreamDiffusionLM
from steerserve.models.families.llada import LladaConfig, LladaDiffusionLM

ARCHITECTURE: Final = "SteerserveDiffusionLM"
"""Name under which vLLM knows the model."""

_LLADA_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_LLADA_ENDS: Final = {"wte": "embed_tokens", "ln_f": "norm", "ff_out": "lm_head"}


def llama_config(shell: DiffusionLM, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of the same network as a Llama that attends both ways.

    shell is the model as the checkpoint's own config has it, raw that config; raises ArtifactError for a family that
    is no Llama.
    """
    facts = shell.facts
    if isinstance(shell, LladaDiffusionLM):
        own = _of_llada(shell.config)
    elif isinstance(shell, DreamDiffusionLM):
        own = _of_dream(shell.config)
    else:
        raise ArtifactError(f"the vLLM engine runs the families llada and dream, not {facts.family}")
    kept = {name: raw[name] for name in ("quantization_config", "torch_dtype", "dtype") if raw.get(name) is not None}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "is_causal": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": facts.bos_id,
        "eos_token_id": facts.eos_id,
        "max_position_embeddings": facts.max_length,
        **kept,
        **own,
    }


def llama_name(family: str, name: str) -> str:
    """The name of a tensor of the checkpoint in a Llama's `state_dict`; raises ArtifactError for an unknown one."""
    if family == "dream":
        return name
    parts = name.split(".")
    match parts:
        case ["model", "transformer", "blocks", layer, part, kind] if part in _LLADA_PARTS:
            return f"model.layers.{layer}.{_LLADA_PARTS[part]}.{kind}"
        case ["model", "transformer", part, kind] if part in _LLADA_ENDS:
            start = "" if part == "ff_out" else "model."
            return f"{start}{_LLADA_ENDS[part]}.{kind}"
    raise ArtifactError(f"tensor {name!r} is not one of the {family} family")


def facts_to_json(facts: ModelFacts) -> dict[str, Any]:
    """Facts as a worker is told them; raises ArtifactError for a model that needs a noise level."""
    if facts.sigma is not None or facts.parameterisation != "logits":
        raise ArtifactError(f"the vLLM engine runs models that predict tokens, not {facts.family}")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(facts).items()}


def facts_from_json(raw: Mapping[str, Any]) -> ModelFacts:
    """The facts that `facts_to_json` wrote."""
    given: dict[str, Any] = {field.name: raw[field.name] for field in fields(ModelFacts)}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return ModelFacts(**given)


def _of_llada(config: LladaConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.rows,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.d_model // config.n_heads,
        "intermediate_size": config.inner,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.weight_tying,
        "qkv_bias": False,
        "logit_scale": 1 / math.sqrt(config.d_model) if config.scale_logits else 1.0,
    }


def _of_dream(config: DreamConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "qkv_bias": True,
        "logit_scale": 1.0,
    }
