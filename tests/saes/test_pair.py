"""Two SAEs of one layer, chosen per token."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from steerserve.errors import ArtifactError
from steerserve.saes import SaePair, SparseAutoencoder, pairs
from tests import tiny


def changed(sae: SparseAutoencoder, **facts: Any) -> SparseAutoencoder:
    sae.facts = replace(sae.facts, **facts)
    return sae


def test_every_token_is_encoded_by_the_sae_of_its_state() -> None:
    pair = SaePair(tiny.sae(1, seed=1), tiny.sae(1, seed=2, policy="visible"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, tiny.HIDDEN, generator=generator)
    masked = torch.rand(2, 7, generator=generator) < 0.5
    activations = pair.encode(hidden, masked)
    rebuilt = pair.decode(activations, masked)
    for row in range(2):
        for position in range(7):
            sae = pair.mask if masked[row, position] else pair.visible
            token = hidden[row, position]
            torch.testing.assert_close(activations[row, position], sae.encode(token))
            torch.testing.assert_close(rebuilt[row, position], sae(token))
    assert pair.layer == 1


@pytest.mark.parametrize("state", [True, False])
def test_a_canvas_of_one_state_needs_one_sae(state: bool) -> None:
    pair = SaePair(tiny.sae(1, seed=1), tiny.sae(1, seed=2, policy="visible"))
    hidden = torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    wanted = (pair.mask if state else pair.visible).encode(hidden)
    assert torch.equal(pair.encode(hidden, torch.full((5,), state)), wanted)


def test_pairs_are_found_where_a_layer_has_one_of_each() -> None:
    saes = [tiny.sae(2), tiny.sae(2, policy="visible"), tiny.sae(1), tiny.sae(0, policy=None)]
    saes += [tiny.sae(3), tiny.sae(3, seed=1, name="other"), tiny.sae(3, policy="visible")]
    found = pairs(saes)
    assert list(found) == [2]
    assert (found[2].mask, found[2].visible) == (saes[0], saes[1])


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"layer": 2}, "layer 1 and 2"),
        ({"features": 7}, "features 48 and 7"),
        ({"policy": "mask"}, "policy 'mask', but 'visible' is needed here"),
    ],
)
def test_saes_that_do_not_belong_together_are_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        SaePair(tiny.sae(1), changed(tiny.sae(1, policy="visible"), **facts))
