"""What the probes of attributes say of finished texts: one forward pass more, without masks and without pushes."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tokenizers import Tokenizer

from steerserve.engine.catalogue import Catalogue
from steerserve.engine.events import Result
from steerserve.engine.request import Request
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from steerserve.models.means import mean_states
from steerserve.steering.probe import WORDLESS, Probe


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
    made = copy.deepcopy(tokenizer)
    made.encode_special_tokens = True
    return made


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
    found = verdicts(model, tokenizer, [results[i].text for i in places], [asked[i] for i in places])
    for i, one in zip(places, found, strict=True):
        results[i] = replace(results[i], verdicts=one, forward_passes=results[i].forward_passes + 1)


def verdicts(
    model: DiffusionLM, tokenizer: Tokenizer, texts: Sequence[str], asked: Sequence[Mapping[str, Probe]]
) -> list[dict[str, float]]:
    """For each text the log-odds in nats that it has the attribute of each of its own probes, by name; WORDLESS for a
    text without tokens."""
    ids = [one.ids for one in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    means = mean_states(model, ids, sorted({probe.layer for one in asked for probe in one.values()}))
    return [
        {name: float(probe.log_odds(means[probe.layer][i])) if ids[i] else WORDLESS for name, probe in one.items()}
        for i, one in enumerate(asked)
    ]
