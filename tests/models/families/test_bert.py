"""The BERT family against transformers, and its contract with sites and padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.models import DiffusionLM
from steerserve.models.families.bert import BertDiffusionLM
from tests import tiny


def published(model: BertDiffusionLM) -> Any:
    """transformers' model of the same tensors."""
    from transformers import BertConfig as PublishedConfig
    from transformers import BertForMaskedLM

    config = model.config
    theirs: Any = BertForMaskedLM(
        PublishedConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
        )
    )
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(".decoder." in name or name.endswith("position_ids") for name in missing)
    with torch.no_grad():
        theirs.cls.predictions.decoder.weight.copy_(theirs.bert.embeddings.word_embeddings.weight)
        theirs.cls.predictions.decoder.bias.copy_(model.state_dict()["cls.predictions.bias"])
    return theirs.eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_those_of_transformers() -> None:
    model = tiny.bert()
    ids = tokens(3, 20)
    torch.testing.assert_close(model.head(model(ids)), published(model)(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_of_padded_rows_are_those_of_transformers() -> None:
    model, ids, lengths = tiny.bert(1), tokens(3, 20), torch.tensor([20, 7, 13])
    inside = torch.arange(20) < lengths[:, None]
    theirs = published(model)(ids, attention_mask=inside.long()).logits
    torch.testing.assert_close(model.head(model(ids, lengths))[inside], theirs[inside], atol=1e-5, rtol=1e-5)


BOTH = pytest.mark.parametrize("model", [tiny.bert(), tiny.llada()], ids=["bert", "llada"])


@BOTH
def test_padding_changes_nothing(model: DiffusionLM) -> None:
    ids, lengths = tokens(3, 40), torch.tensor([40, 7, 16])
    padded = model(ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(ids[row : row + 1, :length])[0]
        torch.testing.assert_close(padded[row, :length], alone, atol=1e-5, rtol=1e-5)


@BOTH
def test_what_stands_in_the_padding_is_never_seen(model: DiffusionLM) -> None:
    ids, lengths = tokens(2, 24), torch.tensor([24, 9])
    other = ids.clone()
    other[1, 9:] = tokens(1, 15, seed=5)[0]
    assert torch.equal(model(ids, lengths)[1, :9], model(other, lengths)[1, :9])


@BOTH
def test_sites_are_called_once_a_layer_in_order(model: DiffusionLM) -> None:
    seen: list[tuple[int, torch.Size]] = []

    def record(layer: int, hidden: Tensor) -> Tensor:
        seen.append((layer, hidden.shape))
        return hidden

    ids = tokens(2, 11)
    plain = model(ids)
    assert torch.equal(model(ids, sites=record), plain)
    assert seen == [(layer, torch.Size((2, 11, tiny.HIDDEN))) for layer in range(model.facts.num_layers)]


@BOTH
def test_a_site_holds_all_that_later_layers_see(model: DiffusionLM) -> None:
    first, second = tokens(1, 12, seed=1), tokens(1, 12, seed=2)
    states: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> Tensor:
        states[layer] = hidden
        return hidden

    want = model(first, sites=keep)
    assert not torch.allclose(model(second), want)
    for layer in range(model.facts.num_layers):
        replaced = model(second, sites=lambda at, hidden, layer=layer: states[layer] if at == layer else hidden)
        assert torch.equal(replaced, want)


def test_what_is_no_text_is_forbidden() -> None:
    facts = tiny.bert().facts
    assert set(facts.forbidden_ids) == {tiny.PAD, tiny.UNK, tiny.CLS, tiny.MASK}
    assert facts.eos_id == tiny.EOS
