"""Every transfer against a plain loop over rows, and over whole runs."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schedulers import TRANSFERS, Quota, Transfer, build_transfer
from schedulers.transfer import Cosine, EntropyBound, Linear, Threshold


@dataclass(frozen=True)
class Row:
    """One row of a quota, with its candidates best first."""

    step: int
    steps: int
    total: int
    masked: int
    probability: tuple[float, ...]
    entropy: tuple[float, ...]


@st.composite
def rows(draw: st.DrawFn) -> Row:
    steps = draw(st.integers(1, 12))
    masked = draw(st.integers(0, 9))
    # Sixteenths add up exactly: what is at the bound is at it in both readings.
    sixteenths = st.integers(0, 16).map(lambda i: i / 16)
    return Row(
        step=draw(st.integers(0, steps - 1)),
        steps=steps,
        total=draw(st.integers(masked, 20)),
        masked=masked,
        probability=tuple(draw(st.lists(sixteenths, min_size=masked, max_size=masked))),
        entropy=tuple(draw(st.lists(sixteenths, min_size=masked, max_size=masked))),
    )


def quota(batch: list[Row]) -> Quota:
    return Quota(
        step=torch.tensor([row.step for row in batch]),
        steps=torch.tensor([row.steps for row in batch]),
        total=torch.tensor([row.total for row in batch]),
        masked=torch.tensor([row.masked for row in batch]),
        row=torch.tensor([r for r, row in enumerate(batch) for _ in row.probability], dtype=torch.int64),
        probability=torch.tensor([p for row in batch for p in row.probability], dtype=torch.float32),
        entropy=torch.tensor([h for row in batch for h in row.entropy], dtype=torch.float32),
    )


def plain_linear(total: int, steps: int) -> list[int]:
    """LLaDA's table of counts: an equal share, the remainder one each to the first steps."""
    table = [total // steps] * steps
    for step in range(total % steps):
        table[step] += 1
    return table


def plain_count(transfer: Transfer, row: Row) -> int:
    if isinstance(transfer, Linear):
        return min(plain_linear(row.total, row.steps)[row.step], row.masked)
    if row.step == row.steps - 1:
        return row.masked
    if isinstance(transfer, Cosine):
        left = row.total * math.cos(math.pi / 2 * (row.step + 1) / row.steps)
        nearest = round(left)
        count = row.masked - (nearest if abs(left - nearest) < 1e-9 else math.ceil(left))
    elif isinstance(transfer, Threshold):
        count = max(1, sum(1 for p in row.probability if p >= transfer.value))
    else:
        assert isinstance(transfer, EntropyBound)
        count = 1
        for k in range(1, row.masked + 1):
            best = row.entropy[:k]
            if sum(best) - max(best) <= transfer.value:
                count = k
    return max(0, min(count, row.masked))


EVERY = st.sampled_from(
    [Linear(), Cosine(), Threshold(0.5), Threshold(1.0), EntropyBound(0.0), EntropyBound(0.5), EntropyBound(2.0)]
)


@given(transfer=EVERY, batch=st.lists(rows(), min_size=1, max_size=6))
def test_counts_follow_the_rule_row_by_row(transfer: Transfer, batch: list[Row]) -> None:
    counts = transfer.counts(quota(batch))
    assert counts.dtype == torch.int64
    assert counts.tolist() == [plain_count(transfer, row) for row in batch]


@given(transfer=EVERY, batch=st.lists(rows(), min_size=1, max_size=6))
def test_a_row_counts_the_same_alone_and_in_a_batch(transfer: Transfer, batch: list[Row]) -> None:
    alone = [transfer.counts(quota([row])).item() for row in batch]
    assert transfer.counts(quota(batch)).tolist() == alone


@given(entropies=st.lists(st.lists(st.floats(0, 12), min_size=1, max_size=30), min_size=2, max_size=5))
def test_entropies_are_summed_alike_in_any_batch(entropies: list[list[float]]) -> None:
    batch = [Row(0, 9, len(h), len(h), (0.5,) * len(h), tuple(h)) for h in entropies]
    transfer = EntropyBound(sum(entropies[0]) / 2)
    alone = [transfer.counts(quota([row])).item() for row in batch]
    assert transfer.counts(quota(batch)).tolist() == alone


def run(transfer: Transfer, total: int, steps: int) -> list[int]:
    masked, counts = total, []
    for step in range(steps):
        row = Row(step, steps, total, masked, (0.5,) * masked, (0.5,) * masked)
        counts.append(int(transfer.counts(quota([row])).item()))
        masked -= counts[-1]
    return counts


@given(transfer=EVERY, total=st.integers(0, 40), steps=st.integers(1, 60))
def test_everything_is_committed_by_the_last_step(transfer: Transfer, total: int, steps: int) -> None:
    counts = run(transfer, total, steps)
    assert min(counts) >= 0
    assert sum(counts) == total


@given(total=st.integers(0, 40), steps=st.integers(1, 60))
def test_linear_is_the_published_table_even_with_more_steps_than_masks(total: int, steps: int) -> None:
    assert run(Linear(), total, steps) == plain_linear(total, steps)


@given(total=st.integers(1, 200), steps=st.integers(1, 60))
def test_cosine_leaves_the_published_share_masked(total: int, steps: int) -> None:
    left = total
    for step, count in enumerate(run(Cosine(), total, steps)):
        left -= count
        assert left == pytest.approx(total * math.cos(math.pi / 2 * (step + 1) / steps), abs=1)


def test_cosine_commits_more_and_more() -> None:
    assert run(Cosine(), 256, 8) == [4, 15, 24, 31, 39, 45, 48, 50]


def test_cosine_takes_a_whole_number_for_one_despite_rounding() -> None:
    assert 10 * math.cos(math.pi / 3) > 5
    assert run(Cosine(), 10, 3) == [1, 4, 5]


def test_entropy_bound_says_what_it_lacks() -> None:
    empty = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs the candidates' entropy"):
        EntropyBound().counts(Quota(empty, empty + 2, empty + 1, empty + 1, empty, torch.ones(1)))


def test_needs_name_what_is_read() -> None:
    assert {name: set(build_transfer(name).needs) for name in TRANSFERS} == {
        "linear": set(),
        "cosine": set(),
        "threshold": {"probability"},
        "entropy_bound": {"entropy"},
    }
