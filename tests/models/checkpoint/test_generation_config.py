"""Sampler defaults: the family's, changed by the folder's own file, and nothing that no request could ask for."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from steerserve.errors import ArtifactError, RequestError
from steerserve.models import SamplerDefaults, read_sampler_defaults
from steerserve.models.checkpoint.generation_config import unused_settings
from tests import tiny


def say(folder: Path, said: object) -> Path:
    (folder / "generation_config.json").write_text(said if isinstance(said, str) else json.dumps(said))
    return folder


def test_without_a_file_they_are_the_familys(tmp_path: Path) -> None:
    base = SamplerDefaults(temperature=0.0, order="entropy")
    assert read_sampler_defaults(tmp_path, base) == base
    assert read_sampler_defaults(tmp_path) == SamplerDefaults()


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    # eos_token_id and the like are other libraries' keys; null leaves a value as it is.
    said = {"temperature": 1, "top_p": 0.9, "ignore_eos": True, "eos_token_id": 3, "transfer": None}
    base = SamplerDefaults(temperature=0.0, order="entropy", transfer="cosine")
    assert read_sampler_defaults(say(tmp_path, said), base) == SamplerDefaults(1, 0.9, "entropy", "cosine", True)


def test_an_order_may_carry_options(tmp_path: Path) -> None:
    transfer = {"type": "threshold", "value": 0.8}
    found = read_sampler_defaults(say(tmp_path, {"order": {"type": "margin"}, "transfer": transfer}))
    assert (found.order, found.transfer) == ({"type": "margin"}, transfer)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        '{"temperature": "hot"}',
        '{"temperature": -1}',
        '{"temperature": NaN}',
        '{"top_p": 0}',
        '{"top_p": 1.5}',
        '{"ignore_eos": 1}',
        '{"order": 3}',
        '{"order": {"value": 3}}',
        '{"transfer": ["linear"]}',
        '{"transfer": {"type": 1}}',
    ],
)
def test_defaults_that_no_request_could_ask_for_are_refused(tmp_path: Path, said: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(str(tmp_path))):
        read_sampler_defaults(say(tmp_path, said))


def test_what_transformers_wrote_out_by_itself_is_nobodys_choice(tmp_path: Path) -> None:
    base = SamplerDefaults(temperature=0.2, order="entropy")
    said = {"_from_model_config": True, "temperature": 0.0, "alg": "origin", "top_p": None, "eos_token_id": 4}
    assert read_sampler_defaults(say(tmp_path, said), base) == base


def test_no_sampling_is_temperature_zero(tmp_path: Path) -> None:
    assert read_sampler_defaults(say(tmp_path, {"do_sample": False, "temperature": 0.7})).temperature == 0.0
    assert read_sampler_defaults(say(tmp_path, {"do_sample": True, "temperature": 0.7})).temperature == 0.7


@pytest.mark.parametrize(
    ("said", "order", "transfer"),
    [
        ({"alg": "origin"}, "random", {"type": "origin"}),
        ({"alg": "origin", "eps": 0.01}, "random", {"type": "origin", "eps": 0.01}),
        (
            {"alg": "topk_margin", "alg_temp": 0.5},
            {"type": "margin", "filtered": True, "alg_temp": 0.5},
            {"type": "timesteps"},
        ),
        (
            {"alg": "maskgit_plus", "alg_temp": None},
            {"type": "confidence", "filtered": True, "alg_temp": 0.0},
            {"type": "timesteps"},
        ),
        ({"alg": "entropy", "order": "random"}, "random", {"type": "timesteps"}),
    ],
)
def test_dreams_own_names_are_understood(tmp_path: Path, said: dict[str, Any], order: Any, transfer: Any) -> None:
    found = read_sampler_defaults(say(tmp_path, said | {"top_k": 7}))
    assert (found.order, found.transfer, found.top_k) == (order, transfer, 7)


@pytest.mark.parametrize("said", [{"alg": "best"}, {"alg": 3}, {"top_k": -2}, {"top_k": 1.5}, {"max_new_tokens": 0}])
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=next(iter(said))):
        read_sampler_defaults(say(tmp_path, said))


SAMPLING: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 0.5, 1, 2, 2.0, 2.1, 10, -0.1, True, "1"],
    "top_p": [0, 0.0, 1e-9, 0.5, 1, 1.0, 1.5, -1, False, "1"],
    "top_k": [-2, -1, 0, 1, 5, tiny.VOCAB, 10**6, 2**31, 1.0, 0.5, True, "1"],
}


def admitted(served: DiffusionEngine, **settings: Any) -> Request | None:
    try:
        return served.admit(GenerationParams(prompt="the", max_tokens=4, **settings))
    except RequestError as error:
        assert error.param in settings
        return None


@pytest.mark.parametrize("name", SAMPLING)
def test_a_file_may_say_what_a_request_may_say_and_means_the_same(tmp_path: Path, name: str) -> None:
    served = tiny.engine(tiny.bert(), tmp_path / "catalogue")
    for value in SAMPLING[name]:
        asked = admitted(served, **{name: value})
        try:
            defaults = read_sampler_defaults(say(tmp_path, {name: value, "do_sample": True}))
        except ArtifactError as error:
            assert asked is None, value
            assert name in str(error)
            continue
        assert asked is not None, value
        catalogue = replace(served.catalogue, defaults=defaults)
        by_default = admitted(DiffusionEngine(served.model, served.tokenizer, catalogue, served.config))
        assert by_default is not None, value
        assert getattr(by_default.params, name) == getattr(asked.params, name)


@pytest.mark.parametrize("all_of_them", [0, -1])
def test_a_request_may_have_all_tokens_of_a_model_that_draws_from_few(tmp_path: Path, all_of_them: int) -> None:
    served = tiny.engine(tiny.bert(), tmp_path / "catalogue")
    catalogue = replace(served.catalogue, defaults=read_sampler_defaults(say(tmp_path, {"top_k": 5})))
    few = DiffusionEngine(served.model, served.tokenizer, catalogue, served.config)
    for asked, drawn in ((None, 5), (all_of_them, None), (3, 3)):
        request = admitted(few, top_k=asked)
        assert request is not None
        assert request.params.top_k == drawn


def test_what_no_sampler_follows_is_told(tmp_path: Path) -> None:
    say(tmp_path, {"repetition_penalty": 1.05, "min_p": 0, "typical_p": 1, "num_beams": 1, "bad_words_ids": [[3]]})
    assert unused_settings(tmp_path) == {"repetition_penalty": 1.05, "bad_words_ids": [[3]]}
    assert read_sampler_defaults(tmp_path) == SamplerDefaults()
    assert unused_settings(say(tmp_path, {"repetition_penalty": 1.05, "_from_model_config": True})) == {}
    assert unused_settings(tmp_path / "elsewhere") == {}


def test_nothing_is_printed_of_settings_that_transformers_would_doubt(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    read_sampler_defaults(say(tmp_path, {"do_sample": False, "temperature": 0.7, "top_k": 3}))
    assert capfd.readouterr() == ("", "")
