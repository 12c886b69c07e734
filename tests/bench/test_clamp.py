"""The bench of clamped latents: its rules, and its results as the repository has them."""

import json
from pathlib import Path

import pytest
import torch

import bench
from bench import clamp
from steerserve.saes.activation import Relu
from tests import tiny
from tests.steering.test_latent import sae_of

RESULTS = Path(bench.__path__[0]) / "results" / "clamp.json"


@pytest.fixture(scope="module")
def records() -> list[clamp.Record]:
    return [clamp.Record(**one) for one in json.loads(RESULTS.read_text(encoding="utf-8"))["records"]]


def test_every_rule_and_value_is_measured_and_the_served_one_reads_back() -> None:
    states = torch.randn(24, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    found = clamp.measure(sae_of(Relu()), "relu", [1, 2], states)
    assert [(one.asked, one.rule) for one in found] == [(s, rule) for s in clamp.SHARES for rule in clamp.RULES]
    for one in found:
        if one.rule == "served":
            assert (one.exact, one.unread) == (1.0, 0.0)


def test_the_table_is_what_the_records_say(records: list[clamp.Record]) -> None:
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == clamp.table(records)


def test_no_rule_reads_back_closer_than_the_one_that_is_served(records: list[clamp.Record]) -> None:
    cells = {(one.sae, one.activation, one.asked) for one in records}
    assert len({sae for sae, activation, _ in cells if activation == "topk"} - {"layer-3-mask:93"}) == 3
    for cell in cells:
        errors = {one.rule: one.error for one in records if (one.sae, one.activation, one.asked) == cell}
        # Where rules do the same, they round differently.
        assert errors["served"] <= min(errors.values()) + 1e-5
