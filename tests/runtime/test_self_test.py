"""The start-up self-test finds a model on which steering does not take, or takes on the wrong row."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from steerserve.errors import SelfTestError
from steerserve.models import DiffusionLM, ModelFacts, Sites
from steerserve.models.families.bert import BertDiffusionLM
from steerserve.runtime.self_test import check_steering
from tests import tiny


class Deaf(BertDiffusionLM):
    """Ignores its sites at the last layer."""

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,
        sigma: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        last = self.facts.num_layers - 1

        def partly(layer: int, hidden: Tensor) -> Tensor:
            return hidden if sites is None or layer == last else sites(layer, hidden)

        return super().forward(tokens, lengths, partly, sigma, at)


class Leaky(BertDiffusionLM):
    """Lets a trace of each row into the row before it."""

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,
        sigma: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        hidden = super().forward(tokens, lengths, sites, sigma, at)
        return hidden + 1e-3 * hidden.roll(-1, dims=0)


class Broken(BertDiffusionLM):
    """Its logits are not numbers."""

    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden) * torch.nan


def made(kind: type[BertDiffusionLM]) -> BertDiffusionLM:
    model = kind(tiny.BERT)
    tiny.randomise(model, 0)
    return model


@pytest.mark.parametrize("model", [tiny.bert(), tiny.llada()], ids=["bert", "llada"])
def test_a_sound_model_passes(tmp_path: Path, model: DiffusionLM) -> None:
    served = tiny.engine(model, tmp_path)
    check_steering(served)
    assert not served.waiting
    assert not served.running


def test_the_smallest_limits_pass(tmp_path: Path) -> None:
    check_steering(tiny.engine(tiny.bert(), tmp_path, max_steps=1, max_rows=1, max_queue=1, max_interventions=1))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Deaf, "layer 2 did not move the logits"),
        (Leaky, "layer 0 changed the row beside it"),
        (Broken, "not finite"),
    ],
)
def test_an_unsound_model_is_refused(tmp_path: Path, kind: type[BertDiffusionLM], said: str) -> None:
    with pytest.raises(SelfTestError, match=said):
        check_steering(tiny.engine(made(kind), tmp_path))


class Silent(BertDiffusionLM):
    """Never calls a site."""

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,  # noqa: ARG002
        sigma: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        return super().forward(tokens, lengths, None, sigma, at)


def test_a_model_without_sites_is_refused(tmp_path: Path) -> None:
    assert isinstance(made(Silent).facts, ModelFacts)
    with pytest.raises(SelfTestError, match="layer 0 did not move the logits"):
        check_steering(tiny.engine(made(Silent), tmp_path))
