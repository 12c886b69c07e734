"""Joint schedules against the closed form, convexity and a numerical optimiser."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from schedulers import (
    CommitmentProfile,
    JointProfile,
    compile_gains,
    compile_joint,
    joint_gains,
    joint_rho,
    joint_weights,
    rho,
)
from schedulers.strength import Optimal

SEEDS = st.integers(0, 10**6)
COUNTS = st.integers(1, 4)


def random_problem(
    seed: int, attributes: int, slices: int, forward: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sensitivity [A, K], cost [K, A, A] and weights [A] > 0."""
    draw = np.random.default_rng(seed)
    factors = draw.normal(size=(slices, attributes, attributes + 2))
    cost = factors @ factors.transpose(0, 2, 1) / attributes + 0.1 * np.eye(attributes)
    cost *= draw.uniform(0.2, 5, size=(slices, 1, 1))
    sensitivity = draw.normal(0.3, 1, size=(attributes, slices))
    return abs(sensitivity) if forward else sensitivity, cost, draw.uniform(0.3, 2, size=attributes)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def spent(cost: np.ndarray, pushes: np.ndarray) -> float:
    return sum(float(pushes[:, t] @ cost[t] @ pushes[:, t]) for t in range(len(cost)))


def closed_form(sensitivity: np.ndarray, cost: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """alpha_t proportional to C_t^-1 (w * s_t), at the cost of the uniform pushes of strengths w."""
    pushes = np.stack([np.linalg.solve(c, weights * s) for c, s in zip(cost, sensitivity.T, strict=True)], axis=1)
    uniform = np.repeat(weights[:, None], len(cost), axis=1)
    best: np.ndarray = pushes * np.sqrt(spent(cost, uniform) / spent(cost, pushes))
    return best


def plain_rho(sensitivity: np.ndarray, cost: np.ndarray, weights: np.ndarray) -> float:
    pull = weights[:, None] * sensitivity
    scheduled = sum(pull[:, t] @ np.linalg.inv(cost[t]) @ pull[:, t] for t in range(len(cost)))
    total = pull.sum(1)
    return float(np.sqrt(scheduled / (total @ np.linalg.inv(cost.sum(0)) @ total)))


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 12))
def test_where_the_closed_form_is_positive_it_is_the_joint_schedule(seed: int, attributes: int, slices: int) -> None:
    draw = np.random.default_rng(seed)
    _, cost, weights = random_problem(seed, attributes, slices)
    wanted = draw.uniform(0.1, 2, size=(attributes, slices))
    sensitivity = np.stack([cost[t] @ wanted[:, t] / weights for t in range(slices)], axis=1)
    gains = joint_gains(*tensors(sensitivity, cost, weights)).numpy()
    assert gains * weights[:, None] == pytest.approx(closed_form(sensitivity, cost, weights), rel=1e-9)


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 12))
def test_rho_is_the_ratio_of_the_closed_form_and_never_below_one(seed: int, attributes: int, slices: int) -> None:
    sensitivity, cost, weights = random_problem(seed, attributes, slices)
    found = joint_rho(*tensors(sensitivity, cost, weights))
    assert found >= 1
    assert found == pytest.approx(plain_rho(sensitivity, cost, weights), rel=1e-9)


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 12))
def test_the_closed_form_moves_rho_times_as_far_as_the_best_uniform_mix(
    seed: int, attributes: int, slices: int
) -> None:
    sensitivity, cost, weights = random_problem(seed, attributes, slices)
    pushes = closed_form(sensitivity, cost, weights)
    mix = np.linalg.solve(cost.sum(0), weights * sensitivity.sum(1))
    uniform = np.repeat(mix[:, None], slices, axis=1) * np.sqrt(spent(cost, pushes) / (mix @ cost.sum(0) @ mix))
    moved, plain = (float((weights[:, None] * sensitivity * push).sum()) for push in (pushes, uniform))
    assert moved == pytest.approx(joint_rho(*tensors(sensitivity, cost, weights)) * plain, rel=1e-9)


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 12))
def test_gains_cost_what_the_uniform_strengths_do(seed: int, attributes: int, slices: int) -> None:
    sensitivity, cost, weights = random_problem(seed, attributes, slices)
    assume((sensitivity > 0.01).any())
    strengths = weights * np.random.default_rng(seed + 1).uniform(0.1, 3, size=attributes)
    gains = joint_gains(*tensors(sensitivity, cost, weights, strengths)).numpy()
    uniform = np.repeat(strengths[:, None], slices, axis=1)
    assert gains.min() >= 0
    assert spent(cost, strengths[:, None] * gains) == pytest.approx(spent(cost, uniform), rel=1e-9)


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 8))
def test_each_slice_solves_its_nonnegative_problem(seed: int, attributes: int, slices: int) -> None:
    from scipy.optimize import nnls

    sensitivity, cost, weights = random_problem(seed, attributes, slices)
    expected = np.zeros((attributes, slices))
    for t in range(slices):
        # The same problem as least squares: |L^T a - L^-1 b|^2 over a >= 0, with C = L L^T.
        root = np.linalg.cholesky(cost[t])
        expected[:, t] = nnls(root.T, np.linalg.solve(root, weights * sensitivity[:, t]))[0]
    assume(expected.max() > 1e-3)
    uniform = np.repeat(weights[:, None], slices, axis=1)
    expected *= np.sqrt(spent(cost, uniform) / spent(cost, expected))
    gains = joint_gains(*tensors(sensitivity, cost, weights)).numpy()
    assert gains * weights[:, None] == pytest.approx(expected, rel=1e-6, abs=1e-8)


@settings(max_examples=20)
@given(seed=SEEDS, attributes=st.integers(1, 3), slices=st.integers(1, 4))
def test_no_optimiser_finds_better_pushes_of_the_same_cost(seed: int, attributes: int, slices: int) -> None:
    from scipy.optimize import minimize

    sensitivity, cost, weights = random_problem(seed, attributes, slices)
    assume(sensitivity.max() > 0.2)
    pull = weights[:, None] * sensitivity
    budget = spent(cost, np.repeat(weights[:, None], slices, axis=1))

    def left(flat: np.ndarray) -> float:
        return budget - spent(cost, flat.reshape(attributes, slices))

    def slope(flat: np.ndarray) -> np.ndarray:
        down: np.ndarray = -2 * np.einsum("tab,bt->at", cost, flat.reshape(attributes, slices)).ravel()
        return down

    found = minimize(
        lambda flat: -pull.ravel() @ flat,
        np.full(pull.size, 0.1),
        jac=lambda _: -pull.ravel(),
        bounds=[(0, None)] * pull.size,
        constraints={"type": "ineq", "fun": left, "jac": slope},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-10},
    )
    best = found.x.clip(0).reshape(attributes, slices)
    best *= np.sqrt(budget / spent(cost, best))
    gains = joint_gains(*tensors(sensitivity, cost, weights)).numpy()
    moved, reached = (float((pull * pushes).sum()) for pushes in (weights[:, None] * gains, best))
    assert reached <= moved * (1 + 1e-9)
    assert reached == pytest.approx(moved, rel=1e-4)


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 12))
def test_rho_with_nonnegative_pushes_is_what_the_gains_attain(seed: int, attributes: int, slices: int) -> None:
    from scipy.optimize import nnls

    sensitivity, cost, weights = random_problem(seed, attributes, slices)
    pull = weights[:, None] * sensitivity
    root = np.linalg.cholesky(cost.sum(0))
    mix = nnls(root.T, np.linalg.solve(root, pull.sum(1)))[0]
    assume(mix.max() > 1e-3)
    gains = joint_gains(*tensors(sensitivity, cost, weights)).numpy()
    budget = spent(cost, np.repeat(weights[:, None], slices, axis=1))
    uniform = float(pull.sum(1) @ mix) * np.sqrt(budget / (mix @ cost.sum(0) @ mix))
    attained = joint_rho(*tensors(sensitivity, cost, weights), nonnegative=True)
    assert attained >= 1
    assert attained == pytest.approx(float((pull * weights[:, None] * gains).sum()) / uniform, rel=1e-6)


@given(seed=SEEDS, slices=st.integers(1, 12), strength=st.floats(0.1, 5))
def test_one_attribute_is_the_optimal_schedule(seed: int, slices: int, strength: float) -> None:
    sensitivity, cost, _ = random_problem(seed, 1, slices)
    assume(sensitivity.sum() > 0.05)
    alone = CommitmentProfile(
        tuple(float(i) for i in range(slices + 1)), sensitivity=tuple(sensitivity[0]), cost=tuple(cost[:, 0, 0])
    )
    optimal = compile_gains(Optimal(), None, alone, slices)
    joint = compile_joint(profile_of(("one",), sensitivity, cost), [strength], slices=slices)
    assert joint.gains[0].tolist() == pytest.approx(optimal.gains.tolist(), rel=1e-6)
    assert joint.rho == pytest.approx(optimal.rho)
    assert joint.rho == pytest.approx(rho(sensitivity[0].tolist(), cost[:, 0, 0].tolist()))
    assert (joint.note is None) == (optimal.note is None)


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 12))
def test_where_the_best_push_is_the_same_everywhere_it_is_uniform_and_rho_is_one(
    seed: int, attributes: int, slices: int
) -> None:
    _, cost, weights = random_problem(seed, attributes, slices)
    sensitivity = np.stack([matrix @ weights / weights for matrix in cost], axis=1)
    assert joint_rho(*tensors(sensitivity, cost, weights)) == pytest.approx(1)
    assert joint_rho(*tensors(sensitivity, cost, weights), nonnegative=True) == pytest.approx(1)
    assert joint_gains(*tensors(sensitivity, cost, weights)).numpy() == pytest.approx(np.ones((attributes, slices)))


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(2, 12), lift=st.floats(1.1, 5))
def test_elsewhere_rho_is_above_one(seed: int, attributes: int, slices: int, lift: float) -> None:
    _, cost, weights = random_problem(seed, attributes, slices)
    sensitivity = np.stack([matrix @ weights / weights for matrix in cost], axis=1)
    sensitivity[:, 0] *= lift
    assert joint_rho(*tensors(sensitivity, cost, weights)) > 1 + 1e-7


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 12))
def test_attributes_that_do_not_interfere_are_scheduled_each_for_itself(
    seed: int, attributes: int, slices: int
) -> None:
    sensitivity, cost, weights = random_problem(seed, attributes, slices, forward=True)
    cost = cost * np.eye(attributes)
    gains = joint_gains(*tensors(sensitivity, cost, weights)).numpy()
    for a in range(attributes):
        alone = sensitivity[a] / cost[:, a, a]
        assert gains[a] / gains[a].max() == pytest.approx(alone / alone.max(), rel=1e-9)


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 12))
def test_weights_left_out_make_the_strengths_the_best_uniform_mix(seed: int, attributes: int, slices: int) -> None:
    sensitivity, cost, strengths = random_problem(seed, attributes, slices, forward=True)
    weights = joint_weights(*tensors(sensitivity, cost, strengths)).numpy()
    mix = np.linalg.solve(cost.sum(0), weights * sensitivity.sum(1))
    assert mix == pytest.approx(strengths, rel=1e-9)
    assume((weights > 0).all())
    table = compile_joint(profile_of(tuple("abcd"[:attributes]), sensitivity, cost), strengths.tolist(), slices=slices)
    assert table.weights == pytest.approx(tuple(weights))
    pull = (weights * strengths)[:, None] * sensitivity
    moved = float((pull * table.gains.numpy()).sum())
    assert moved == pytest.approx(table.rho_attained * pull.sum(), rel=1e-5)
    assert 1 <= table.rho_attained <= table.rho * (1 + 1e-9)


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 12), flips=st.integers(0, 15))
def test_a_push_away_is_the_push_towards_the_turned_attribute(
    seed: int, attributes: int, slices: int, flips: int
) -> None:
    sensitivity, cost, weights = random_problem(seed, attributes, slices)
    assume((sensitivity > 0.01).any())
    turn = np.array([-1.0 if flips >> a & 1 else 1.0 for a in range(attributes)])
    turned = joint_gains(*tensors(sensitivity, cost * turn[:, None] * turn, turn * weights))
    assert turned.numpy() == pytest.approx(joint_gains(*tensors(sensitivity, cost, weights)).numpy(), rel=1e-9)


@given(seed=SEEDS, attributes=COUNTS, slices=st.integers(1, 12))
def test_units_and_the_order_of_attributes_do_not_matter(seed: int, attributes: int, slices: int) -> None:
    sensitivity, cost, weights = random_problem(seed, attributes, slices)
    assume((sensitivity > 0.01).any())
    gains = joint_gains(*tensors(sensitivity, cost, weights)).numpy()
    order = np.random.default_rng(seed).permutation(attributes)
    moved = joint_gains(*tensors(sensitivity[order], cost[:, order][:, :, order], weights[order])).numpy()
    assert moved == pytest.approx(gains[order], rel=1e-6, abs=1e-9)
    unit = np.random.default_rng(seed).uniform(0.01, 100, size=attributes)
    scaled = joint_gains(
        *tensors(sensitivity * unit[:, None], cost * unit[:, None] * unit, weights, weights / unit)
    ).numpy()
    # Strengths in other units are the same pushes; their cost and their effect stay.
    assert scaled == pytest.approx(gains, rel=1e-6, abs=1e-9)


def profile_of(names: tuple[str, ...], sensitivity: np.ndarray, cost: np.ndarray) -> JointProfile:
    return JointProfile(
        names,
        tuple(tuple(row) for row in sensitivity.tolist()),
        tuple(tuple(tuple(row) for row in matrix) for matrix in cost.tolist()),
    )


def test_the_note_says_where_a_gain_was_kept_from_being_negative() -> None:
    # Pushes that share most of their cost: the weaker one would best be pushed backwards in the first slice.
    cost = np.array([[[1.0, 0.9], [0.9, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    profile = profile_of(("topic", "tone"), np.array([[1.0, 1.0], [0.1, 1.0]]), cost)
    table = compile_joint(profile, [1.0, 1.0], [1.0, 1.0], slices=2)
    assert table.gains[1, 0] == 0
    assert table.note == "gains are 0 or more; without that limit some would be negative: 'tone' in 1 of 2 slices"
    assert 1 <= table.rho_attained < table.rho
    fine = compile_joint(profile, [1.0, 1.0], [1.0, 1.0], slices=8)
    assert fine.gains.tolist() == [pytest.approx(row.repeat_interleave(4).tolist()) for row in table.gains]


@pytest.mark.parametrize(
    ("strengths", "weights", "message"),
    [
        ([1.0], None, "strengths must have a value for each of topic, tone, not 1"),
        ([1.0, 0.0], None, r"strengths\[1\] must not be 0: leave 'tone' out"),
        ([1.0, float("nan")], None, r"strengths\[1\] must be a finite number"),
        ([1.0, -0.1], None, "the best uniform mix, which would not push 'tone' that way: give weights"),
        ([1.0, 1.0], [1.0], "weights must have a value for each"),
        ([1.0, 1.0], [1.0, -1.0], "strengths must have the signs of the weights"),
    ],
)
def test_strengths_and_weights_that_do_not_fit_are_refused(
    strengths: list[float], weights: list[float] | None, message: str
) -> None:
    cost = np.array([[[1.0, 0.9], [0.9, 1.0]]] * 2)
    sensitivity = np.array([[1.0, 1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match=message):
        compile_joint(profile_of(("topic", "tone"), sensitivity, cost), strengths, weights)


def test_what_is_no_joint_problem_is_refused() -> None:
    ones, eye = torch.ones(2, 3), torch.eye(2).expand(3, 2, 2)
    with pytest.raises(ValueError, match="1 to 8 attributes can be pushed together, not 9"):
        joint_gains(torch.ones(9, 3), torch.eye(9).expand(3, 9, 9), torch.ones(9))
    with pytest.raises(ValueError, match=r"cost must be \[3, 2, 2\] and weights \[2\], not \[2, 2, 2\] and \[2\]"):
        joint_gains(ones, eye[:2], torch.ones(2))
    with pytest.raises(ValueError, match="weights must be finite and not 0"):
        joint_gains(ones, eye, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"cost\[0\] must be positive definite"):
        joint_rho(ones, torch.ones(3, 2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="no push of the signs asked for moves the attributes forward"):
        joint_gains(-ones, eye, torch.ones(2))
    with pytest.raises(ValueError, match="nothing to compare with"):
        joint_rho(-ones, eye, torch.ones(2), nonnegative=True)
    with pytest.raises(ValueError, match="nothing to compare with"):
        joint_rho(torch.tensor([[1.0, -1.0]]), torch.ones(2, 1, 1), torch.ones(1))
