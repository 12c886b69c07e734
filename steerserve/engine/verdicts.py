"""What the probes of attributes say of finished texts: one forward pass more, without masks and without pushes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from tokenizers import Tokenizer
from torch import Tensor

from steerserve.engine.catalogue import Catalogue
from steerserve.engine.events import WORDLESS, Result
from steerserve.engine.request import Request
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from steerserve.models.means import mean_states
from steerserve.models.tokenizer import literal
from steerserve.steering.probe import Probe

MOST: Final = 1e4
"""Largest log-odds in nats that are told; far from where a probability is a number other than 0 or 1."""


def probes(names: Sequence[str], catalogue: Catalogue) -> dict[str, Probe]:
    """The probes of attributes; raises NotFoundError for one that is not known, RequestError where it has no probe."""
    found = {}
    for i, name in enumerate(names):
        probe = catalogue.attribute(name, f"verdicts[{i}]").probe
        if probe is None:
            known = ", ".join(one.name for one in catalogue.attributes.values() if one.probe is not None)
            raise RequestError(
                f"attribute {name!r} has no probe, so no text can be judged by it; those with one: {known or 'none'}",
                f"verdicts[{i}]",
            )
        found[name] = probe
    return found


def reader(tokenizer: Tokenizer, catalogue: Catalogue) -> Tokenizer:
    """A tokenizer that reads finished texts as they are: what only looks like a special token, a mask among them, is
    spelled out. The one given where no attribute has a probe."""
    if all(one.probe is None for one in catalogue.attributes.values()):
        return tokenizer
    # A copy: prompts are read meanwhile, in other threads, and in them special tokens are meant.
    return literal(tokenizer)


def judge(
    results: list[Result],
    requests: Sequence[Request],
    catalogue: Catalogue,
    model: DiffusionLM,
    tokenizer: Tokenizer,
) -> None:
    """Put into the results of finished rows the verdicts that they asked for, and the forward pass that these took;
    tokenizer: a `reader`."""
    asked = [probes(request.params.verdicts, catalogue) for request in requests]
    places = [i for i, one in enumerate(asked) if one]
    if not places:
        return
    texts = tokenizer.encode_batch_fast([results[i].text for i in places], add_special_tokens=False)
    ids = [one.ids for one in texts]
    found = verdicts(model, ids, [asked[i] for i in places])
    for i, tokens, one in zip(places, ids, found, strict=True):
        # A text without tokens costs no pass.
        results[i] = replace(results[i], verdicts=one, forward_passes=results[i].forward_passes + bool(tokens))


def verdicts(
    model: DiffusionLM, texts: Sequence[Sequence[int]], asked: Sequence[Mapping[str, Probe]]
) -> list[dict[str, float]]:
    """For each text, as token ids, the log-odds in nats that it has the attribute of each of its own probes, by name;
    between -MOST and MOST, and WORDLESS for a text without tokens or whose states are no numbers."""
    means = mean_states(model, texts, sorted({probe.layer for one in asked for probe in one.values()}))
    return [
        {name: _log_odds(probe, means[probe.layer][i]) if ids else WORDLESS for name, probe in one.items()}
        for i, (ids, one) in enumerate(zip(texts, asked, strict=True))
    ]


def _log_odds(probe: Probe, mean: Tensor) -> float:
    found = float(probe.log_odds(mean))
    return WORDLESS if math.isnan(found) else max(-MOST, min(MOST, found))
