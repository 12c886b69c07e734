"""Sampler defaults: the family's, changed by the folder's own file, and nothing that no request could ask for."""

import json
import re
from pathlib import Path

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
