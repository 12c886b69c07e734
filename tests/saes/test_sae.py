"""The SAE against its definition, written out token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steerserve.errors import ArtifactError, NotFoundError
from steerserve.saes.activation import Activation, Relu, TopK
from steerserve.saes.sae import SaeFacts, SparseAutoencoder

HIDDEN, FEATURES = 6, 15


def make(activation: Activation, seed: int = 0) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (HIDDEN, FEATURES), "b_enc": (FEATURES,), "W_dec": (FEATURES, HIDDEN), "b_dec": (HIDDEN,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    metadata = {"model_sha256": "aa"}
    facts = SaeFacts("s", 2, HIDDEN, FEATURES, "topk", sha256="ff", policy="mask", k=4, metadata=metadata)
    return SparseAutoencoder(facts, tensors, activation)


def reference(sae: SparseAutoencoder, token: Tensor, k: int | None) -> tuple[list[float], list[float]]:
    """Activations and reconstruction of one token, in plain Python."""
    pre = []
    for f in range(FEATURES):
        total = float(sae.b_enc[f])
        for i in range(HIDDEN):
            total += float(sae.W_enc[i, f]) * (float(token[i]) - float(sae.b_dec[i]))
        pre.append(total)
    kept = range(FEATURES) if k is None else sorted(range(FEATURES), key=lambda f: -pre[f])[:k]
    activations = [max(0.0, pre[f]) if f in kept else 0.0 for f in range(FEATURES)]
    rebuilt = [
        float(sae.b_dec[i]) + sum(activations[f] * float(sae.W_dec[f, i]) for f in range(FEATURES))
        for i in range(HIDDEN)
    ]
    return activations, rebuilt


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), k=st.none() | st.integers(1, FEATURES))
def test_encode_and_decode_follow_the_definition(seed: int, k: int | None) -> None:
    sae = make(Relu() if k is None else TopK(k), seed)
    hidden = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(seed))
    activations, rebuilt = sae.encode(hidden), sae(hidden)
    for row in range(2):
        for position in range(3):
            want, want_rebuilt = reference(sae, hidden[row, position], k)
            torch.testing.assert_close(activations[row, position], torch.tensor(want), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(rebuilt[row, position], torch.tensor(want_rebuilt), rtol=1e-4, atol=1e-4)


def test_relu_encoding_ignores_the_activation() -> None:
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert torch.equal(make(TopK(2)).relu(hidden), make(Relu()).encode(hidden))


def test_top_ids_are_the_active_features_by_size() -> None:
    sae = make(TopK(4))
    hidden = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
    activations = sae.encode(hidden)
    for ids, row in zip(sae.top_ids(hidden, 4), activations, strict=True):
        values = row[ids]
        assert torch.equal(values, values.sort(descending=True).values)
        assert set(row.nonzero()[:, 0].tolist()) <= set(ids.tolist())
    with pytest.raises(ValueError, match="1 to 15, got 16"):
        sae.top_ids(hidden, 16)


def test_direction_is_the_unit_decoder_row() -> None:
    sae = make(Relu())
    direction = sae.direction(3)
    torch.testing.assert_close(direction.norm(), torch.tensor(1.0))
    torch.testing.assert_close(direction * sae.W_dec[3].norm(), sae.W_dec[3])


@pytest.mark.parametrize("feature", [-1, FEATURES])
def test_a_feature_out_of_range_is_not_found(feature: int) -> None:
    with pytest.raises(NotFoundError, match=f"0 to 14, got {feature}"):
        make(Relu()).direction(feature)


def test_a_feature_without_a_decoder_row_has_no_direction() -> None:
    sae = make(Relu())
    sae.W_dec[1] = 0.0
    sae.decoder_norm[1] = 0.0
    with pytest.raises(NotFoundError, match="feature 1 has a decoder row of zeros"):
        sae.direction(1)


def test_half_precision_states_are_computed_in_the_weights_type() -> None:
    sae = make(TopK(4))
    hidden = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert sae.encode(hidden).dtype == torch.float32
    assert torch.equal(sae.encode(hidden), sae.encode(hidden.float()))


def test_an_sae_is_checked_against_the_model() -> None:
    facts = make(Relu()).facts
    facts.check_model(HIDDEN, 3, "aa")
    facts.check_model(HIDDEN, 3)
    with pytest.raises(ArtifactError, match="hidden size 6, but the model's is 7"):
        facts.check_model(7, 3)
    with pytest.raises(ArtifactError, match="layer 2, but the model has layers 0 to 1"):
        facts.check_model(HIDDEN, 2)
    with pytest.raises(ArtifactError, match="trained on the model aa, but the model loaded is bb"):
        facts.check_model(HIDDEN, 3, "bb")
