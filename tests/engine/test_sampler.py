"""Candidates against plain softmax arithmetic in float64, and draws against the distribution they are to follow."""

import math

import pytest
import torch
from torch import Tensor

from steerserve.engine import noise, sampler
from steerserve.engine.sampler import Draw, Settings, draw
from steerserve.models import DiffusionLM
from tests import tiny

EVERYTHING = frozenset({"margin", "entropy"})


def hidden(count: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(count, tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))


def settings(count: int, temperature: float = 1.0, top_p: float = 1.0, no_eos: bool = False, seed: int = 0) -> Settings:
    position = torch.arange(count)
    zero = torch.zeros_like(position)
    return Settings(
        torch.full((count,), temperature),
        torch.full((count,), top_p),
        torch.full((count,), no_eos),
        noise.keys(zero + seed, zero, zero, position, noise.TOKEN),
    )


def distribution(model: DiffusionLM, states: Tensor, no_eos: bool = False) -> Tensor:
    """softmax(logits) [N, vocabulary] in float64 over the tokens that may be drawn."""
    logits = model.head(states).double()
    banned = [*model.facts.forbidden_ids, *([model.facts.eos_id] if no_eos else [])]
    logits[:, banned] = -math.inf
    return logits.softmax(dim=1)


def test_temperature_zero_is_the_likeliest_token_that_is_allowed() -> None:
    model, states = tiny.bert(), hidden(50)
    for no_eos in (False, True):
        drawn = draw(model, states, settings(50, 0.0, no_eos=no_eos), frozenset())
        assert torch.equal(drawn.token, distribution(model, states, no_eos).argmax(dim=1))


@pytest.mark.parametrize("temperature", [1e-38, 1e-30, 1e-6])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_close_to_zero_is_the_argmax(temperature: float, top_p: float) -> None:
    model, states = tiny.bert(), hidden(50)
    drawn = draw(model, states, settings(50, temperature, top_p), frozenset())
    assert torch.equal(drawn.token, distribution(model, states).argmax(dim=1))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("model", [tiny.bert(), tiny.llada()], ids=["bert", "llada"])
def test_probability_margin_and_entropy_are_those_of_the_softmax(model: DiffusionLM, temperature: float) -> None:
    states = hidden(80)
    drawn = draw(model, states, settings(80, temperature, 0.9), EVERYTHING)
    assert drawn.margin is not None
    assert drawn.entropy is not None
    for i, p in enumerate(distribution(model, states)):
        best = sorted(p.tolist(), reverse=True)
        entropy = -sum(q * math.log(q) for q in p.tolist() if q > 0)
        assert float(drawn.probability[i]) == pytest.approx(float(p[drawn.token[i]]), rel=1e-5)
        assert float(drawn.margin[i]) == pytest.approx(best[0] - best[1], abs=2e-6)
        assert float(drawn.entropy[i]) == pytest.approx(entropy, abs=2e-5)


def test_what_is_not_needed_is_not_computed() -> None:
    drawn = draw(tiny.bert(), hidden(5), settings(5), frozenset())
    assert drawn.margin is None
    assert drawn.entropy is None


def test_near_certain_positions_are_still_told_apart() -> None:
    """In float32 all of these probabilities are 1; in float64, and here, they are not."""
    model, states = tiny.llada(), hidden(400, scale=12.0)
    exact = distribution(model, states).max(dim=1).values
    sure = (exact.float() == 1) & (exact < 1 - 1e-12)
    assert int(sure.sum()) > 10
    drawn = draw(model, states[sure], settings(int(sure.sum()), 0.0), frozenset())
    # logits near 40 are themselves known to 4e-6 in float32; the rest of the mass follows at that precision.
    torch.testing.assert_close(1 - drawn.probability, 1 - exact[sure], rtol=1e-3, atol=1e-16)
    assert torch.equal(drawn.probability.argsort(), exact[sure].argsort())


def test_a_token_without_a_rival_has_probability_one() -> None:
    model, states = tiny.llada(), hidden(30, scale=1e5)
    drawn = draw(model, states, settings(30, 1.0), EVERYTHING)
    assert torch.isfinite(drawn.probability).all()
    assert float(drawn.probability.min()) == 1.0
    assert drawn.entropy is not None
    assert float(drawn.entropy.abs().max()) == 0.0


def test_forbidden_tokens_are_never_drawn() -> None:
    model, states = tiny.bert(), hidden(4000)
    drawn = draw(model, states, settings(4000, 10.0), frozenset())
    seen = set(drawn.token.tolist())
    assert not seen & set(model.facts.forbidden_ids)
    assert tiny.EOS in seen
    assert len(seen) > 80


def test_ignore_eos_is_a_rule_of_its_own_row() -> None:
    model, states = tiny.bert(), hidden(1, seed=1).expand(6000, -1)
    mixed = settings(6000, 10.0)
    mixed = Settings(mixed.temperature, mixed.top_p, torch.arange(6000) % 2 == 0, mixed.key)
    drawn = draw(model, states, mixed, frozenset())
    assert tiny.EOS not in drawn.token[::2]
    assert tiny.EOS in drawn.token[1::2]


def nucleus(p: list[float], top_p: float) -> set[int]:
    """The smallest set of likeliest tokens whose mass is at least top_p."""
    kept, mass = set(), 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= top_p:
            break
        kept.add(token)
        mass += p[token]
    return kept


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.6), (0.7, 0.9), (1.0, 1e-9)])
def test_draws_follow_the_softmax_cut_to_its_nucleus(temperature: float, top_p: float) -> None:
    model, count = tiny.bert(2), 20_000
    state = hidden(1, seed=3)
    logits = model.head(state).double()[0]
    logits[list(model.facts.forbidden_ids)] = -math.inf
    p = (logits / temperature).softmax(dim=0).tolist()
    kept = nucleus(p, top_p)
    drawn = draw(model, state.expand(count, -1), settings(count, temperature, top_p, seed=11), frozenset())
    counts = torch.bincount(drawn.token, minlength=tiny.VOCAB).tolist()
    assert {token for token, n in enumerate(counts) if n} <= kept
    mass = sum(p[token] for token in kept)
    # Rare tokens share one bin, so that every bin has enough for the chi-square.
    bins: list[tuple[float, int]] = []
    rare, rare_seen = 0.0, 0
    for token in kept:
        expected = count * p[token] / mass
        if expected >= 10:
            bins.append((expected, counts[token]))
        else:
            rare, rare_seen = rare + expected, rare_seen + counts[token]
    if rare >= 10:
        bins.append((rare, rare_seen))
    chi = sum((seen - expected) ** 2 / expected for expected, seen in bins)
    freedom = len(bins) - 1
    assert chi <= freedom + 4 * math.sqrt(2 * freedom) + 1e-9


def same(one: Draw, other: Draw) -> bool:
    pairs = [(one.token, other.token), (one.probability, other.probability)]
    pairs += [
        (a, b) for a, b in ((one.margin, other.margin), (one.entropy, other.entropy)) if a is not None and b is not None
    ]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("needs", [frozenset[str](), EVERYTHING])
def test_borders_of_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, needs: frozenset[str]) -> None:
    model, states, chosen = tiny.bert(), hidden(70), settings(70, 0.8, 0.9)
    whole = draw(model, states, chosen, needs)
    for tiles in (1, 2, 3):
        monkeypatch.setattr(sampler, "_CHUNK_BYTES", 4 * tiny.VOCAB * 16 * tiles)
        parts = draw(model, states, chosen, needs)
        assert same(parts, whole)
        assert (parts.margin is None) == (whole.margin is None)


def test_a_candidate_is_the_same_alone_and_among_others() -> None:
    model, states, chosen = tiny.bert(), hidden(40), settings(40, 0.8, 0.9)
    together = draw(model, states, chosen, EVERYTHING)
    for i in range(0, 40, 7):
        alone = draw(model, states[i : i + 1], chosen[i : i + 1], EVERYTHING)
        assert together.margin is not None
        assert together.entropy is not None
        one = slice(i, i + 1)
        mine = Draw(together.token[one], together.probability[one], together.margin[one], together.entropy[one])
        assert same(alone, mine)


def test_no_candidates_are_no_trouble() -> None:
    drawn = draw(tiny.bert(), hidden(1)[:0], settings(1)[:0], EVERYTHING)
    assert drawn.token.shape == (0,)
