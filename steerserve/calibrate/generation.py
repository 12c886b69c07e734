"""Write many texts through an engine, in batches, with what is needed to replay how each was written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from steerserve.engine.base import Engine
from steerserve.engine.events import Committed, Done, Failed, Revised
from steerserve.engine.params import GenerationParams
from steerserve.errors import SteerserveError


@dataclass(frozen=True)
class Written:
    """One finished text."""

    text: str
    tokens: tuple[int, ...]
    """Response tokens that were committed, before the first end of text."""
    committed_at: tuple[int, ...]
    """Step at which each of them was committed for good, from 0."""
    kl: float | None = None
    """Measured KL from the unsteered predictions in nats a response token; None: not asked for."""


def write(engine: Engine, params: Sequence[GenerationParams], title: str) -> list[Written]:
    """The texts of all params, in their order; the engine must be otherwise idle, with room in its queue for all.

    Raises SteerserveError where a row fails.
    """
    requests: list[Any] = [engine.admit(one) for one in params]
    engine.add(requests)
    place = {request.id: i for i, request in enumerate(requests)}
    commits: list[dict[int, int]] = [{} for _ in params]
    found: list[Written | None] = [None] * len(params)
    left = len(params)
    steps = sum(one.max_tokens if one.steps is None else one.steps for one in params)
    with tqdm(total=steps, desc=title, unit="step", unit_scale=True, leave=False) as bar:
        while left:
            for event in engine.step():
                match event:
                    case Committed():
                        commits[place[event.request_id]].update(dict.fromkeys(event.positions, event.step))
                        bar.update(1)
                    case Revised():
                        for position in event.positions:
                            del commits[place[event.request_id]][position]
                    case Done():
                        i, tokens = place[event.request_id], event.result.tokens
                        # Positions at which the model drew its own mask are no tokens of the result.
                        written = sorted(commits[i])[: len(tokens)]
                        committed_at = tuple(commits[i][position] for position in written)
                        found[i] = Written(
                            event.result.text, tokens, committed_at, (event.result.receipt or {}).get("measured_kl")
                        )
                        left -= 1
                    case Failed():
                        raise SteerserveError(f"row {place[event.request_id]} of {title} failed: {event.message}")
    return [one for one in found if one is not None]
