"""The counter-based noise: pure, uniform, exponential to far into the tail, and independent along every counter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steerserve.engine import noise

WHOLE = st.integers(-(2**63), 2**63 - 1)
COUNTERS = ("seed", "row", "step", "position", "stream")


def key(seed: int = 0, row: int = 0, step: int = 0, position: int = 0, stream: int = noise.TOKEN) -> Tensor:
    counters = torch.tensor([[seed], [row], [step], [position]])
    return noise.keys(counters[0], counters[1], counters[2], counters[3], stream)


def along(counter: str, count: int, **fixed: int) -> Tensor:
    """Keys [count] of one counter going up from 0, the others fixed."""
    values = {name: torch.full((count,), fixed.get(name, 3)) for name in COUNTERS[:4]}
    values[counter] = torch.arange(count)
    return noise.keys(values["seed"], values["row"], values["step"], values["position"], fixed.get("stream", 1))


@given(seeds=st.lists(WHOLE, min_size=1, max_size=6), counters=st.tuples(*[st.integers(0, 2**31)] * 3))
def test_a_draw_is_the_same_alone_and_in_a_batch(seeds: list[int], counters: tuple[int, int, int]) -> None:
    row, step, position = (torch.full((len(seeds),), value) for value in counters)
    batch = noise.keys(torch.tensor(seeds), row, step, position, noise.TOKEN)
    alone = [key(seed, *counters) for seed in seeds]
    assert batch.tolist() == [int(one) for one in alone]
    assert torch.equal(noise.exponential(batch, 33), torch.cat([noise.exponential(one, 33) for one in alone]))
    assert torch.equal(noise.uniform(batch), torch.cat([noise.uniform(one) for one in alone]))


def test_a_token_keeps_its_draw_in_a_larger_vocabulary() -> None:
    assert torch.equal(noise.exponential(key(7), 200)[:, :50], noise.exponential(key(7), 50))


def test_counters_are_not_interchangeable() -> None:
    grid = [
        int(key(seed, row, step, position, stream))
        for seed in (-1, 0, 1)
        for row in (0, 1)
        for step in range(4)
        for position in range(4)
        for stream in (noise.TOKEN, noise.ORDER, noise.REMASK)
    ]
    assert len(set(grid)) == len(grid)


def chi_square(values: Tensor, bins: int) -> float:
    """Of values in [0, 1) against equal bins, in standard deviations from its mean."""
    counts = torch.histc(values.float(), bins, 0, 1).double()
    expected = len(values) / bins
    return (float(((counts - expected) ** 2 / expected).sum()) - (bins - 1)) / math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("counter", COUNTERS[:4])
def test_draws_are_uniform_and_independent_along_each_counter(counter: str) -> None:
    draws = noise.uniform(along(counter, 65536))
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    assert abs(chi_square(draws, 64)) < 4
    centred = draws - 0.5
    for lag in (1, 2, 7, 64):
        correlation = float((centred[lag:] * centred[:-lag]).mean()) * 12
        assert abs(correlation) < 4 / math.sqrt(65536)
    # Pairs of neighbours fill the square.
    assert abs(chi_square((draws[::2] * 16).floor() / 16 + draws[1::2] / 16, 256)) < 4


def test_streams_rows_and_steps_do_not_repeat_each_other() -> None:
    base = noise.uniform(along("position", 65536)) - 0.5
    for other in ({"stream": noise.ORDER}, {"row": 4}, {"step": 4}, {"seed": 4}):
        moved = noise.uniform(along("position", 65536, **other)) - 0.5
        assert abs(float((base * moved).mean())) * 12 < 4 / math.sqrt(65536)


def test_token_noise_is_exponential_and_independent_of_its_neighbours() -> None:
    draws = noise.exponential(along("position", 2048), 97).double()
    shares = 1 - (-draws).exp()
    assert abs(chi_square(shares.flatten(), 64)) < 4
    for token in (0, 1, 50, 96):
        assert abs(chi_square(shares[:, token], 32)) < 4
    centred = shares - 0.5
    tokens = [(centred[:, lag:], centred[:, :-lag]) for lag in (1, 2, 3, 8, 32, 64)]
    keys = [(centred[lag:], centred[:-lag]) for lag in (1, 2, 16)]
    for one, other in tokens + keys:
        assert abs(float((one * other).mean())) * 12 < 4 / math.sqrt(one.numel())


def test_rare_tokens_are_not_cut_off() -> None:
    """-log of a draw is a Gumbel; made of a float32 uniform it could not pass 17 (arXiv 2409.02908)."""
    below, least, total = 0, math.inf, 0
    for step in range(10):
        draws = noise.exponential(along("position", 256, step=step), 32768)
        below += int((draws < 2.0**-20).sum())
        least, total = min(least, float(draws.min())), total + draws.numel()
    expected = total * 2.0**-20
    assert abs(below - expected) < 4 * math.sqrt(expected)
    assert 0 < least < math.exp(-17)


def test_small_draws_keep_their_precision() -> None:
    draws = noise.exponential(along("position", 512), 32768)
    small = draws[draws < 2.0**-16].double()
    # Were they multiples of 2^-24, at most 256 values could occur, with many repeats.
    assert len(small) > 150
    assert len(set(small.tolist())) > 0.99 * len(small)
    assert float(((small * 2**24) % 1 > 0).double().mean()) > 0.9
