"""Canvases along unsteered runs: states that the runs were at, in the slice that their progress says."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from steerserve.calibrate.generation import GeneratedText
from steerserve.calibrate.profile.canvases import canvases_by_slice
from steerserve.errors import SteerserveError
from steerserve.models.base import ModelFacts
from tests import tiny

FACTS = tiny.bert().facts


def samples(count: int, length: int, steps: int) -> list[GeneratedText]:
    random = np.random.default_rng(5)
    made = []
    for _ in range(count):
        committed_at = np.empty(length, dtype=int)
        committed_at[random.permutation(length)] = np.arange(length) * steps // length
        tokens = tuple(random.integers(40, 90, length).tolist())
        made.append(GeneratedText("", tokens, tuple(committed_at.tolist())))
    return made


def states(runs: Sequence[GeneratedText], facts: ModelFacts) -> dict[tuple[int, ...], float]:
    """Every canvas that a run is at before a step, with its progress."""
    start = [] if facts.bos_id is None else [facts.bos_id]
    found = {}
    for one in runs:
        for step in set(one.committed_at):
            pairs = list(zip(one.tokens, one.committed_at, strict=True))
            canvas = [token if at < step else facts.mask_id for token, at in pairs]
            found[(*start, *canvas)] = sum(at < step for _, at in pairs) / len(pairs)
    return found


@pytest.mark.parametrize("steps", [10, 5])
@pytest.mark.parametrize("slices", [10, 4, 64])
def test_canvases_are_those_that_runs_were_at_in_each_slice(steps: int, slices: int) -> None:
    runs = samples(6, 10, steps)
    known = states(runs, FACTS)
    made = canvases_by_slice(runs, FACTS, slices, count=4, positions=3, seed=0)
    assert sorted(made) == sorted({int(progress * slices + 1e-9) for progress in known.values()})
    for place, some in made.items():
        rows = [tuple(row) for row in some.batch.canvas.tolist()]
        # One canvas a run; at the very start all runs are at the same.
        assert len(rows) == 4 and (place == 0 or len(set(rows)) == 4)
        for i, row in enumerate(rows):
            assert int(known[row] * slices + 1e-9) == place
            masked = {j for j, token in enumerate(row) if token == FACTS.mask_id}
            looked = some.position[some.row == i].tolist()
            assert len(looked) == len(set(looked)) == min(3, len(masked)) and set(looked) <= masked


def test_the_first_canvas_is_a_batch_of_its_own() -> None:
    some = canvases_by_slice(samples(6, 10, 10), FACTS, 5, count=3, positions=2, seed=0)[1]
    one = some.first()
    assert torch.equal(one.batch.canvas, some.batch.canvas[:1]) and one.row.tolist() == [0, 0]
    assert one.position.tolist() == some.position[:2].tolist()


def test_runs_that_stopped_short_are_left_out() -> None:
    runs = [*samples(3, 10, 10), GeneratedText("", (50, 51), (0, 1)), GeneratedText("", (), ())]
    made = canvases_by_slice(runs, FACTS, 10, count=5, positions=2, seed=0)
    assert all(some.batch.canvas.shape == (3, 11) for some in made.values())
    with pytest.raises(SteerserveError, match="have no tokens"):
        canvases_by_slice([GeneratedText("", (), ())], FACTS, 10, 5, 2, 0)
