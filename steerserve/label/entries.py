"""From what was measured of an SAE's features to what is written of each: its name, its lists, its numbers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from steerserve.label.activity import FeatureActivity
from steerserve.label.contexts import kept_contexts
from steerserve.label.effects import nearest, promoted_by_decoder, promoted_by_push
from steerserve.label.explainer import Explainer
from steerserve.label.names import Background, NamedFeature, background, detection, name_feature
from steerserve.label.recipe import LabelRecipe
from steerserve.label.texts import ReadTexts
from steerserve.label.words import Surfaces, WordTable, word_table
from steerserve.models.base import DiffusionLM
from steerserve.saes.feature_store import FeatureEntry, spelled
from steerserve.saes.sae import SparseAutoencoder

SHOWN_PUSH: Final = 0.1
"""Push whose effect is told, in mean norms of the hidden state."""
RANDOM_PLACES: Final = 20_000
"""Random places that say how often each word stands anywhere."""
CHANCE: Final = 64
"""Random held-out places that a name's words are told from."""
FOR_EXPLAINER: Final = 12
"""Contexts that an explainer is shown."""


@dataclass(frozen=True)
class Findings:
    """What was measured of one SAE."""

    texts: ReadTexts
    activity: FeatureActivity
    contexts: tuple[ReadTexts, FeatureActivity]
    """Where the contexts come from that are kept."""
    curve: Tensor
    """[slices + 1, features]"""
    effects: Tensor | None
    """[hidden_size, vocab_size]; None where they were not measured."""
    norm: float
    """Mean norm of the hidden state at the SAE's positions."""


@dataclass(frozen=True)
class Labelled:
    """Entries of one SAE, and how well their names tell contexts in all."""

    entries: list[FeatureEntry]
    summary: dict[str, float]

    def summary_line(self) -> str:
        """One line for the terminal."""
        named = sum(entry.name is not None for entry in self.entries)
        text = f"{named} of {len(self.entries)} features named"
        if self.summary:
            text += f"; detection {self.summary['auc']:.2f}, other features' names {self.summary['random_auc']:.2f}"
        return text


def entries(
    model: DiffusionLM,
    tokenizer: Tokenizer,
    sae: SparseAutoencoder,
    found: Findings,
    recipe: LabelRecipe,
    explainer: Explainer | None,
    kept: Path,
) -> Labelled:
    """Everything of every feature; kept: where an explainer's names are written as they come, and read again."""
    facts = model.facts
    surfaces = Surfaces(tokenizer)
    silent = [i for i in range(facts.vocab_size) if not surfaces[i].strip()] if facts.vocab_size < 1 << 15 else []
    forbidden = sorted({facts.mask_id, *facts.end_ids, *facts.forbidden_ids, *silent})
    count = min(recipe.tokens, (facts.vocab_size - len(forbidden)) // 2)
    norms = sae.decoder_norm.float().clamp(min=1e-12)
    directions = sae.W_dec.float() / norms[:, None]
    by_decoder = promoted_by_decoder(model, directions * found.norm, count, forbidden)
    nothing = torch.zeros(len(directions), 0)
    by_push = (nothing.long(), nothing, nothing.long(), nothing)
    if found.effects is not None:
        by_push = promoted_by_push(found.effects, directions.cpu(), SHOWN_PUSH * found.norm, count, forbidden)
    near_ids, near_cosines = nearest(directions.cpu(), recipe.neighbours)
    table = word_table(found.texts, surfaces)
    known = background(table, random_places(found.texts, sae, False, RANDOM_PLACES, recipe.seed))
    names = _names(table, known, sae, found, surfaces, (by_decoder[0], by_push[0]))
    own_texts, own = found.contexts
    shown = names
    if explainer is not None:
        shown = _explained(explainer, names, found, surfaces, kept)
    scores = _scores(table, known, sae, shown, found, recipe, explainer is not None)
    made = []
    for feature in range(sae.facts.features):
        contexts = kept_contexts(own_texts, surfaces, own.strongest, feature, recipe.contexts, recipe.width)
        curve = found.curve[:, feature].tolist()
        named = shown.get(feature)
        record: dict[str, Any] = {
            "named_by": None if named is None else "contexts" if explainer is None else explainer.model,
            "words": [] if feature not in names else list(names[feature].words),
            "contexts": contexts,
            "histogram": _histogram(found.activity.histogram[feature]),
            "density_by_noise": [_short(value) for value in found.activity.density_by_level[:, feature].tolist()],
            "curve": _of_largest(curve),
            "promoted": _pairs(surfaces, by_decoder[0][feature], by_decoder[1][feature]),
            "suppressed": _pairs(surfaces, by_decoder[2][feature], by_decoder[3][feature]),
            "pushed_up": _pairs(surfaces, by_push[0][feature], by_push[1][feature]),
            "pushed_down": _pairs(surfaces, by_push[2][feature], by_push[3][feature]),
            "neighbours": [
                [index, round(100 * value)]
                for index, value in zip(near_ids[feature].tolist(), near_cosines[feature].tolist(), strict=True)
            ],
        }
        score = None
        if feature in scores:
            score, chance = scores[feature]
            held = int((found.activity.held.place[feature] >= 0).sum())
            record["detection"] = {"auc": round(score, 3), "random_auc": round(chance, 3), "contexts": held}
        made.append(
            FeatureEntry(
                feature,
                None if named is None else named.name,
                None if score is None else round(score, 3),
                record,
                () if named is None else _searched(named, record),
            )
        )
    told = np.array(list(scores.values()))
    summary = {} if not len(told) else {"auc": told[:, 0].mean(), "random_auc": told[:, 1].mean()}
    return Labelled(made, {name: round(float(value), 4) for name, value in summary.items()})


def _names(
    table: WordTable,
    known: Background,
    sae: SparseAutoencoder,
    found: Findings,
    surfaces: Surfaces,
    promoted: Sequence[Tensor],
) -> dict[int, NamedFeature]:
    """The name of each feature that is active anywhere, from its strongest places and those drawn."""
    activity = found.activity
    names = {}
    for feature in tqdm(range(sae.facts.features), desc="names", unit="feature", leave=False):
        place = torch.cat([activity.strongest.place[feature], activity.drawn.place[feature]])
        value = torch.cat([activity.strongest.value[feature], activity.drawn.value[feature]])
        there = place >= 0
        likelier = [surfaces[token] for ids in promoted for token in ids[feature].tolist()]
        named = name_feature(table, known, place[there].numpy(), value[there].double().numpy(), likelier)
        if named is not None:
            names[feature] = named
    return names


def _scores(
    table: WordTable,
    known: Background,
    sae: SparseAutoencoder,
    names: dict[int, NamedFeature],
    found: Findings,
    recipe: LabelRecipe,
    explained: bool,
) -> dict[int, tuple[float, float]]:
    """Detection of each name, by the words that it shows."""
    words = {feature: spelled_name(named, explained) for feature, named in names.items()}
    held = {feature: found.activity.held.place[feature] for feature in words}
    places = {feature: several[several >= 0].numpy() for feature, several in held.items()}
    chance = random_places(found.texts, sae, True, CHANCE, recipe.seed + 1)
    return detection(table, known, words, places, chance, recipe.seed)


def spelled_name(named: NamedFeature, explained: bool) -> list[str]:
    """The words that a name consists of."""
    if explained:
        return spelled(named.name)
    around = named.name.rpartition(": ")[2] if named.centre is not None else named.name
    words = [] if named.centre is not None and ": " not in named.name else around.split(", ")
    return [*([] if named.centre is None else [named.centre]), *words]


def random_places(texts: ReadTexts, sae: SparseAutoencoder, held_out: bool, count: int, seed: int) -> np.ndarray:
    """Places of texts, held out or not, at the positions of an SAE's policy; drawn with repetition."""
    wanted = texts.text & (texts.held_out[texts.row] == held_out)
    if sae.facts.policy is not None:
        wanted &= texts.masked if sae.facts.policy == "mask" else ~texts.masked
    places = wanted.nonzero()[:, 0].numpy()
    return places[np.random.default_rng(seed).integers(0, max(1, len(places)), count if len(places) else 0)]


def _explained(
    explainer: Explainer, names: dict[int, NamedFeature], found: Findings, surfaces: Surfaces, kept: Path
) -> dict[int, NamedFeature]:
    """Names by the explainer; those that a stopped run has had are not asked for again."""
    known: dict[int, str] = {}
    if kept.exists():
        for line in kept.read_text(encoding="utf-8").splitlines():
            index, name = json.loads(line)
            known[index] = name
    explained = {}
    with kept.open("a", encoding="utf-8") as file:
        for feature, named in tqdm(names.items(), desc=f"names by {explainer.model}", unit="feature"):
            if feature not in known:
                contexts = kept_contexts(found.texts, surfaces, found.activity.strongest, feature, FOR_EXPLAINER, 24)
                known[feature] = explainer.name(contexts, named.words)
                file.write(json.dumps([feature, known[feature]]) + "\n")
                file.flush()
            explained[feature] = NamedFeature(known[feature], named.words, named.centre)
    return explained


def _searched(named: NamedFeature, record: dict[str, Any]) -> tuple[str, ...]:
    """What a feature is found by: its name, its words, the tokens that it promotes, words of the contexts kept."""
    tokens = [token.strip() for key in ("promoted", "pushed_up") for token, _ in record[key]]
    around = {word for context in record["contexts"] for word in spelled("".join(context["tokens"]))}
    return (named.name, " ".join(named.words), " ".join(dict.fromkeys(tokens)), " ".join(sorted(around)))


def _pairs(surfaces: Surfaces, ids: Tensor, values: Tensor) -> list[list[Any]]:
    return [[surfaces[token], _short(value)] for token, value in zip(ids.tolist(), values.tolist(), strict=True)]


def _of_largest(curve: list[float]) -> list[Any]:
    """The largest value of a curve, then every value in percent of it."""
    largest = max(curve)
    return [_short(largest), *(round(100 * value / largest) if largest > 0 else 0 for value in curve)]


def _histogram(counts: Tensor) -> list[int]:
    """First bin that holds any, then the counts from it to the last that does; empty for a feature never active."""
    there = counts.nonzero()[:, 0].tolist()
    return [there[0], *counts[there[0] : there[-1] + 1].tolist()] if there else []


def _short(value: float) -> float:
    """Two significant digits."""
    return float(f"{value:.2g}")
