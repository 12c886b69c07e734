"""Sampler defaults: the family's, changed by the folder's own file, and nothing that no request could ask for."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from steerserve.errors import ArtifactError
from steerserve.models import SamplerDefaults, read_sampler_defaults


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


@pytest.mark.parametrize("said", [{"alg": "best"}, {"alg": 3}, {"top_k": 0}, {"top_k": 1.5}])
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=next(iter(said))):
        read_sampler_defaults(say(tmp_path, said))
