"""Features of the loaded SAEs: their list, and those that a text activates."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.api.base import FeatureQuery
from steerserve.engine.api.text import continuation
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import ArtifactError, NotFoundError, RequestError
from steerserve.models.base import deciding
from steerserve.models.sigma import level_of_share
from steerserve.saes import SparseAutoencoder
from steerserve.saes.feature_record import neighbours, spelled_out
from steerserve.saes.feature_search import FeatureSearch
from steerserve.saes.feature_store import FeatureStore
from steerserve.saes.pair import pairs

CHUNK: Final = 64
"""Tokens encoded at once: activations of a wide SAE are large."""
MAX_K: Final = 256
"""Features of one token that may be asked for."""


@dataclass(frozen=True)
class Prepared:
    """A checked reading: tokens, BOS included, and the SAE that reads each state."""

    tokens: tuple[int, ...]
    start: int
    """Tokens before the text."""
    masked: tuple[bool, ...]
    on_masked: SparseAutoencoder
    on_visible: SparseAutoencoder
    k: int


@dataclass(frozen=True)
class Moments:
    """Activations of an SAE's features over some tokens."""

    tokens: int
    summed: Tensor
    """[features] float64"""
    squares: Tensor
    """[features] float64"""

    def plus(self, other: "Moments") -> "Moments":
        """Both together."""
        return Moments(self.tokens + other.tokens, self.summed + other.summed, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        """Mean activation of each feature [features]."""
        return self.summed / self.tokens

    @property
    def variance(self) -> Tensor:
        """Sample variance of each feature [features]; 0 for a single token."""
        return (self.squares - self.tokens * self.mean.square()).clamp(min=0) / max(1, self.tokens - 1)


class LoadedFeatures:
    """Features of the SAEs that a torch engine has loaded."""

    def __init__(
        self,
        engine: DiffusionEngine,
        labels: Mapping[str, Mapping[int, str]] | None = None,
        stores: Mapping[str, FeatureStore] | None = None,
    ) -> None:
        """labels: what features mean as somebody says, by SAE and index; stores: what was found out about them, by
        SAE. A label takes the place of the name that was found."""
        self._engine = engine
        self._saes = engine.catalogue.saes
        self._stores = stores or {}
        given = {name: dict(one) for name, one in (labels or {}).items() if one}
        self._given = given
        self._labels: dict[str, dict[int, str]] = {
            name: (self._stores[name].names if name in self._stores else {}) | given.get(name, {})
            for name in self._saes
        }
        of_labels = {name: FeatureStore.of_labels(one) for name, one in given.items()}
        self._search = FeatureSearch(
            {name: [one[name] for one in (of_labels, self._stores) if name in one] for name in self._saes}
        )

    def listed(self, sae: str | None, query: str, offset: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """List the features of an SAE that match a query, a page at a time, and count them all."""
        chosen = sorted(self._saes) if sae is None else [self._engine.catalogue.sae(sae, "sae").facts.id]
        every: Iterable[tuple[str, int]]
        if query.strip():
            ranked = self._ranked(query.strip(), chosen)
            every, total = ranked, len(ranked)
        else:
            counts = [self._saes[name].facts.features for name in chosen]
            every = ((name, index) for name, count in zip(chosen, counts, strict=True) for index in range(count))
            total = sum(counts)
        return [self._card(name, index) for name, index in islice(every, offset, offset + limit)], total

    def described(self, sae: str, index: int) -> dict[str, Any]:
        """Tell all that is known of one feature, as JSON."""
        autoencoder = self._engine.catalogue.sae(sae, "sae")
        count = autoencoder.facts.features
        if not 0 <= index < count:
            raise NotFoundError(f"SAE {sae} has features 0 to {count - 1}, got {index}", "index")
        card = self._card(sae, index) | {"attributes": self._attributes(autoencoder, index)}
        store = self._stores.get(sae)
        record = None if store is None else store.record(index)
        if store is None or record is None:
            return card
        card |= spelled_out(record, store.meta)
        if index in self._given.get(sae, {}):
            card["named_by"] = "labels"
        labels = self._labels[sae]
        card["neighbours"] = [
            {"index": other, "label": labels.get(other), "cosine": cosine} for other, cosine in neighbours(record)
        ]
        return card

    def prepare(self, reading: FeatureQuery) -> Prepared:
        """Check a query and tokenize its text, without a forward."""
        facts = self._engine.catalogue.facts
        ids, masked = noised_text(self._engine, reading.text, reading.mask_ratio, reading.seed)
        start = [] if facts.bos_id is None else [facts.bos_id]
        on_masked, on_visible = self._chosen(reading)
        most = min(MAX_K, on_masked.facts.features, on_visible.facts.features)
        if not 1 <= reading.k <= most:
            raise RequestError(f"k must be 1 to {most}, got {reading.k}", "k")
        return Prepared((*start, *ids), len(start), tuple(masked), on_masked, on_visible, reading.k)

    @torch.inference_mode()
    def read(self, prepared: Prepared) -> list[dict[str, Any]]:
        """Run one forward and return what each token activates, in order, as JSON."""
        ids = prepared.tokens[prepared.start :]
        tokens: list[dict[str, Any]] = [{} for _ in ids]
        states = self._states(prepared)
        for hidden, sae, chunk in _chunks(prepared):
            for place, features in zip(chunk, _top(sae, states[chunk], prepared.k), strict=True):
                tokens[place] = self._token(ids, place, hidden, sae, features)
        return tokens

    @torch.inference_mode()
    def moments(self, prepared: Prepared) -> dict[str, Moments]:
        """Run one forward and sum what the features of each SAE do on a text."""
        states = self._states(prepared)
        found: dict[str, Moments] = {}
        for _, sae, chunk in _chunks(prepared):
            active = sae.encode(states[chunk]).double().cpu()
            mine = Moments(len(chunk), active.sum(0), active.square().sum(0))
            found[sae.facts.id] = found[sae.facts.id].plus(mine) if sae.facts.id in found else mine
        return found

    def contrast(
        self, texts_a: Sequence[Mapping[str, Moments]], texts_b: Sequence[Mapping[str, Moments]], k: int
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The k features that are most more active in texts_a than in texts_b, and the other way round, as JSON."""
        found: list[tuple[float, str, int, float, float]] = []
        for name in sorted({name for one in (*texts_a, *texts_b) for name in one}):
            a, b = (_pooled(one[name] for one in texts if name in one) for texts in (texts_a, texts_b))
            if a is None or b is None:
                continue
            spread = ((a.variance + b.variance) / 2).sqrt()
            d = torch.where(spread > 0, (a.mean - b.mean) / spread, torch.zeros_like(spread))
            most = min(k, len(d))
            ids = {*d.topk(most).indices.tolist(), *(-d).topk(most).indices.tolist()}
            found += [(float(d[i]), name, i, float(a.mean[i]), float(b.mean[i])) for i in sorted(ids) if d[i] != 0]
        found.sort(key=lambda one: (-one[0], one[1:3]))
        cards: list[dict[str, Any]] = [
            {
                "sae": name,
                "index": index,
                "label": self._labels[name].get(index),
                "d": round(d, 4),
                "mean_a": round(mean_a, 6),
                "mean_b": round(mean_b, 6),
            }
            for d, name, index, mean_a, mean_b in found
        ]
        return [card for card in cards if card["d"] > 0][:k], [card for card in reversed(cards) if card["d"] < 0][:k]

    def _states(self, prepared: Prepared) -> Tensor:
        """The state that decides each token of a text [tokens, hidden_size]."""
        engine, facts = self._engine, self._engine.model.facts
        tokens = torch.tensor([prepared.tokens])
        masked = torch.tensor([[*[False] * prepared.start, *prepared.masked]])
        canvas = tokens.masked_fill(masked, facts.mask_id).to(engine.device)
        share = torch.tensor([sum(prepared.masked) / len(prepared.masked)], device=engine.device)
        sigma = None if facts.sigma is None else level_of_share(facts.sigma, share)
        states = self._outputs(canvas, sigma, prepared.on_masked.facts.layer)
        # What a feature says of a token stands in the state that decides the token.
        return deciding(states, facts.shift)[0, prepared.start :]

    def _outputs(self, canvas: Tensor, sigma: Tensor | None, layer: int) -> Tensor:
        """Output of one layer [1, length, hidden_size] on an unsteered canvas [1, length]."""
        kept: dict[int, Tensor] = {}

        def site(at: int, hidden: Tensor) -> Tensor:
            if at == layer:
                kept[at] = hidden
            return hidden

        self._engine.model(canvas, None, site, sigma)
        return kept[layer]

    def _chosen(self, reading: FeatureQuery) -> tuple[SparseAutoencoder, SparseAutoencoder]:
        """The SAEs of masked and of visible tokens."""
        if (reading.sae is None) == (reading.layer is None):
            raise RequestError("either sae or layer must be given: one SAE, or the pair of a layer", "sae")
        if reading.sae is not None:
            one = self._engine.catalogue.sae(reading.sae, "sae")
            return one, one
        try:
            found = list(pairs(sae for sae in self._saes.values() if sae.facts.layer == reading.layer).values())
        except ArtifactError as error:
            raise RequestError(f"{error}; name one of them as sae instead", "layer") from error
        if not found:
            raise NotFoundError(
                f"layer {reading.layer} has no pair of SAEs, exactly one for masked and one for visible tokens; name "
                f"an SAE instead: {', '.join(sorted(self._saes)) or 'none is loaded'}",
                "layer",
            )
        return found[0].mask, found[0].visible

    def _ranked(self, query: str, saes: Sequence[str]) -> list[tuple[str, int]]:
        """Features that answer a query, the best first: those whose index it is, then those that it finds by words."""
        found: list[tuple[str, int]] = []
        if query.isascii() and query.isdigit() and len(query) <= 9:
            found = [(name, int(query)) for name in saes if int(query) < self._saes[name].facts.features]
        ranked = self._search.ranked(query, saes)
        return list(dict.fromkeys([*found, *ranked])) if found else ranked

    def _attributes(self, sae: SparseAutoencoder, index: int) -> list[dict[str, Any]]:
        """What the feature has to do with each attribute that was calibrated at its layer, the nearest one first: the
        cosine of its decoder row with the attribute's direction, and the contrast d where the attribute lists it."""
        layer, row = sae.facts.layer, sae.W_dec[index].float().cpu()
        norm = float(row.norm())
        cards: list[dict[str, Any]] = []
        for attribute in self._engine.catalogue.attributes.values():
            if layer not in attribute.sites or norm == 0:
                continue
            site = attribute.sites[layer]
            kind = "diff_means" if (layer, "diff_means") in attribute.directions else "sae"
            cosine = float(attribute.directions[layer, kind].float().cpu() @ row) / norm
            own = site.sae == sae.facts.id
            d = next((feature.d for feature in site.features if own and feature.index == index), None)
            cards.append({"name": attribute.name, "cosine": round(cosine, 4), "d": d})
        return sorted(cards, key=lambda card: -abs(card["cosine"]))

    def _card(self, name: str, index: int) -> dict[str, Any]:
        sae = self._saes[name]
        stats = sae.stats
        numbers: dict[str, Any] = dict.fromkeys(("max_act", "mean_act", "density"))
        if stats is not None:
            numbers = {key: float(getattr(stats, key)[index]) for key in numbers}
        return {
            "sae": name,
            "index": index,
            "label": self._labels[name].get(index),
            "layer": sae.facts.layer,
            "policy": sae.facts.policy,
            "decoder_norm": float(sae.decoder_norm[index]),
            **numbers,
        }

    def _token(
        self,
        ids: tuple[int, ...],
        place: int,
        masked: bool,
        sae: SparseAutoencoder,
        features: list[tuple[int, float]],
    ) -> dict[str, Any]:
        labels = self._labels[sae.facts.id]
        text = continuation(self._engine.decode, ids[max(0, place - 1) : place], ids[place : place + 1])
        return {
            "position": place,
            "token_id": ids[place],
            "token": self._engine.vocabulary.token_name(ids[place], text),
            "masked": masked,
            "sae": sae.facts.id,
            "features": [{"index": i, "activation": value, "label": labels.get(i)} for i, value in features],
        }


def noised_text(
    engine: DiffusionEngine, text: str | tuple[int, ...], mask_ratio: float, seed: int
) -> tuple[list[int], list[bool]]:
    """The tokens of a text, and which of them are masked: mask tokens, and a share of them all at random. Raises
    RequestError for a text that does not fit on a canvas, and for ids and shares that there are not."""
    facts = engine.catalogue.facts
    ids = engine.tokenizer.encode(text, add_special_tokens=False).ids if isinstance(text, str) else list(text)
    for i, token in enumerate(ids):
        if not 0 <= token < facts.vocab_size:
            raise RequestError(f"token ids must be 0 to {facts.vocab_size - 1}, got {token}", f"text[{i}]")
    longest = min(facts.max_length, engine.config.max_canvas) - (facts.bos_id is not None)
    if not 1 <= len(ids) <= longest:
        raise RequestError(f"text must have 1 to {longest} tokens, got {len(ids)}", "text")
    if not 0 <= mask_ratio <= 1:
        raise RequestError(f"mask_ratio must be 0 to 1, got {mask_ratio}", "mask_ratio")
    masked = _masks(len(ids), mask_ratio, seed)
    return ids, [hidden or token == facts.mask_id for hidden, token in zip(masked, ids, strict=True)]


def _chunks(prepared: Prepared) -> Iterable[tuple[bool, SparseAutoencoder, list[int]]]:
    """The masked tokens and the visible ones, CHUNK at a time, with the SAE that reads them."""
    for hidden, sae in ((True, prepared.on_masked), (False, prepared.on_visible)):
        places = [i for i, is_masked in enumerate(prepared.masked) if is_masked == hidden]
        for start in range(0, len(places), CHUNK):
            yield hidden, sae, places[start : start + CHUNK]


def _pooled(several: Iterable[Moments]) -> Moments | None:
    whole: Moments | None = None
    for one in several:
        whole = one if whole is None else whole.plus(one)
    return whole


def _masks(length: int, ratio: float, seed: int) -> list[bool]:
    """Which of so many tokens are masked: the share asked for, to the nearest whole token."""
    position = torch.arange(length)
    none = torch.zeros_like(position)
    draws = noise.uniform(noise.keys(torch.full_like(position, seed), none, none, position, noise.ORDER))
    chosen = draws.argsort(stable=True)[: round(ratio * length)]
    found: list[bool] = torch.zeros(length, dtype=torch.bool).index_fill(0, chosen, True).tolist()
    return found


def _top(sae: SparseAutoencoder, states: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k most active features of each of states [N, hidden_size], largest first; those that are active at all."""
    ids = sae.top_ids(states, k)
    values = sae.encode(states).gather(1, ids)
    return [
        [(index, value) for index, value in zip(*row, strict=True) if value != 0]
        for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
