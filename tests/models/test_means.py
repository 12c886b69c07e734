"""Mean states of many texts at once against one text at a time, for every family."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steerserve.models import DiffusionLM
from steerserve.models.means import ROWS, mean_states
from tests import tiny

FAMILIES: dict[str, Callable[[], DiffusionLM]] = {
    "bert": tiny.bert,
    "llada": tiny.llada,
    "dream": tiny.dream,
    "mdlm": tiny.mdlm,
    "mdlm-timed": lambda: tiny.mdlm(time_conditioning=True),
    "sedd": tiny.sedd,
}
LENGTHS = [7, 1, 0, 12, 3, 3, 30, 5]


def texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, tiny.VOCAB - 2, (length,), generator=generator).tolist() for length in lengths]


def plain(model: DiffusionLM, ids: list[int], layer: int) -> Tensor:
    """The mean of one text's states, from a whole forward of it alone."""
    kept: list[Tensor] = []

    def keep(at: int, hidden: Tensor) -> Tensor:
        if at == layer:
            kept.append(hidden)
        return hidden

    if not ids:
        return torch.zeros(tiny.HIDDEN)
    start = [] if model.facts.bos_id is None else [model.facts.bos_id]
    row = start + ids
    sigma = None if model.facts.sigma is None else model.facts.sigma.total(torch.zeros(1)).float()
    with torch.no_grad():
        model(torch.tensor([row]), torch.tensor([len(row)]), keep, sigma)
    return kept[0][0, len(start) :].float().mean(0)


def test_the_families_are_of_every_kind() -> None:
    facts = [make().facts for make in FAMILIES.values()]
    assert {one.sigma is None for one in facts} == {one.bos_id is None for one in facts} == {True, False}


@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_those_of_one_text_at_a_time(family: str) -> None:
    model, read = FAMILIES[family](), texts(LENGTHS)
    found = mean_states(model, read, [0, 2])
    assert sorted(found) == [0, 2]
    for layer, means in found.items():
        assert means.shape == (len(read), tiny.HIDDEN) and means.dtype == torch.float32
        expected = torch.stack([plain(model, ids, layer) for ids in read])
        torch.testing.assert_close(means, expected, rtol=1e-4, atol=1e-4)


def test_more_texts_than_rows_of_a_forward_keep_their_order() -> None:
    model, read = tiny.bert(), texts([1 + 5 * i % 13 for i in range(2 * ROWS + 3)])
    expected = torch.stack([plain(model, ids, 1) for ids in read])
    torch.testing.assert_close(mean_states(model, read, [1])[1], expected, rtol=1e-4, atol=1e-4)


def test_a_text_without_tokens_is_zero() -> None:
    assert mean_states(tiny.bert(), [[]], [2])[2].abs().sum() == 0
    assert mean_states(tiny.bert(), [], [2])[2].shape == (0, tiny.HIDDEN)


@pytest.mark.parametrize("family", ["bert", "dream"])
def test_of_a_long_text_what_the_canvas_holds_is_read(family: str) -> None:
    model = FAMILIES[family]()
    [long] = texts([tiny.CONTEXT + 20])
    room = model.facts.max_length - (model.facts.bos_id is not None)
    cut, whole = (mean_states(model, [ids], [2])[2] for ids in (long[:room], long))
    assert torch.equal(cut, whole)
    torch.testing.assert_close(whole[0], plain(model, long[:room], 2), rtol=1e-4, atol=1e-4)


def test_no_layer_is_no_forward() -> None:
    assert mean_states(tiny.bert(), texts([3]), []) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_of_a_text_has_the_same_bits_beside_any_others(family: str) -> None:
    model, [one] = FAMILIES[family](), texts([5])
    alone = mean_states(model, [one], [1])[1][0]
    for length in (1, 11, 12, 17, 40):
        for count in (1, 5):
            beside = mean_states(model, [one, *texts([length] * count)], [1])[1][0]
            assert torch.equal(beside, alone)
