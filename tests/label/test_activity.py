"""What is counted of features on noised texts, against plain loops over tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from steerserve.label.activity import HELD, STRONGEST, FeatureActivity, Places, read_batch
from steerserve.label.contexts import borders, kept_contexts
from steerserve.label.texts import ReadTexts, read_texts
from steerserve.label.words import Surfaces, WordTable, word_table
from steerserve.saes.feature_record import BINS, bin_edge
from tests import tiny
from tests.conftest import SENTENCES

RATIOS = (0.25, 0.75)


@pytest.fixture(scope="module")
def texts() -> ReadTexts:
    return read_texts(SENTENCES[:24], tiny.tokenizer(), tiny.bert().facts, RATIOS, 24, seed=3, batch_tokens=200)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("policy", ["mask", "visible", None])
def test_counts_and_places_are_those_of_a_loop(texts: ReadTexts, policy: str | None, shift: int) -> None:
    model, sae = tiny.bert(), tiny.sae(1, policy=policy)
    model.facts = replace(model.facts, shift=shift)
    found = {"one": FeatureActivity(tiny.FEATURES, len(RATIOS))}
    for number in range(len(texts.batches)):
        read_batch(model, {"one": sae}, texts, number, found, seed=0)
    fired, seen = np.zeros((2, tiny.FEATURES)), np.zeros(2)
    values: dict[int, list[tuple[float, int, int]]] = {feature: [] for feature in range(tiny.FEATURES)}
    place = row = 0
    for batch in texts.batches:
        for canvas, length, text, masked in zip(batch.canvas, batch.lengths, batch.text, batch.masked, strict=True):
            kept: list[torch.Tensor] = []
            model(canvas[None], length[None], lambda at, h, kept=kept: (kept.append(h[0]) if at == 1 else None, h)[1])
            for at in range(len(canvas)):
                if bool(text[at]) and (policy is None or bool(masked[at]) == (policy == "mask")):
                    seen[texts.level[row]] += 1
                    code = sae.encode(kept[0][max(0, at - shift)])
                    for feature in code.nonzero()[:, 0].tolist():
                        fired[texts.level[row], feature] += 1
                        values[feature].append((float(code[feature]), row, place + at))
            place += len(canvas)
            row += 1
    one = found["one"]
    assert one.seen.tolist() == seen.tolist()
    assert one.fired.tolist() == fired.tolist()
    assert one.density_by_level.numpy() == pytest.approx(fired / seen[:, None])
    for feature, several in values.items():
        assert float(one.largest[feature]) == pytest.approx(max((v for v, _, _ in several), default=0), rel=1e-4)
        assert float(one.mean[feature]) == pytest.approx(np.mean([v for v, _, _ in several] or [0]), rel=1e-4)
        bins = [0] * BINS
        for value, _, _ in several:
            bins[max(i for i in range(BINS) if i == 0 or bin_edge(i) <= value)] += 1
        assert one.histogram[feature].tolist() == bins
        best: dict[int, tuple[float, int]] = {}
        for value, number, where in several:
            if not texts.held_out[number]:
                best[number] = max(best.get(number, (0.0, 0)), (value, where))
        ranked = sorted(best.values(), reverse=True)[:STRONGEST]
        got = [(v, p) for v, p in zip(*map(torch.Tensor.tolist, _slots(one.strongest, feature)), strict=True) if p >= 0]
        assert [v for v, _ in got] == pytest.approx([v for v, _ in ranked], rel=1e-4)
        assert {p for _, p in got} == {p for _, p in ranked}
        held = [p for p in one.held.place[feature].tolist() if p >= 0]
        assert len(held) <= HELD and all(bool(texts.held_out[texts.row[p]]) for p in held)


def _slots(places: Places, feature: int) -> tuple[torch.Tensor, torch.Tensor]:
    return places.value[feature], places.place[feature]


def test_draws_are_in_proportion_to_the_activation() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([1.0, 3.0])
    first = np.zeros(2)
    for _ in range(400):
        places = Places.empty(1, 1)
        key = torch.rand(2, generator=generator).log() / weight
        places.update(torch.zeros(2, dtype=torch.long), torch.arange(2), key, torch.arange(2), weight)
        first[int(places.place[0, 0])] += 1
    assert first[1] / 400 == pytest.approx(0.75, abs=0.06)


def test_each_text_is_noised_once_and_every_fourth_is_held_out(texts: ReadTexts) -> None:
    assert len(texts.ratio) == 24
    assert texts.level.bincount().tolist() == [12, 12]
    assert int(texts.held_out.sum()) == 6
    every = read_texts(SENTENCES[:4], tiny.tokenizer(), tiny.bert().facts, RATIOS, 24, 0, 200, every=True)
    assert len(every.ratio) == 8


def test_words_and_contexts_are_those_of_the_text(texts: ReadTexts) -> None:
    surfaces = Surfaces(tiny.tokenizer())
    table: WordTable = word_table(texts, surfaces)
    for row in range(0, len(texts.ratio), 5):
        places = ((texts.row == row) & texts.text).nonzero()[:, 0]
        text = "".join(surfaces[token] for token in texts.tokens[places].tolist())
        words = [table.words[word] for word, owner in zip(table.word, table.row, strict=True) if owner == row]
        assert words == [part for word in text.split() for part in _parts(word)]
        middle = next(place for place in places[len(places) // 2 :].tolist() if table.at[place] >= 0)
        first, last = borders(texts, middle, 6)
        assert first <= middle < last and last - first == 6
        window = table.window(np.array([middle]))[0]
        assert window[8] == table.word[table.at[middle]]
    one = FeatureActivity(2, 2)
    one.strongest.place[1, :2] = torch.tensor([middle, middle])
    one.strongest.value[1, :2] = torch.tensor([2.0, 1.0])
    [context] = kept_contexts(texts, surfaces, one.strongest, 1, 4, 6)
    assert context["tokens"][context["at"]] == surfaces[int(texts.tokens[middle])]
    assert (context["at"] in context["masked"]) == bool(texts.masked[middle])
    assert kept_contexts(texts, surfaces, one.strongest, 0, 4, 6) == []


def _parts(word: str) -> list[str]:
    bare = word.rstrip(",.")
    return [bare, *word[len(bare) :]]
