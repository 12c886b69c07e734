"""A forward that is asked for some positions gives their states bit for bit, and nothing of the last layer beside."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steerserve.models import DiffusionLM
from tests import tiny

FAMILIES = pytest.mark.parametrize("build", [tiny.bert, tiny.llada, tiny.llada2, tiny.dream, tiny.mdlm, tiny.sedd])


class Layers:
    """Notes the layers at whose outputs it is called."""

    def __init__(self) -> None:
        self.called: list[int] = []

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        self.called.append(layer)
        return hidden * 1.01


@FAMILIES
@pytest.mark.parametrize(("rows", "width", "count"), [(1, 20, 16), (3, 52, 16), (2, 64, 48)])
@torch.inference_mode()
def test_states_are_those_of_the_whole_forward(
    build: Callable[[], DiffusionLM], rows: int, width: int, count: int
) -> None:
    model, generator = build(), torch.Generator().manual_seed(width)
    tokens = torch.randint(5, tiny.VOCAB, (rows, width), generator=generator)
    lengths = torch.arange(width, width - 5 * rows, -5)
    sigma = torch.rand(rows, generator=generator) + 0.1
    at = torch.stack([torch.randperm(width, generator=generator)[:count] for _ in range(rows)])
    whole = model(tokens, lengths, None, sigma)
    got = model(tokens, lengths, None, sigma, at)
    assert torch.equal(got, whole.gather(1, at[:, :, None].expand_as(got)))


@FAMILIES
@torch.inference_mode()
def test_only_the_last_layers_site_is_left_out(build: Callable[[], DiffusionLM]) -> None:
    model, sites = build(), Layers()
    tokens, sigma = torch.full((1, 32), 7), torch.ones(1)
    model(tokens, None, sites, sigma, torch.arange(16)[None])
    assert sites.called == list(range(model.facts.num_layers - 1))
