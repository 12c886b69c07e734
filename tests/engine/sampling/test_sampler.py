"""Candidates against plain softmax arithmetic in float64, and draws against the distribution they are to follow."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.forward import head
from steerserve.engine.sampling import sampler
from steerserve.engine.sampling.sampler import Draw, Settings, alternatives, draw
from steerserve.models import DiffusionLM
from tests import tiny

EVERYTHING = frozenset(
    {
        "probability", "margin", "entropy", "mass",
        "filtered_probability", "filtered_margin", "filtered_entropy",
    }
)  # fmt: skip


def hidden(count: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(count, tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))


def settings(count: int, temperature: float = 1.0, top_p: float = 1.0, no_eos: bool = False, seed: int = 0) -> Settings:
    position = torch.arange(count)
    zero = torch.zeros_like(position)
    return Settings(
        torch.full((count,), temperature),
        torch.full((count,), top_p),
        torch.zeros_like(position),
        torch.full((count,), 2 * no_eos),
        torch.zeros(count, dtype=torch.bool),
        torch.zeros(count),
        noise.keys(zero + seed, zero, zero, position, noise.TOKEN),
    )


def distribution(model: DiffusionLM, states: Tensor, no_eos: bool = False) -> Tensor:
    """softmax(logits) [N, vocabulary] in float64 over the tokens that may be drawn."""
    logits = model.head(states).double()
    banned = [*model.facts.forbidden_ids, *(model.facts.end_ids if no_eos else ())]
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
    for i, p in enumerate(distribution(model, states)):
        best = sorted(p.tolist(), reverse=True)
        entropy = -sum(q * math.log(q) for q in p.tolist() if q > 0)
        assert float(drawn.probability[i]) == pytest.approx(float(p[drawn.token[i]]), rel=1e-5)
        assert float(drawn.measures["margin"][i]) == pytest.approx(best[0] - best[1], abs=2e-6)
        assert float(drawn.measures["entropy"][i]) == pytest.approx(entropy, abs=2e-5)


def test_what_is_not_needed_is_not_computed() -> None:
    drawn = draw(tiny.bert(), hidden(5), settings(5), frozenset())
    assert drawn.measures == {}


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
    assert float(drawn.measures["entropy"].abs().max()) == 0.0


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
    mixed = replace(mixed, no_eos=2 * (torch.arange(6000) % 2 == 0))
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
    assert one.measures.keys() == other.measures.keys()
    pairs = [(one.token, other.token), (one.probability, other.probability)]
    pairs += [(one.measures[name], other.measures[name]) for name in one.measures]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("needs", [frozenset[str](), EVERYTHING])
def test_borders_of_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, needs: frozenset[str]) -> None:
    model, states, chosen = tiny.bert(), hidden(70), settings(70, 0.8, 0.9)
    whole = draw(model, states, chosen, needs)
    for tiles in (1, 2, 3):
        monkeypatch.setattr(head, "BLOCK_BYTES", 4 * tiny.VOCAB * 16 * tiles)
        parts = draw(model, states, chosen, needs)
        assert same(parts, whole)


@pytest.mark.parametrize("count", [0, 1, 16, 70])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_borders_of_blocks_change_no_alternatives(monkeypatch: pytest.MonkeyPatch, guidance: float, count: int) -> None:
    model, states = tiny.llada(), hidden(count)
    chosen = replace(settings(count, no_eos=True), guidance=torch.full((count,), guidance))
    unguided = hidden(count, seed=1) if guidance else None
    whole = alternatives(model, states, chosen, 5, unguided)
    assert [one.shape for one in whole] == [(count, 5), (count, 5)]
    for tiles in (1, 2, 3):
        monkeypatch.setattr(head, "BLOCK_BYTES", 4 * tiny.VOCAB * 16 * tiles)
        parts = alternatives(model, states, chosen, 5, unguided)
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_a_candidate_is_the_same_alone_and_among_others() -> None:
    model, states, chosen = tiny.bert(), hidden(40), settings(40, 0.8, 0.9)
    together = draw(model, states, chosen, EVERYTHING)
    for i in range(0, 40, 7):
        alone = draw(model, states[i : i + 1], chosen[i : i + 1], EVERYTHING)
        one = slice(i, i + 1)
        measures = {name: values[one] for name, values in together.measures.items()}
        mine = Draw(together.token[one], together.probability[one], measures)
        assert same(alone, mine)


def test_no_candidates_are_no_trouble() -> None:
    drawn = draw(tiny.bert(), hidden(1)[:0], settings(1)[:0], EVERYTHING)
    assert drawn.token.shape == (0,)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.0, 0.7, 0), (0.6, 0.8, 0), (2.0, 1.0, 5), (0.9, 0.9, 3)]
)
def test_filtered_measures_are_those_of_the_distribution_drawn_from(
    temperature: float, top_p: float, top_k: int
) -> None:
    model, states = tiny.llada(), hidden(60)
    chosen = replace(settings(60, temperature, top_p), top_k=torch.full((60,), top_k))
    drawn = draw(model, states, chosen, EVERYTHING)
    for i, logits in enumerate(model.head(states).double()):
        p = (logits / (temperature or 1.0)).softmax(0).tolist()
        kept = nucleus(p, top_p)
        kept = set(sorted(kept, key=lambda token: -p[token])[: top_k or None])
        mass = sum(p[token] for token in kept)
        cut = {token: p[token] / mass for token in kept}
        best = [*sorted(cut.values(), reverse=True), 0.0]
        assert int(drawn.token[i]) in cut
        measured = {name: float(values[i]) for name, values in drawn.measures.items()}
        assert measured["filtered_probability"] == pytest.approx(cut[int(drawn.token[i])], rel=1e-4)
        assert measured["filtered_margin"] == pytest.approx(best[0] - best[1], abs=1e-5)
        assert measured["filtered_entropy"] == pytest.approx(-sum(q * math.log(q) for q in cut.values()), abs=1e-4)
        assert measured["mass"] == pytest.approx(float(logits.logsumexp(0)), abs=1e-4)


def test_guidance_moves_the_logits_away_from_those_without_the_prompt() -> None:
    model, states, without = tiny.llada(), hidden(40), hidden(40, seed=1)
    scale = torch.arange(40) % 3 * 0.7
    drawn = draw(model, states, replace(settings(40, 0.0), guidance=scale), EVERYTHING, without)
    given, plain = model.head(states).double(), model.head(without).double()
    guided = torch.where(scale[:, None] > 0, plain + (scale[:, None].double() + 1) * (given - plain), given)
    assert torch.equal(drawn.token, guided.argmax(1))
    expected = guided.softmax(1).gather(1, drawn.token[:, None])[:, 0]
    torch.testing.assert_close(drawn.probability, expected, rtol=1e-4, atol=1e-6)


def test_ends_that_come_last_have_no_probability_for_the_order_and_leave_theirs_to_the_others() -> None:
    model, states = tiny.llada(), hidden(400)
    chosen = replace(settings(400, 3.0, seed=3), ends_last=torch.arange(400) < 300)
    drawn = draw(model, states, chosen, frozenset({"probability"}))
    logits = model.head(states).double()
    plain = logits.softmax(1).gather(1, drawn.token[:, None])[:, 0]
    torch.testing.assert_close(drawn.probability, plain, rtol=1e-4, atol=1e-9)
    logits[:300, model.facts.eos_id] = -math.inf
    seen = logits.softmax(1).gather(1, drawn.token[:, None])[:, 0]
    assert tiny.EOS in drawn.token[:300]
    torch.testing.assert_close(drawn.measures["probability"], seen, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("first", [1, 4, 30])
def test_a_nucleus_is_the_same_however_many_tokens_are_looked_at_first(
    monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    model, states = tiny.bert(), hidden(60)
    chosen = replace(settings(60, 0.9), top_p=torch.linspace(0.05, 1, 60))
    whole = draw(model, states, chosen, EVERYTHING)
    monkeypatch.setattr(sampler, "_NUCLEUS", first)
    assert same(draw(model, states, chosen, EVERYTHING), whole)


def test_dreams_entropy_has_dreams_constant() -> None:
    """It adds 1e-10 to each probability, which where a model is all but sure is as much as what is measured."""
    model = tiny.dream(2)
    states = 12 * torch.randn(64, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    drawn = draw(model, states, settings(64, 0.0), frozenset({"filtered_entropy", "entropy"}))
    p = model.head(states).softmax(1)
    assert torch.equal(drawn.measures["filtered_entropy"], -(p * (p + 1e-10).log()).sum(1).double())
    exact = model.head(states).double().softmax(1)
    assert torch.allclose(drawn.measures["entropy"], -torch.special.xlogy(exact, exact).sum(1), rtol=1e-3, atol=1e-7)
    assert not torch.equal(drawn.measures["filtered_entropy"], drawn.measures["entropy"])
