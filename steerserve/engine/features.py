"""Features of the loaded SAEs: their list, and those that a text activates."""

from collections.abc import Mapping
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


class LoadedFeatures:
    """Features of the SAEs that a torch engine has loaded."""

    def __init__(self, engine: DiffusionEngine, labels: Mapping[str, Mapping[int, str]] | None = None) -> None:
        """labels: what features mean, by SAE and index."""
        self._engine = engine
        self._saes = engine.catalogue.saes
        self._labels = labels or {}

    def listed(self, sae: str | None, query: str, offset: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """List the features of an SAE that match a query, a page at a time, and count them all."""
        chosen = sorted(self._saes) if sae is None else [self._engine.catalogue.sae(sae, "sae").facts.id]
        found = [(name, self._matching(name, query.casefold())) for name in chosen]
        total = sum(len(indices) for _, indices in found)
        every = ((name, index) for name, indices in found for index in indices)
        return [self._card(name, index) for name, index in islice(every, offset, offset + limit)], total

    def prepare(self, reading: FeatureQuery) -> Prepared:
        """Check a query and tokenize its text, without a forward."""
        engine, facts = self._engine, self._engine.catalogue.facts
        if isinstance(reading.text, str):
            ids: list[int] = engine.tokenizer.encode(reading.text, add_special_tokens=False).ids
        else:
            ids = list(reading.text)
        for i, token in enumerate(ids):
            if not 0 <= token < facts.vocab_size:
                raise RequestError(f"token ids must be 0 to {facts.vocab_size - 1}, got {token}", f"text[{i}]")
        start = [] if facts.bos_id is None else [facts.bos_id]
        longest = min(facts.max_length, engine.config.max_canvas) - len(start)
        if not 1 <= len(ids) <= longest:
            raise RequestError(f"text must have 1 to {longest} tokens, got {len(ids)}", "text")
        if not 0 <= reading.mask_ratio <= 1:
            raise RequestError(f"mask_ratio must be 0 to 1, got {reading.mask_ratio}", "mask_ratio")
        on_masked, on_visible = self._chosen(reading)
        most = min(MAX_K, on_masked.facts.features, on_visible.facts.features)
        if not 1 <= reading.k <= most:
            raise RequestError(f"k must be 1 to {most}, got {reading.k}", "k")
        masked = _masks(len(ids), reading.mask_ratio, reading.seed)
        masked = [hidden or token == facts.mask_id for hidden, token in zip(masked, ids, strict=True)]
        return Prepared((*start, *ids), len(start), tuple(masked), on_masked, on_visible, reading.k)

    @torch.inference_mode()
    def read(self, prepared: Prepared) -> list[dict[str, Any]]:
        """Run one forward and return what each token activates, in order, as JSON."""
        engine, facts = self._engine, self._engine.model.facts
        tokens = torch.tensor([prepared.tokens])
        masked = torch.tensor([[*[False] * prepared.start, *prepared.masked]])
        canvas = tokens.masked_fill(masked, facts.mask_id).to(engine.device)
        share = torch.tensor([sum(prepared.masked) / len(prepared.masked)], device=engine.device)
        sigma = None if facts.sigma is None else level_of_share(facts.sigma, share)
        states = self._outputs(canvas, sigma, prepared.on_masked.facts.layer)
        # What a feature says of a token stands in the state that decides the token.
        states = deciding(states, facts.shift)[0, prepared.start :]
        ids = prepared.tokens[prepared.start :]
        told: list[dict[str, Any]] = [{} for _ in ids]
        for hidden, sae in ((True, prepared.on_masked), (False, prepared.on_visible)):
            places = [i for i, is_masked in enumerate(prepared.masked) if is_masked == hidden]
            for chunk in (places[i : i + CHUNK] for i in range(0, len(places), CHUNK)):
                for place, features in zip(chunk, _top(sae, states[chunk], prepared.k), strict=True):
                    told[place] = self._token(ids, place, hidden, sae, features)
        return told

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

    def _matching(self, name: str, query: str) -> list[int] | range:
        """Indices of an SAE's features that answer a query, in case-folded letters."""
        count = self._saes[name].facts.features
        if not query:
            return range(count)
        found = {index for index, label in self._labels.get(name, {}).items() if query in label.casefold()}
        if query.isascii() and query.isdigit() and len(query) <= 9 and int(query) < count:
            found.add(int(query))
        return sorted(found)

    def _card(self, name: str, index: int) -> dict[str, Any]:
        sae = self._saes[name]
        stats = sae.stats
        numbers: dict[str, Any] = dict.fromkeys(("max_act", "mean_act", "density"))
        if stats is not None:
            numbers = {key: float(getattr(stats, key)[index]) for key in numbers}
        return {
            "sae": name,
            "index": index,
            "label": self._labels.get(name, {}).get(index),
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
        labels = self._labels.get(sae.facts.id, {})
        text = continuation(self._engine.decode, ids[max(0, place - 1) : place], ids[place : place + 1])
        return {
            "position": place,
            "token_id": ids[place],
            "token": self._engine.vocabulary.token_name(ids[place], text),
            "masked": masked,
            "sae": sae.facts.id,
            "features": [{"index": i, "activation": value, "label": labels.get(i)} for i, value in features],
        }


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
