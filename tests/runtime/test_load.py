"""Putting the parts together: what does not belong together is refused before anything is served."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.config import BackendConfig, EngineConfig, ModelConfig, SaeConfig
from steerserve.digests import cache_path
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention
from steerserve.errors import ArtifactError
from steerserve.models import load_model, load_tokenizer, weights_sha256
from steerserve.pickles import convert
from steerserve.runtime.backends import check_graphs
from steerserve.runtime.load import BUNDLED, load_runtime, served_name
from steerserve.steering.attribute import load_attribute
from tests import tiny
from tests.calibrate.made import make_family, make_saes
from tests.models.text.test_tokenizer import learn


def attributes(tiny_model: Path, folder: Path, **changes: object) -> Path:
    """One attribute of the tests' own shape, said to be of `tiny_model`."""
    facts = load_model(tiny_model).facts
    assert facts.hidden_size == tiny.HIDDEN
    made = tiny.attribute(folder / "made", "topic/sports", (1,))
    path = folder / "made" / "attribute.json"
    raw = json.loads(path.read_text()) | {"model_sha256": weights_sha256(tiny_model)} | changes
    path.write_text(json.dumps(raw))
    assert made.name == "topic/sports"
    return folder


def test_a_model_folder_with_attributes_is_served(tiny_model: Path, tmp_path: Path) -> None:
    runtime = load_runtime(tiny_model, None, [attributes(tiny_model, tmp_path)], EngineConfig())
    assert runtime.service.model_id == tiny_model.name
    assert list(runtime.service.attributes) == ["topic/sports"]
    assert runtime.service.capabilities["device"] == "cpu"
    assert runtime.service.model_card["sampler_defaults"]["order"] == "confidence"


def test_folders_of_attributes_add_up(tiny_model: Path, tmp_path: Path) -> None:
    first = attributes(tiny_model, tmp_path / "one")
    second = attributes(tiny_model, tmp_path / "two", name="topic/ships")
    runtime = load_runtime(tiny_model, None, [first, second], EngineConfig())
    assert sorted(runtime.service.attributes) == ["topic/ships", "topic/sports"]
    with pytest.raises(
        ArtifactError, match=r"attributes named \['topic/sports'\] have been loaded from another folder"
    ):
        load_runtime(tiny_model, None, [first, second, first], EngineConfig())


def test_the_folder_one_stands_in_gives_the_model_its_name(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model)
    assert load_runtime(Path(), None, None, EngineConfig()).service.model_id == tiny_model.name


def test_the_models_own_sampler_defaults_are_read(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "order": "random", "bos_token_id": 2}')
    runtime = load_runtime(folder, None, None, EngineConfig())
    assert runtime.engine.catalogue.defaults.temperature == 0.5
    assert runtime.engine.catalogue.defaults.order == "random"
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(ArtifactError, match="temperature must be 0 to 2, got 'hot'"):
        load_runtime(folder, None, None, EngineConfig())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unit": "bogus"}, "unit 'bogus'"),
        ({"scope": "nowhere"}, "scope 'nowhere'"),
        ({"schedule": {"type": "zz"}}, "unknown"),
        ({"profile": {"curve": [1.0]}}, "topic/sports"),
        ({"model_sha256": "00" * 32}, "another|calibrated for the model"),
    ],
)
def test_an_attribute_that_cannot_be_honoured_is_refused_at_start(
    tiny_model: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ArtifactError, match=said):
        load_runtime(tiny_model, None, [attributes(tiny_model, tmp_path, **changes)], EngineConfig())


def test_cuda_graphs_are_refused_where_they_cannot_be(tiny_model: Path) -> None:
    wanted = EngineConfig(cuda_graphs=True)
    with pytest.raises(ArtifactError, match="--cuda-graphs: needs a CUDA device, the model is on cpu"):
        load_runtime(tiny_model, None, None, wanted, ModelConfig(device="cpu"))
    with pytest.raises(ArtifactError, match="--cuda-graphs: with --engine vllm CUDA graphs are vLLM's own"):
        check_graphs(wanted, BackendConfig(engine="vllm"), torch.device("cuda"))
    check_graphs(wanted, BackendConfig(), torch.device("cuda:1"))


def test_directions_without_a_site_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    root = attributes(tiny_model, tmp_path, sites={})
    with pytest.raises(ArtifactError, match="no site"):
        load_attribute(root / "made", weights_sha256(tiny_model), 2, tiny.HIDDEN)


def test_the_card_says_what_was_loaded_and_how(tiny_model: Path) -> None:
    said: list[str] = []
    plain = load_runtime(tiny_model, None, None, EngineConfig(), say=said.append).service.model_card
    assert (plain["dtype"], plain["device"]) == ("float32", "cpu")
    assert (plain["revision"], plain["sha256_pinned"]) == (None, False)
    assert plain["sha256"] == weights_sha256(tiny_model)
    [line] = said
    assert line.startswith(f"{tiny_model.name}: ") and " in float32; " in line and line.endswith(" available")
    pinned = ModelConfig(dtype="bfloat16", device="cpu", revision="v1", sha256=plain["sha256"].upper())
    card = load_runtime(tiny_model, None, None, EngineConfig(), pinned).service.model_card
    assert (card["dtype"], card["revision"], card["sha256_pinned"]) == ("bfloat16", "v1", True)
    assert (card["sha256"], card["parameters"]) == (plain["sha256"], plain["parameters"])


def test_a_pin_is_held_against_the_files_and_not_against_what_is_remembered(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = make_family(tmp_path / "model", "llada", tiny_model)
    os.utime(folder / "model.safetensors", (1_000_000_000, 1_000_000_000))
    true, wrong = weights_sha256(folder), "00" * 32
    cache_path().write_text(cache_path().read_text().replace(true, wrong))
    assert weights_sha256(folder) == wrong
    with pytest.raises(ArtifactError, match=f"the weights have the sha256 {true}, not {wrong} as pinned"):
        load_runtime(folder, None, None, EngineConfig(), ModelConfig(sha256=wrong))
    assert (
        load_runtime(folder, None, None, EngineConfig(), ModelConfig(sha256=true)).service.model_card["sha256"] == true
    )


def test_a_pinned_pickle_is_not_replaced_by_a_conversion(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", "llada", tiny_model)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    convert(folder / "pytorch_model.bin", {name: torch.ones_like(tensor) for name, tensor in state.items()})
    pinned = ModelConfig(sha256=weights_sha256(folder), device="cpu", dtype="float32")
    found = load_runtime(folder, None, None, EngineConfig(), pinned).engine.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_what_cannot_fit_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerserve.models.loader.available_bytes", lambda _: 1000)
    said: list[str] = []
    with pytest.raises(ArtifactError, match="do not fit: 1000 bytes available"):
        load_runtime(tiny_model, None, None, EngineConfig(), say=said.append)
    assert said == []


@pytest.mark.parametrize("family", ["llada", "dream", "mdlm", "mdlm-timed", "sedd"])
def test_a_model_in_bfloat16_is_steered_by_saes_in_float32(tiny_model: Path, tmp_path: Path, family: str) -> None:
    folder = make_family(tmp_path / "model", family, tiny_model)
    whole = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in whole.items()}, folder / "model.safetensors")
    saes = make_saes(tmp_path / "saes", folder)
    runtime = load_runtime(folder, saes, None, EngineConfig(), ModelConfig(dtype="bfloat16", device="cpu"))
    engine = runtime.engine
    assert {parameter.dtype for parameter in engine.model.parameters()} == {torch.bfloat16}
    assert {sae.W_enc.dtype for sae in engine.catalogue.saes.values()} == {torch.float32}
    push = Intervention(feature=FeatureRef("layer-1-mask", 3), strength=3000.0, unit="raw")
    plain = GenerationParams(prompt="the team", max_tokens=8, seed=1)
    steered = GenerationParams(prompt="the team", max_tokens=8, seed=1, interventions=(push,))
    (_, without), (_, with_push) = tiny.run(engine, plain, steered)
    assert without.tokens != with_push.tokens
    assert with_push.receipt is not None
    [site] = with_push.receipt["interventions"][0]["sites"]
    assert site["delta_ratio_max"] > 1


TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def test_a_chats_special_tokens_are_one_token_each(tmp_path: Path) -> None:
    size = learn(tmp_path / "bpe", 280)
    marks = ("<|im_start|>", "<|im_end|>", "<|bos|>")
    added = {str(size + i): {"content": mark, "special": True} for i, mark in enumerate(marks)}
    config = {"added_tokens_decoder": added, "chat_template": TEMPLATE, "bos_token": "<|bos|>"}
    (tmp_path / "bpe" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "whole").mkdir()
    load_tokenizer(tmp_path / "bpe").save(str(tmp_path / "whole" / "tokenizer.json"))
    folder = make_family(tmp_path / "model", "dream", tmp_path / "whole")
    runtime = load_runtime(folder, None, None, EngineConfig(), ModelConfig(tokenizer=tmp_path / "bpe"))
    assert runtime.service.chat is not None
    prompt = runtime.service.chat([{"role": "user", "content": "hi"}])
    ids = runtime.engine.admit(GenerationParams(prompt=prompt, max_tokens=2)).prompt_ids
    assert (ids[0], ids[1], ids[-1]) == (size + 2, size, size + 1)
    assert runtime.decode(ids) == "hi"


def test_the_beginning_of_a_chat_is_not_said_twice(tiny_model: Path, tmp_path: Path) -> None:
    assert load_runtime(tiny_model, None, None, EngineConfig()).service.chat is None
    config = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": "[CLS]"}
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    runtime = load_runtime(tmp_path, None, None, EngineConfig())
    assert runtime.service.chat is not None
    prompt = runtime.service.chat([{"role": "user", "content": "the team"}])
    ids = runtime.engine.admit(GenerationParams(prompt=prompt, max_tokens=2)).prompt_ids
    assert ids.count(runtime.engine.model.facts.bos_id or 0) == 1
    assert ids == runtime.engine.admit(GenerationParams(prompt="the team", max_tokens=2)).prompt_ids


def test_saes_may_be_chosen(tiny_model: Path, tmp_path: Path) -> None:
    saes = make_saes(tmp_path / "saes", tiny_model)
    chosen = load_runtime(tiny_model, saes, None, EngineConfig(), sae_config=SaeConfig(sae_layers=(1,), sae_k=8))
    assert list(chosen.service.saes) == ["layer-1-mask", "layer-1-visible"]
    with pytest.raises(ArtifactError, match="layers"):
        load_runtime(tiny_model, saes, None, EngineConfig(), sae_config=SaeConfig(sae_layers=(1, 5)))


@pytest.mark.parametrize("family", ["mdlm", "sedd"])
def test_a_model_without_a_tokenizer_takes_the_one_named(tiny_model: Path, tmp_path: Path, family: str) -> None:
    folder = make_family(tmp_path / "model", family, tiny_model)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="--tokenizer DIR names a folder"):
        load_runtime(folder, None, None, EngineConfig())
    runtime = load_runtime(folder, None, None, EngineConfig(), ModelConfig(tokenizer=tiny_model))
    [(_, result)] = tiny.run(runtime.engine, GenerationParams(prompt="the team", max_tokens=6, seed=1))
    assert len(result.tokens) == 6 and runtime.decode(result.tokens).strip() in result.text


@pytest.mark.parametrize("said", [{"order": "best"}, {"transfer": {"type": "threshold", "value": 3}}])
def test_a_default_that_no_row_could_follow_is_refused(tiny_model: Path, tmp_path: Path, said: object) -> None:
    folder = make_family(tmp_path / "model", "llada", tiny_model)
    (folder / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(ArtifactError, match=r"generation_config\.json: "):
        load_runtime(folder, None, None, EngineConfig())


def test_a_familys_defaults_hold_where_the_folder_says_nothing(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", "llada", tiny_model)
    assert load_runtime(folder, None, None, EngineConfig()).engine.catalogue.defaults.temperature == 0.0
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "transfer": {"type": "cosine"}}')
    defaults = load_runtime(folder, None, None, EngineConfig()).engine.catalogue.defaults
    assert (defaults.temperature, defaults.order, defaults.transfer) == (0.7, "confidence", {"type": "cosine"})


def test_a_setting_that_no_sampler_follows_is_told_at_start(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", "llada", tiny_model)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.05, "top_k": -1}')
    lines: list[str] = []
    load_runtime(folder, None, None, EngineConfig(), say=lines.append)
    assert "repetition_penalty 1.05 of generation_config.json is not followed" in lines


def test_whatever_leads_to_the_bundled_model_it_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = tmp_path / "linked"
    linked.symlink_to(BUNDLED / "model")
    monkeypatch.chdir(BUNDLED)
    for path in (BUNDLED / "model", Path("model"), Path("saes/../model"), linked):
        assert served_name(path, ModelConfig()) == "bundled"
    assert served_name(Path("model"), ModelConfig(served_name="mine")) == "mine"
    assert served_name(tmp_path, ModelConfig()) == tmp_path.name
