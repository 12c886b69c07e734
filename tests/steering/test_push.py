import torch

from steerserve.steering.push import GainOverride


def test_a_dial_leaves_its_table_alone_until_it_is_set() -> None:
    table = torch.tensor(0.25)
    assert GainOverride().turn(table) is table


def test_a_dial_stands_in_for_its_table_and_lets_go() -> None:
    table = torch.tensor(0.25)
    override = GainOverride(gain=2.0)
    assert override.turn(table).item() == 2.0
    override.held = False
    assert override.turn(table).item() == 0.0
    override.gain = None
    assert override.turn(table).item() == 0.0
