"""The search for layers and strength, against worlds whose answer is known."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from steerserve.calibrate.trials.strength import Setting, Trial, layer_sets, search

GRID = (0.1, 0.2, 0.3, 0.45, 0.6, 0.9, 1.3)


class World:
    """Share rises with strength times a layer set's power; loss rises past a limit of each layer set."""

    def __init__(self, power: dict[tuple[int, ...], float], limit: dict[tuple[int, ...], float]) -> None:
        self.power, self.limit = power, limit
        self.calls: list[tuple[int, bool]] = []

    def evaluate(self, settings: Sequence[Setting], fresh: bool) -> list[Trial]:
        self.calls.append((len(settings), fresh))
        found = []
        for one in settings:
            share = min(1.0, one.strength * self.power[one.layers])
            loss = 1.0 + max(0.0, one.strength - self.limit[one.layers])
            found.append(Trial(one, 24, share, share, loss, 1.0, loss <= 1.0))
        return found


@given(st.lists(st.floats(0, 1.5), min_size=3, max_size=3), st.lists(st.floats(0.1, 0.7), min_size=3, max_size=3))
def test_the_strongest_within_bounds_is_found(limits: list[float], powers: list[float]) -> None:
    sets = layer_sets([2, 4])
    world = World(dict(zip(sets, powers, strict=True)), dict(zip(sets, limits, strict=True)))
    choice = search(sets, GRID, world.evaluate, enough=2.0)
    within = [Setting(one, strength) for one in sets for strength in GRID if strength <= world.limit[one]]
    if within:
        best = max(within, key=lambda one: one.strength * world.power[one.layers])
        assert choice.setting.strength * world.power[choice.setting.layers] == best.strength * world.power[best.layers]
        assert choice.note is None
    else:
        assert choice.setting.strength == GRID[0] and "lowest loss" in (choice.note or "")


def test_seven_strengths_take_three_rounds_and_a_confirmation() -> None:
    sets = layer_sets([1, 3, 5])
    assert sets == [(1,), (3,), (5,), (1, 3, 5)]
    world = World(dict.fromkeys(sets, 0.5), dict.fromkeys(sets, 0.5))
    choice = search(sets, GRID, world.evaluate, enough=2.0)
    assert world.calls == [(4, False), (4, False), (4, False), (3, True)]
    assert len(choice.searched) == 12 and len(choice.confirmed) == 3
    assert choice.setting.strength == 0.45


def test_one_layer_is_one_set() -> None:
    assert layer_sets([3]) == [(3,)]


def test_luck_in_the_search_is_corrected_by_the_confirmation() -> None:
    def evaluate(settings: Sequence[Setting], fresh: bool) -> list[Trial]:
        lucky = {(1,): 0.9, (2,): 0.5, (1, 2): 0.4}
        true = {(1,): 0.3, (2,): 0.5, (1, 2): 0.4}
        return [Trial(one, 24, (true if fresh else lucky)[one.layers], 0.0, 1.0, 1.0, True) for one in settings]

    assert search(layer_sets([1, 2]), (0.3,), evaluate, enough=2.0).setting.layers == (2,)


def test_the_weakest_push_that_is_enough_is_preferred_to_a_stronger_one() -> None:
    sets = layer_sets([1, 3])
    world = World({(1,): 1.0, (3,): 2.0, (1, 3): 4.0}, {(1,): 0.5, (3,): 0.3, (1, 3): 0.25})
    choice = search(sets, GRID, world.evaluate, enough=0.8)
    assert choice.setting == Setting((1, 3), 0.2)
    assert choice.note is None
