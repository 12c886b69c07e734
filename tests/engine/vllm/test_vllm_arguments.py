"""What vLLM is started with: its own options by name, and none that a denoising step fixes."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.config import BackendConfig, SaeConfig
from steerserve.engine.vllm.arguments import FIXED, OURS, Sources, core_shares, engine_arguments, parse_extra
from steerserve.engine.vllm.checkpoint import facts_from_json, facts_to_json, llama_config, llama_name
from steerserve.errors import ArtifactError
from tests import tiny

KNOWN = ("max_num_batched_tokens", "quantization", "compilation_config", *OURS, *FIXED)


def test_options_are_json_or_text() -> None:
    pairs = ["max_num_batched_tokens=512", "--quantization=fp8", 'compilation-config={"mode": 0}']
    assert parse_extra(pairs, KNOWN) == {
        "max_num_batched_tokens": 512,
        "quantization": "fp8",
        "compilation_config": {"mode": 0},
    }


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["quantization"], "takes key=value, got 'quantization'"),
        (["=3"], "takes key=value"),
        (["frobnicate=1"], "no such option; it has .*quantization"),
        (["quantization=a", "quantization=b"], "given twice"),
        (["dtype=half"], "use --dtype instead"),
        (["enforce_eager=false"], "a replayed graph would leave the steering out"),
        (["pipeline_parallel_size=2"], "one stage"),
    ],
)
def test_options_that_cannot_be_taken_are_refused_by_name(pairs: list[str], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        parse_extra(pairs, KNOWN)


def test_an_option_given_cannot_change_what_a_step_needs() -> None:
    sources = Sources(Path("m"), Path("s"), SaeConfig(sae_layers=(1, 2), sae_k=8))
    found = engine_arguments(sources, tiny.llada().facts, "float32", 4, 4096, 2, {"max_num_batched_tokens": 100})
    assert found["max_num_batched_tokens"] == 100
    assert found["max_model_len"] == tiny.CONTEXT
    assert found["enforce_eager"] is True
    saes = found["additional_config"]["steerserve"]["saes"]
    assert saes == {"folder": str(Path("s").resolve()), "layers": [1, 2], "k": 8}


@given(st.integers(1, 8), st.lists(st.integers(0, 99), min_size=1, max_size=16, unique=True))
def test_every_rank_has_cores_and_shares_none_while_there_are_enough(ranks: int, cores: list[int]) -> None:
    shares = [[int(core) for core in share.split(",")] for share in core_shares(ranks, cores).split("|")]
    assert len(shares) == ranks
    assert all(share and set(share) <= set(cores) for share in shares)
    if len(cores) >= ranks:
        flat = [core for share in shares for core in share]
        assert len(flat) == len(set(flat))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_every_tensor_of_a_checkpoint_has_one_place_in_a_llama(family: str) -> None:
    model = tiny.llada() if family == "llada" else tiny.dream()
    names = [llama_name(family, name) for name in model.state_dict()]
    layer = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    layer += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    layer += [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    layer += [f"self_attn.{part}_proj.bias" for part in "qkv"] if family == "dream" else []
    ends = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert sorted(names) == sorted([*ends, *(f"model.layers.{i}.{part}" for i in range(3) for part in layer)])


def test_a_tensor_of_another_layout_is_refused() -> None:
    with pytest.raises(ArtifactError, match="'model.transformer.blocks.0.att_proj.weight' is not one of the llada"):
        llama_name("llada", "model.transformer.blocks.0.att_proj.weight")


def test_a_config_is_that_of_the_same_network() -> None:
    made = llama_config(tiny.llada(n_kv_heads=2, scale_logits=True, weight_tying=True), {})
    assert made["vocab_size"] == tiny.VOCAB + 3
    assert (made["num_attention_heads"], made["num_key_value_heads"], made["head_dim"]) == (4, 2, 8)
    assert made["logit_scale"] == pytest.approx(tiny.HIDDEN**-0.5)
    assert made["tie_word_embeddings"] and not made["qkv_bias"] and not made["is_causal"]
    assert llama_config(tiny.dream(), {"quantization_config": {"quant_method": "fp8"}})["qkv_bias"]


@pytest.mark.parametrize("make", [tiny.bert, tiny.mdlm])
def test_families_that_are_no_llamas_are_refused(make: Any) -> None:
    with pytest.raises(ArtifactError, match="runs the families llada and dream, not (bert|mdlm)"):
        llama_config(make(), {})
    with pytest.raises(ArtifactError, match="predict tokens, not sedd"):
        facts_to_json(tiny.sedd().facts)


def test_facts_arrive_as_they_were() -> None:
    for model in (tiny.llada(), tiny.dream()):
        assert facts_from_json(facts_to_json(model.facts)) == model.facts


def test_options_of_vllm_need_its_engine() -> None:
    assert BackendConfig("vllm", 2, ("a=1",)).vllm_arg == ("a=1",)
    for wrong in ({"tensor_parallel_size": 2}, {"vllm_arg": ("a=1",)}):
        with pytest.raises(ValueError, match="is for engine 'vllm', the engine is 'torch'"):
            BackendConfig(**wrong)
    with pytest.raises(ValueError, match="at least 1"):
        BackendConfig("vllm", 0)
