"""Streaming moments against the two-pass definition."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from steerserve.calibrate.features.statistics import Moments, cohens_d, pooled


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 10_000), st.floats(-1e4, 1e4))
def test_batches_give_the_moments_of_all_values_together(sizes: list[int], seed: int, offset: float) -> None:
    values = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    stream = Moments(3)
    for part in torch.split(values, sizes):
        stream.update(part)
    assert stream.count == len(values)
    if len(values) > 1:
        mean = values.sum(0) / len(values)
        torch.testing.assert_close(stream.mean, mean)
        torch.testing.assert_close(stream.variance, (values - mean).square().sum(0) / (len(values) - 1))


def test_a_large_mean_does_not_swallow_a_small_variance() -> None:
    stream = Moments(1)
    for value in (1e8 + 1, 1e8 + 2, 1e8 + 3):
        stream.update(torch.tensor([[value]], dtype=torch.float64))
    assert abs(float(stream.variance) - 1.0) < 1e-6


def test_pooled_streams_are_one_stream() -> None:
    values = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    parts, whole = [Moments(4) for _ in range(3)], Moments(4)
    for stream, part in zip(parts, torch.split(values, [5, 20, 5]), strict=True):
        stream.update(part)
    whole.update(values)
    together = pooled(parts)
    torch.testing.assert_close(together.mean, whole.mean)
    torch.testing.assert_close(together.variance, whole.variance)
    assert together.count == 30 and parts[0].count == 5


def test_cohens_d_is_the_gap_in_pooled_deviations() -> None:
    target, contrast = Moments(3), Moments(3)
    target.update(torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 2.0]]))
    contrast.update(torch.tensor([[0.0, 5.0, 2.0], [4.0, 7.0, 2.0], [2.0, 9.0, 2.0]]))
    # Variances 2 and 4 about means 2 and 2; 0 and 4 about 5 and 7; nothing varies in the last.
    torch.testing.assert_close(cohens_d(target, contrast), torch.tensor([0.0, -(2**0.5), 0.0], dtype=torch.float64))
