"""Layers at one measured KL, against worlds whose answer is known."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.calibrate.trials.layers import LEAP, LEVEL, ROUNDS, compare, next_strength, site_forwards
from steerserve.calibrate.trials.strength import Setting, Trial, layer_sets


class World:
    """KL = cost * strength ** exponent; the share is one of each layer set's, times the root of the KL."""

    def __init__(self, cost: dict[tuple[int, ...], float], gain: dict[tuple[int, ...], float], exponent: float = 2.0):
        self.cost, self.gain, self.exponent = cost, gain, exponent
        self.calls: list[tuple[int, bool]] = []

    def evaluate(self, settings: Sequence[Setting], fresh: bool) -> list[Trial]:
        self.calls.append((len(settings), fresh))
        return [self.trial(one) for one in settings]

    def trial(self, one: Setting) -> Trial:
        kl = self.cost[one.layers] * one.strength**self.exponent
        share = min(1.0, self.gain[one.layers] * kl**0.5)
        return Trial(one, 8, share, share, 1 + 0.01 * one.strength, 1.0, True, kl)


@given(
    st.lists(st.floats(0.02, 8), min_size=4, max_size=4),
    st.lists(st.floats(0.1, 1), min_size=4, max_size=4, unique=True),
    st.floats(1.2, 2.6),
)
def test_every_set_is_brought_to_one_kl_and_the_largest_share_wins(
    costs: list[float], gains: list[float], exponent: float
) -> None:
    sets = layer_sets([2, 3, 4])
    gain = dict(zip(sets, gains, strict=True))
    world = World(dict(zip(sets, costs, strict=True)), gain, exponent)
    told = compare(sets, 0.3, 0.6, world.evaluate, enough=2.0)
    assert told.note is None and [trial.setting.layers for trial in told.reached] == sets
    for trial in told.reached:
        assert trial.kl is not None and abs(trial.kl / 0.3 - 1) < 0.1001
    # KLs that differ by a tenth may swap sets that are as near.
    assert gain[told.layers] > 0.9 * max(gains)


def test_the_stated_cost_is_not_exceeded_and_sets_that_are_there_are_not_run_again() -> None:
    sets = layer_sets([1, 2])
    world = World({(1,): 0.3, (2,): 5.0, (1, 2): 9.0}, dict.fromkeys(sets, 0.5), 1.4)
    compare(sets, 0.3, 1.0, world.evaluate, enough=2.0)
    assert world.calls[0] == (3, False) and world.calls[1] == (2, False) and world.calls[-1] == (3, True)
    recipe = CalibrationRecipe(search_texts=5, confirm_texts=7, trial_steps=11)
    texts = sum(count * (7 if fresh else 5) for count, fresh in world.calls)
    assert 2 * texts * 11 <= site_forwards(3, recipe) == 2 * 3 * (ROUNDS * 5 + 7) * 11


def test_a_set_that_another_kl_flatters_is_not_chosen() -> None:
    sets = layer_sets([1, 2])
    world = World(dict.fromkeys(sets, 1.0), {(1,): 0.5, (2,): 0.4, (1, 2): 0.3})

    def evaluate(settings: Sequence[Setting], fresh: bool) -> list[Trial]:
        # On fresh texts the last set costs, and reaches, far more than where its strength was found.
        return [
            Trial(trial.setting, 8, 0.9, 0.9, 1.0, 1.0, True, 0.3 * (1 + 2 * LEVEL))
            if fresh and trial.setting.layers == (1, 2)
            else trial
            for trial in world.evaluate(settings, fresh)
        ]

    told = compare(sets, 0.3, 0.5, evaluate, enough=2.0)
    assert told.layers == (1,)
    raw = told.to_json()
    assert [row["level"] for row in raw["reached"]] == [True, True, False] and raw["chosen"] == [1]
    lines = told.table("a/x").splitlines()
    assert len(lines) == 5 and lines[2].endswith("chosen") and lines[4].endswith("another KL")


def test_pushes_that_do_nothing_are_compared_as_they_are_and_a_note_says_so() -> None:
    sets = layer_sets([1, 2])
    told = compare(sets, 0.3, 0.5, World(dict.fromkeys(sets, 0.0), dict.fromkeys(sets, 0.5)).evaluate, enough=0.9)
    assert told.note is not None and "compared as they are" in told.table("a/x")
    assert {trial.setting.strength for trial in told.reached} == {0.5 * LEAP**ROUNDS}


def test_a_strength_follows_the_power_law_of_the_last_two() -> None:
    assert next_strength([(1.0, 0.1)], 0.4) == 2.0
    assert next_strength([(1.0, 0.1), (2.0, 0.2)], 0.4) == 4.0
    assert next_strength([(1.0, 0.4)], 0.41) == 1.0
    assert next_strength([(1.0, 100.0)], 0.01) == 1 / LEAP
