"""The closed loop against a controller written for one row, and on simulated plants."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import CommitmentProfile, Feedback, build_controller, build_strength, check_target, controllers

CURVES = st.lists(st.integers(-30, 30).map(lambda i: i / 10), min_size=2, max_size=12).map(
    lambda values: [*values, max(values) + 0.5, min(values[0], 0.0) + 4.0]
)
LOOPS = st.builds(
    Feedback,
    gain=st.floats(0.1, 20),
    hold=st.floats(0.5, 1.5),
    release=st.integers(1, 4),
    lead=st.floats(0, 1),
    rate=st.floats(0.05, 1),
    peak=st.floats(0.2, 3),
)
READINGS = st.lists(st.floats(-4, 8) | st.just(math.nan), min_size=1, max_size=15)


class OneController:
    """The rule for one row, read off its description."""

    def __init__(self, loop: Feedback, curve: list[float]) -> None:
        self.loop, self.curve = loop, curve
        self.last: float | None = None
        self.streak, self.let_go = 0, False

    def setpoint(self, progress: float) -> float:
        at = min(1.0, progress) * (len(self.curve) - 1)
        below = min(int(at), len(self.curve) - 2)
        h = self.curve[below] + (self.curve[below + 1] - self.curve[below]) * (at - below)
        return self.curve[0] + self.loop.hold * (h - self.curve[0])

    def push(self, readout: float, progress: float) -> float:
        loop, rise = self.loop, self.curve[-1] - self.curve[0]
        if math.isnan(readout):
            readout = self.setpoint(progress)
        else:
            self.streak = self.streak + 1 if (readout - self.curve[0]) / rise >= loop.hold else 0
        self.let_go = self.let_go or self.streak >= loop.release
        wanted = loop.gain * (self.setpoint(progress + loop.lead) - readout) / rise
        wanted = min(max(wanted, 0.0), loop.peak)
        if self.last is not None:
            wanted = min(wanted, self.last + loop.rate * loop.peak)
        self.last = 0.0 if self.let_go else wanted
        return self.last


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(LOOPS, CURVES, READINGS), min_size=1, max_size=6))
def test_rows_side_by_side_do_what_each_would_alone(rows: list[tuple[Feedback, list[float], list[float]]]) -> None:
    steps = max(len(readings) for _, _, readings in rows)
    loops = controllers([(loop, CommitmentProfile(tuple(curve))) for loop, curve, _ in rows])
    alone = [OneController(loop, curve) for loop, curve, _ in rows]
    state = loops.state()
    for step in range(steps):
        readouts = [readings[step % len(readings)] for _, _, readings in rows]
        progress = step / steps
        readout = torch.tensor(readouts, dtype=torch.float64)
        gains, state = loops.gains(readout, torch.full((len(rows),), progress), state)
        # Progress arrives in float32, as an engine may have it.
        expected = [one.push(value, torch.tensor(progress).item()) for one, value in zip(alone, readouts, strict=True)]
        assert gains.dtype == torch.float64
        assert gains.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert loops.released(state).tolist() == [one.let_go for one in alone]


@given(rows=st.lists(st.tuples(LOOPS, CURVES), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_neighbours(rows: list[tuple[Feedback, list[float]]], seed: int) -> None:
    pairs = [(loop, CommitmentProfile(tuple(curve))) for loop, curve in rows]
    readout = 3 * torch.randn(5, len(rows), generator=torch.Generator().manual_seed(seed))

    def run(chosen: list[int]) -> list[list[float]]:
        loops = controllers([pairs[i] for i in chosen])
        state, found = loops.state(), []
        for step, reading in enumerate(readout):
            gains, state = loops.gains(reading[chosen], torch.full((len(chosen),), step / 5), state)
            found.append(gains.tolist())
        return found

    together = run(list(range(len(rows))))
    for i in range(len(rows)):
        assert [step[0] for step in run([i])] == [step[i] for step in together]


@given(loop=LOOPS, curve=CURVES, readings=READINGS)
def test_gains_are_bounded_and_zero_above_the_setpoint_and_once_let_go(
    loop: Feedback, curve: list[float], readings: list[float]
) -> None:
    loops, one = controllers([(loop, CommitmentProfile(tuple(curve)))]), OneController(loop, curve)
    state, before = loops.state(), math.inf
    for step, readout in enumerate(readings):
        progress = step / len(readings)
        gains, state = loops.gains(
            torch.tensor([readout], dtype=torch.float64), torch.tensor([progress], dtype=torch.float64), state
        )
        gain = gains.item()
        assert 0 <= gain <= loop.peak
        assert gain <= before + loop.rate * loop.peak + 1e-12
        if readout > one.setpoint(progress + loop.lead) + 1e-9 or loops.released(state).item():
            assert gain == 0
        before = gain


@given(loop=LOOPS, curve=CURVES, readings=READINGS, scale=st.floats(0.01, 100), shift=st.floats(-5, 5))
def test_the_units_of_the_readout_do_not_matter(
    loop: Feedback, curve: list[float], readings: list[float], scale: float, shift: float
) -> None:
    other = controllers([(loop, CommitmentProfile(tuple(scale * h + shift for h in curve)))])
    plain = controllers([(loop, CommitmentProfile(tuple(curve)))])
    for readout in readings:
        if abs(readout - curve[0] - loop.hold * (curve[-1] - curve[0])) < 1e-6:
            continue  # at the committed level: rounding decides
        reading, progress = torch.tensor([readout], dtype=torch.float64), torch.tensor([0.3])
        first, _ = plain.gains(reading, progress, plain.state())
        second, _ = other.gains(scale * reading + shift, progress, other.state())
        assert second.item() == pytest.approx(first.item(), rel=1e-6, abs=1e-6)


STEADY = CommitmentProfile((0.0, 1.0))
"""With lead 1 the setpoint is 1 throughout."""


@given(
    gain=st.floats(0.1, 100),
    answer=st.floats(0.0, 3),
    start=st.floats(-0.5, 0.99),
    rate=st.floats(0.02, 0.5),
    peak=st.floats(0.5, 2),
)
def test_a_late_reading_overshoots_by_no_more_than_one_rise(
    gain: float, answer: float, start: float, rate: float, peak: float
) -> None:
    loops = controllers([(Feedback(gain=gain, lead=1.0, rate=rate, peak=peak, release=1000), STEADY)])
    state, reading = loops.state(), start
    for step in range(40):
        gains, state = loops.gains(torch.tensor([reading], dtype=torch.float64), torch.tensor([0.5]), state)
        reading = start + answer * gains.item()
        if step > 0:
            assert reading <= 1 + answer * rate * peak + 1e-9


@settings(max_examples=25)
@given(gain=st.floats(0.5, 20), answer=st.floats(0.05, 1), start=st.floats(0.0, 0.9))
def test_a_gentle_loop_settles_at_the_droop_of_a_proportional_controller(
    gain: float, answer: float, start: float
) -> None:
    if gain * answer > 0.9:
        gain = 0.9 / answer
    loops = controllers([(Feedback(gain=gain, lead=1.0, peak=100.0, rate=1.0), STEADY)])
    state, reading = loops.state(), start
    for _ in range(180):
        gains, state = loops.gains(torch.tensor([reading], dtype=torch.float64), torch.tensor([0.5]), state)
        reading = start + answer * gains.item()
    assert 1 - reading == pytest.approx((1 - start) / (1 + gain * answer), abs=1e-6)


def test_it_lets_go_after_the_readings_asked_for_and_stays_so() -> None:
    loops = controllers([(Feedback(release=3, lead=0.0), STEADY)])
    state = loops.state()
    let_go = []
    for readout in [1.0, 1.2, 0.2, 1.0, math.nan, 1.0, 1.0, -5.0, -5.0]:
        gains, state = loops.gains(torch.tensor([readout]), torch.tensor([0.9]), state)
        let_go.append(loops.released(state).item())
    assert let_go == [False] * 6 + [True] * 3
    assert gains.item() == 0


def test_without_a_reading_it_pushes_by_the_rise_ahead() -> None:
    loops = controllers([(Feedback(gain=2.0, lead=0.25), STEADY), (Feedback(gain=2.0, lead=0.0), STEADY)])
    gains, _ = loops.gains(torch.full((2,), math.nan), torch.zeros(2), loops.state())
    assert gains.tolist() == pytest.approx([0.5, 0.0])


def test_a_text_that_forms_by_itself_costs_nothing() -> None:
    loops = controllers([(Feedback(lead=0.1), CommitmentProfile((0.0, 0.6, 0.9, 1.0)))])
    state = loops.state()
    for step in range(32):
        ahead = min(1.0, step / 32 + 0.11)
        reading = 1.8 * ahead if ahead < 1 / 3 else 0.3 + 0.9 * ahead if ahead < 2 / 3 else 0.7 + 0.3 * ahead
        gains, state = loops.gains(torch.tensor([reading]), torch.tensor([step / 32]), state)
        assert gains.item() == 0


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"type": "feedback", "gain": 0}, "gain must be a finite number from 1e-06 to 1e\\+06, not 0"),
        ({"type": "feedback", "hold": -1}, "hold must be"),
        ({"type": "feedback", "release": 0}, "release must be an integer from 1"),
        ({"type": "feedback", "release": 1.5}, "release must be an integer"),
        ({"type": "feedback", "lead": 2}, "lead must be a finite number from 0 to 1, not 2"),
        ({"type": "feedback", "rate": 0}, "rate must be"),
        ({"type": "feedback", "peak": math.inf}, "peak must be"),
        ({"type": "feedback", "norm": "kl"}, "has no option 'norm'; allowed: gain, hold, release, lead, rate, peak"),
        ("uniform", "unknown closed-loop schedule 'uniform'; known: feedback"),
    ],
)
def test_what_is_no_controller_is_refused(choice: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_controller(choice)  # type: ignore[arg-type]


def test_it_is_chosen_by_name_and_never_compiled_to_a_table() -> None:
    assert build_controller("feedback") == Feedback()
    assert build_controller({"type": "feedback", "gain": 2}) == replace(Feedback(), gain=2)
    assert hash(Feedback()) == hash(Feedback(gain=4.0))
    with pytest.raises(ValueError, match="schedule 'feedback' is a closed loop"):
        build_strength("feedback")


@pytest.mark.parametrize("curve", [(1.0, 1.0), (0.0, 3.0, -0.1)])
def test_a_curve_that_ends_no_higher_than_it_began_is_refused(curve: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="needs a curve that ends above its start"):
        controllers([(Feedback(), CommitmentProfile(curve))])
    with pytest.raises(ValueError, match="needs a commitment profile"):
        check_target(None)


def test_no_loops_give_no_gains() -> None:
    loops = controllers([])
    gains, state = loops.gains(torch.zeros(0), torch.zeros(0), loops.state())
    assert gains.shape == (0,)
    assert loops.released(state).shape == (0,)
