"""ReMDM's chances against the published posterior, and what they keep: the share of masks of every time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schedulers import TRANSFERS, build_transfer
from schedulers.transfer import Ddpm, Remdm

STEPS = st.integers(1, 30).flatmap(lambda steps: st.tuples(st.integers(0, steps - 1), st.just(steps)))
EPS = st.floats(1e-6, 0.9)
ETA = st.floats(0, 1)
SCHEDULE = st.sampled_from(["cap", "rescale"])


def published(at: tuple[int, int], eps: float, eta: float, schedule: str) -> tuple[float, float]:
    """The chance that a token is masked and that a mask commits: q(z_s | z_t, x) with alpha = 1 - t."""
    step, steps = at
    dt = (1 - eps) / steps
    alpha_t = (1 - eps) * step / steps
    alpha_s = alpha_t + dt
    most = 1.0 if step == 0 else min(1.0, (1 - alpha_s) / alpha_t)
    sigma = min(eta, most) if schedule == "cap" else eta * most
    return sigma, (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)


@given(at=st.lists(STEPS, min_size=1, max_size=5), eps=EPS, eta=ETA, schedule=SCHEDULE)
def test_chances_are_those_of_the_published_posterior(
    at: list[tuple[int, int]], eps: float, eta: float, schedule: str
) -> None:
    transfer = build_transfer({"type": "remdm", "eps": eps, "eta": eta, "schedule": schedule})
    step, steps = torch.tensor(at).unbind(1)
    hazard, remask = transfer.hazard(step, steps, None), transfer.remask(step, steps)
    expected = [published(one, eps, eta, schedule) for one in at]
    assert hazard is not None
    assert hazard.dtype == torch.float64
    assert hazard.tolist() == pytest.approx([commits for _, commits in expected], rel=1e-9, abs=1e-12)
    assert transfer.remasks == (eta > 0)
    if remask is None:
        assert eta == 0
    else:
        assert remask.dtype == torch.float64
        assert remask.tolist() == pytest.approx([sigma for sigma, _ in expected], rel=1e-9, abs=1e-12)


@given(steps=st.integers(1, 30), eps=EPS, eta=ETA, schedule=SCHEDULE)
def test_the_share_of_masks_is_that_of_the_time_at_every_step(
    steps: int, eps: float, eta: float, schedule: str
) -> None:
    """The marginals of the masking process are kept, whatever is masked again (theorem 3.1)."""
    transfer = build_transfer({"type": "remdm", "eps": eps, "eta": eta, "schedule": schedule})
    masked = 1.0
    for i in range(steps):
        step, count = torch.tensor([i]), torch.tensor([steps])
        hazard, remask = transfer.hazard(step, count, None), transfer.remask(step, count)
        assert hazard is not None
        assert -1e-12 <= hazard.item() <= 1 + 1e-12
        masked += (1 - masked) * (0.0 if remask is None else remask.item()) - masked * hazard.item()
        assert masked == pytest.approx(1 - (1 - eps) * (i + 1) / steps, abs=1e-9)


@given(at=STEPS, eps=EPS, schedule=SCHEDULE)
def test_without_remasking_it_is_ddpm(at: tuple[int, int], eps: float, schedule: str) -> None:
    step, steps = torch.tensor([at]).unbind(1)
    plain = build_transfer({"type": "remdm", "eps": eps, "eta": 0, "schedule": schedule})
    mine, ddpm = plain.hazard(step, steps, None), Ddpm(eps).hazard(step, steps, None)
    assert mine is not None and ddpm is not None
    assert torch.equal(mine, ddpm)
    assert plain.remask(step, steps) is None


@given(eps=EPS, steps=st.integers(1, 30), schedule=SCHEDULE)
def test_nothing_is_masked_again_at_the_noise_removal(eps: float, steps: int, schedule: str) -> None:
    remask = build_transfer({"type": "remdm", "eps": eps, "eta": 1.0, "schedule": schedule}).remask(
        torch.tensor([steps]), torch.tensor([steps])
    )
    assert remask is not None
    assert remask.item() == 0


def test_no_other_transfer_masks_again() -> None:
    assert [name for name in TRANSFERS if build_transfer(name).remasks] == ["remdm"]
    assert [name for name in TRANSFERS if build_transfer(name).edits] == ["joint_threshold"]
    assert [name for name in TRANSFERS if build_transfer(name).revises] == ["joint_threshold", "remdm"]
    for name in TRANSFERS:
        if name != "remdm":
            assert build_transfer(name).remask(torch.tensor([0]), torch.tensor([2])) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.5}, "eta must be a finite number from 0 to 1"),
        ({"eta": -0.1}, "eta must be"),
        ({"eta": True}, "eta must be"),
        ({"eta": float("nan")}, "eta must be"),
        ({"schedule": "loop"}, "schedule must be cap or rescale, not 'loop'"),
        ({"schedule": None}, "schedule must be"),
        ({"schedule": ["cap"]}, "schedule must be"),
        ({"sigma": 1}, "allowed: eps, eta, schedule"),
    ],
)
def test_what_is_no_schedule_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_transfer({"type": "remdm", **options})


def test_the_defaults_cap() -> None:
    assert build_transfer("remdm") == Remdm(eps=1e-5, eta=0.02, schedule="cap")
