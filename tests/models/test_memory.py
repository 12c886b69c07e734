"""A forward that resumes from keys and values: whole it is the plain one, in part it is that of the same states."""

import pytest
import torch

from steerserve.models import DiffusionLM
from steerserve.models.memory import Memory, new_store
from tests import tiny

FAMILIES = pytest.mark.parametrize("family", ["llada", "dream", "bert"])


def filled(model: DiffusionLM, tokens: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States of whole canvases, and the store that their forward has filled."""
    facts = model.facts
    assert facts.keys is not None
    rows, width = tokens.shape
    store = new_store(facts.num_layers, rows, facts.keys, width, tokens.device, torch.float32)
    memory = Memory(store, torch.arange(rows), torch.arange(width).expand(rows, -1), None)
    return model.resume(tokens, memory, lengths), store


@FAMILIES
def test_of_whole_canvases_it_is_the_plain_forward(family: str) -> None:
    model: DiffusionLM = getattr(tiny, family)()
    tokens = torch.randint(5, tiny.VOCAB, (3, 32), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([32, 20, 7])
    states, _ = filled(model, tokens, lengths)
    assert torch.equal(states, model(tokens, lengths))


@FAMILIES
def test_of_a_part_it_is_the_plain_forward_while_nothing_has_changed(family: str) -> None:
    model: DiffusionLM = getattr(tiny, family)()
    tokens = torch.randint(5, tiny.VOCAB, (3, 32), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([32, 20, 30])
    states, store = filled(model, tokens, lengths)
    kept = store.clone()
    rows = torch.tensor([2, 1])
    position = torch.stack([torch.arange(16) + 12, (torch.arange(16) + 3) * (torch.arange(16) < 9)])
    there = torch.ones(2, 16, dtype=torch.bool)
    there[1, 9:] = False
    row, place = there.nonzero().unbind(1)
    memory = Memory(store, rows, position, (row, place))
    part = model.resume(tokens[rows].gather(1, position), memory, lengths[rows])
    torch.testing.assert_close(part[row, place], states[rows[row], position[row, place]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(store, kept, rtol=1e-4, atol=1e-5)


@FAMILIES
def test_it_keeps_what_it_makes_and_leaves_what_it_does_not(family: str) -> None:
    model: DiffusionLM = getattr(tiny, family)()
    tokens = torch.randint(5, tiny.VOCAB, (2, 16), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([16, 16])
    _, store = filled(model, tokens, lengths)
    kept = store.clone()
    changed = tokens.clone()
    changed[1, 4:8] = 5
    position = torch.zeros(1, 16, dtype=torch.int64)
    position[0, :4] = torch.arange(4, 8)
    memory = Memory(store, torch.tensor([1]), position, (torch.zeros(4, dtype=torch.int64), torch.arange(4)))
    model.resume(changed[1:].gather(1, position), memory, lengths[1:])
    same = (store == kept).all(dim=(0, 1, 3, 5))
    assert same.tolist() == [[True] * 16, [True] * 4 + [False] * 4 + [True] * 8]


def test_other_families_do_not_resume() -> None:
    model = tiny.mdlm()
    assert model.facts.keys is None
    store = new_store(1, 1, (1, 1), 16, torch.device("cpu"), torch.float32)
    with pytest.raises(NotImplementedError):
        model.resume(
            torch.zeros(1, 16, dtype=torch.int64),
            Memory(store, torch.tensor([0]), torch.zeros(1, 16, dtype=torch.int64), None),
        )
