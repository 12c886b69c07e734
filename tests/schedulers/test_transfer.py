"""Every transfer against a plain loop over rows, and over whole runs."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from schedulers import TRANSFERS, Quota, Transfer, build_transfer
from schedulers.transfer import Analytic, Cosine, Ddpm, EntropyBound, Euler, Linear, Origin, Threshold, Timesteps


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


def plain_times(steps: int, eps: float) -> list[float]:
    """Times from 1 to eps, `steps` equal ones apart."""
    return [1 - (1 - eps) * i / steps for i in range(steps + 1)]


def plain_count(transfer: Transfer, row: Row) -> int:
    if isinstance(transfer, Linear):
        return min(plain_linear(row.total, row.steps)[row.step], row.masked)
    if row.step == row.steps - 1:
        return row.masked
    if isinstance(transfer, Cosine):
        left = row.total * math.cos(math.pi / 2 * (row.step + 1) / row.steps)
        nearest = round(left)
        count = row.masked - (nearest if abs(left - nearest) < 1e-9 else math.ceil(left))
    elif isinstance(transfer, Timesteps):
        now, after = plain_times(row.steps, transfer.eps)[row.step : row.step + 2]
        count = math.floor(row.masked * (1 - after / now))
    elif isinstance(transfer, Threshold):
        count = max(transfer.least, sum(1 for p in row.probability if p >= transfer.value))
    else:
        assert isinstance(transfer, EntropyBound)
        count = 1
        for k in range(1, row.masked + 1):
            best = row.entropy[:k]
            if sum(best) - max(best) <= transfer.value:
                count = k
    return max(0, min(count, row.masked))


EVERY = st.sampled_from(
    [
        Linear(),
        Cosine(),
        Threshold(0.5),
        Threshold(1.0),
        Threshold(0.5, least=3),
        EntropyBound(0.0),
        EntropyBound(0.5),
        EntropyBound(2.0),
        Timesteps(),
        Timesteps(0.3),
    ]
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


@given(total=st.integers(0, 40), steps=st.integers(1, 60), eps=st.floats(1e-5, 0.9))
def test_timesteps_leave_the_masks_that_they_foretell(total: int, steps: int, eps: float) -> None:
    counts = run(Timesteps(eps), total, steps)
    left = [total - sum(counts[:step]) for step in range(steps)]
    assert Timesteps(eps).masked(total, steps) == left


def test_timesteps_of_dreams_default() -> None:
    """Worked out by hand: 8 masks in 8 steps are 0 at first, as 8 (1 - s) falls short of 1 by 8 eps."""
    assert run(Timesteps(), 8, 8) == [0, 1, 1, 1, 1, 1, 1, 2]
    assert run(Timesteps(), 12, 5) == [2, 2, 2, 2, 4]


@dataclass(frozen=True)
class Noise:
    """A noise schedule whose total is t squared."""

    def total(self, time: Tensor) -> Tensor:
        return time.double() ** 2

    def rate(self, time: Tensor) -> Tensor:
        return 2 * time.double()


STEPS = st.integers(1, 30).flatmap(lambda steps: st.tuples(st.integers(0, steps - 1), st.just(steps)))
EPS = st.floats(1e-6, 0.9)


@given(at=st.lists(STEPS, min_size=1, max_size=5), eps=EPS)
def test_hazards_are_the_published_chances(at: list[tuple[int, int]], eps: float) -> None:
    step, steps = torch.tensor(at).unbind(1)
    plain: dict[Transfer, list[float]] = {Origin(eps): [], Ddpm(eps): [], Analytic(eps): [], Euler(eps): []}
    for i, n in at:
        now, after = plain_times(n, eps)[i : i + 2]
        plain[Origin(eps)].append(1.0 if i == n - 1 else 1 - after / now)
        plain[Ddpm(eps)].append((now - after) / now)
        plain[Analytic(eps)].append(math.exp(now**2 - after**2) - 1)
        plain[Euler(eps)].append((1 - eps) / n * 2 * now)
    for transfer, expected in plain.items():
        hazard = transfer.hazard(step, steps, Noise())
        time = transfer.time(step, steps)
        assert hazard is not None and time is not None
        assert hazard.dtype == time.dtype == torch.float64
        assert hazard.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert time.tolist() == pytest.approx([plain_times(n, eps)[i] for i, n in at])


@given(eps=EPS, steps=st.integers(1, 30))
def test_the_step_after_the_last_is_at_the_last_time(eps: float, steps: int) -> None:
    after = torch.tensor([steps])
    for transfer in (Ddpm(eps), Analytic(eps), Euler(eps)):
        time = transfer.time(after, after)
        assert time is not None
        assert time.item() == pytest.approx(eps)


def due_quota(step: int, steps: int, due: list[list[bool]]) -> Quota:
    rows = len(due)
    return Quota(
        step=torch.full((rows,), step),
        steps=torch.full((rows,), steps),
        total=torch.full((rows,), 9),
        masked=torch.tensor([len(row) for row in due]),
        row=torch.tensor([r for r, row in enumerate(due) for _ in row], dtype=torch.int64),
        due=torch.tensor([now for row in due for now in row], dtype=torch.bool),
    )


@given(due=st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=5), steps=st.integers(1, 9))
def test_as_many_commit_as_draws_say_so_and_all_after_the_last_step(due: list[list[bool]], steps: int) -> None:
    for transfer in (Origin(), Ddpm(), Analytic(), Euler()):
        for step in range(steps):
            assert transfer.counts(due_quota(step, steps, due)).tolist() == [sum(row) for row in due]
        assert transfer.counts(due_quota(steps, steps, due)).tolist() == [len(row) for row in due]


@pytest.mark.parametrize("name", ["timesteps", "origin", "ddpm", "ddpm_cache", "remdm", "analytic", "euler"])
@pytest.mark.parametrize("eps", [0, 1, -0.1, 2.0, float("nan"), "small", True, None])
def test_a_last_time_outside_0_and_1_is_refused(name: str, eps: object) -> None:
    with pytest.raises(ValueError, match="eps"):
        build_transfer({"type": name, "eps": eps})


def test_independent_transfers_say_what_they_lack() -> None:
    empty = torch.zeros(1, dtype=torch.int64)
    for transfer in (Origin(), Ddpm(), Analytic(), Euler()):
        with pytest.raises(ValueError, match="needs the candidates' draws"):
            transfer.counts(Quota(empty, empty + 2, empty + 1, empty + 1, empty))
    for transfer in (Analytic(), Euler()):
        with pytest.raises(ValueError, match="needs the noise schedule"):
            transfer.hazard(empty, empty + 2, None)


def test_endings_and_idle_steps_are_those_of_the_published_loops() -> None:
    assert {name: (build_transfer(name).ending, build_transfer(name).idles) for name in TRANSFERS} == {
        "linear": ("none", False),
        "cosine": ("none", True),
        "threshold": ("none", False),
        "joint_threshold": ("none", False),
        "entropy_bound": ("none", False),
        "timesteps": ("none", True),
        "origin": ("none", True),
        "ddpm": ("likeliest", True),
        "ddpm_cache": ("likeliest", True),
        "remdm": ("likeliest", True),
        "analytic": ("draw", True),
        "euler": ("draw", True),
    }


def test_needs_name_what_is_read() -> None:
    assert {name: set(build_transfer(name).needs) for name in TRANSFERS} == {
        "linear": set(),
        "cosine": set(),
        "threshold": {"probability"},
        "joint_threshold": {"probability"},
        "entropy_bound": {"entropy"},
        "timesteps": set(),
        "origin": {"uniform"},
        "ddpm": {"uniform"},
        "ddpm_cache": {"uniform"},
        "remdm": {"uniform"},
        "analytic": {"uniform", "mass"},
        "euler": {"uniform", "mass"},
    }
