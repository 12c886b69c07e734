"""Verdicts of attributes' probes on finished texts: one forward pass more, without masks and without pushes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from tokenizers import Tokenizer
from torch import Tensor

from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.admission.conditions import probes
from steerserve.engine.api.events import WORDLESS, Result
from steerserve.engine.request.request import Request
from steerserve.models import DiffusionLM
from steerserve.models.means import mean_states
from steerserve.models.text.tokenizer import literal
from steerserve.steering.probe import Probe

MOST: Final = 1e4
"""Largest log-odds in nats that are told; far from where a probability is a number other than 0 or 1."""


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
    model: DiffusionLM,
    tokenizer: Tokenizer,
) -> None:
    """Put into the results of finished rows the verdicts that they asked for, and the forward passes that these took;
    tokenizer: a `reader`."""
    known = [None if one.refinement is None else one.refinement.outcome for one in requests]
    asking = [i for i, one in enumerate(requests) if one.params.verdicts and known[i] is None]
    texts = [results[i].text for i in asking]
    for i, (found, passed) in zip(
        asking, judgements(texts, [requests[i] for i in asking], model, tokenizer), strict=True
    ):
        results[i] = replace(results[i], verdicts=found, forward_passes=results[i].forward_passes + passed)
        told, refinement = results[i].receipt, requests[i].refinement
        if told is not None and refinement is not None:
            judged = told["refined"] | {"judging_passes": refinement.passes + passed}
            results[i] = replace(results[i], receipt=told | {"refined": judged})
    for i, request in enumerate(requests):
        if request.refinement is not None:
            passes = results[i].forward_passes + request.refinement.passes
            results[i] = replace(results[i], verdicts=known[i] or results[i].verdicts, forward_passes=passes)


def judgements(
    texts: Sequence[str],
    requests: Sequence[Request],
    model: DiffusionLM,
    tokenizer: Tokenizer,
) -> list[tuple[dict[str, float], bool]]:
    """The verdicts that rows, which ask for some, ask for on their texts, and whether each took a forward pass: a text
    without tokens does not."""
    if not texts:
        return []
    ids = [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    found = verdicts(model, ids, [probes(request.params.verdicts, request.catalogue) for request in requests])
    return [(one, bool(tokens)) for one, tokens in zip(found, ids, strict=True)]


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
