"""Matching pursuit against the algorithm, one token and one feature at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steerserve.saes.matching_pursuit import MatchingPursuitAutoencoder, Pursuit
from steerserve.saes.sae import SaeFacts

HIDDEN, FEATURES = 6, 15


def make(pursuit: Pursuit, seed: int = 0) -> MatchingPursuitAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(FEATURES, HIDDEN, generator=generator)
    tensors = {"W_dec": rows / rows.norm(dim=1, keepdim=True), "b_dec": torch.randn(HIDDEN, generator=generator)}
    return MatchingPursuitAutoencoder(SaeFacts("s", 2, HIDDEN, FEATURES, "matching_pursuit", "ff"), tensors, pursuit)


def reference(sae: MatchingPursuitAutoencoder, token: Tensor) -> list[float]:
    """Greedy: take the feature that explains most of what is left, until one of the three reasons to end."""
    rest, out = token - sae.b_dec, [0.0] * FEATURES
    for _ in range(sae.pursuit.max_iterations or HIDDEN):
        before = {f for f in range(FEATURES) if out[f] != 0}
        best = max(range(FEATURES), key=lambda f: float(rest @ sae.W_dec[f]))
        gain = max(0.0, float(rest @ sae.W_dec[best]))
        out[best] += gain
        rest = rest - gain * sae.W_dec[best]
        if sae.pursuit.stop_on_duplicate_support and {f for f in range(FEATURES) if out[f] != 0} == before:
            break
        if sae.pursuit.residual_threshold > 0 and float(rest.norm()) < sae.pursuit.residual_threshold:
            break
    return out


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    threshold=st.sampled_from([0.0, 0.01, 0.5, 1.5]),
    iterations=st.none() | st.integers(1, 9),
    duplicates=st.booleans(),
)
def test_encode_takes_the_features_the_greedy_loop_takes(
    seed: int, threshold: float, iterations: int | None, duplicates: bool
) -> None:
    sae = make(Pursuit(threshold, iterations, duplicates), seed)
    hidden = torch.randn(3, 2, HIDDEN, generator=torch.Generator().manual_seed(seed + 1))
    wanted = torch.tensor([[reference(sae, token) for token in row] for row in hidden])
    torch.testing.assert_close(sae.encode(hidden), wanted, rtol=1e-4, atol=1e-5)


def test_a_token_is_encoded_alike_alone_and_among_others() -> None:
    sae = make(Pursuit())
    hidden = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([sae.encode(token[None]) for token in hidden])
    torch.testing.assert_close(sae.encode(hidden), alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae.encode(hidden[0]), alone[0], rtol=1e-5, atol=1e-6)


def test_top_ids_are_the_features_taken_then_the_nearest() -> None:
    sae = make(Pursuit(max_iterations=4))
    hidden = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
    activations, pre = sae.encode(hidden), sae.pre(hidden)
    for ids, row, first in zip(sae.top_ids(hidden, 8), activations, pre, strict=True):
        count = int((row > 0).sum())
        assert torch.equal(row[ids], row.sort(descending=True).values[:8])
        rest = first.masked_fill(row > 0, -torch.inf)
        assert torch.equal(rest[ids[count:]], rest.sort(descending=True).values[: 8 - count])


@pytest.mark.parametrize("iterations", [1, 3])
def test_more_iterations_leave_less(iterations: int) -> None:
    hidden = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
    left = [(hidden - make(Pursuit(max_iterations=n))(hidden)).norm() for n in (iterations, iterations + 1)]
    assert left[1] < left[0]
