"""Write many texts through an engine in batches, and record the step at which each token was committed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.config import EngineConfig
from steerserve.engine.api.base import Engine
from steerserve.engine.api.events import Committed, Done, Failed, Revised
from steerserve.engine.api.params import GenerationParams
from steerserve.errors import ArtifactError, SteerserveError


@dataclass(frozen=True)
class GeneratedText:
    """One finished text."""

    text: str
    tokens: tuple[int, ...]
    """Response tokens that were committed, before the first end of text."""
    committed_at: tuple[int, ...]
    """Step at which each of them was committed for good, from 0."""
    kl: float | None = None
    """Measured KL from the unsteered predictions in nats a response token; None: not asked for."""


def write(engine: Engine, params: Sequence[GenerationParams], title: str) -> list[GeneratedText]:
    """The texts of all params, in their order; the engine must be otherwise idle, with room in its queue for all.

    Raises SteerserveError where a row fails.
    """
    requests: list[Any] = [engine.admit(one) for one in params]
    engine.add(requests)
    place = {request.id: i for i, request in enumerate(requests)}
    commits: list[dict[int, int]] = [{} for _ in params]
    found: list[GeneratedText | None] = [None] * len(params)
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
                        found[i] = GeneratedText(
                            event.result.text, tokens, committed_at, (event.result.receipt or {}).get("measured_kl")
                        )
                        left -= 1
                    case Failed():
                        raise SteerserveError(f"row {place[event.request_id]} of {title} failed: {event.message}")
    return [one for one in found if one is not None]


def bounds(rows: int) -> EngineConfig:
    """Configuration of an engine that only this process asks for texts, `rows` at a time."""
    return EngineConfig(max_rows=rows, max_queue=1 << 20, max_steps=1 << 20)


def check_texts_differ(written: Sequence[GeneratedText], title: str) -> None:
    """Raise ArtifactError where texts, two or more, are all the same: figures of them would be of one text, without an
    error."""
    if len(written) > 1 and len({one.tokens for one in written}) == 1:
        raise ArtifactError(
            f"all {len(written)} {title} are the same text: give a higher --temperature, or an order or transfer that "
            f"draws more"
        )


def unsteered_samples(
    engine: Engine, recipe: CalibrationRecipe, origin: Mapping[str, Any], cache: Path
) -> list[GeneratedText]:
    """`recipe.samples` unconditional texts of full length; read from `cache` where it holds those of this origin.

    Raises ArtifactError where they are all the same.
    """
    params = [sample_params(recipe, row) for row in range(recipe.samples)]
    key: dict[str, Any] = json.loads(
        json.dumps({"origin": dict(origin), "params": asdict(params[0]), "samples": len(params)})
    )
    if cache.exists():
        stored = json.loads(cache.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return [
                GeneratedText(one["text"], tuple(one["tokens"]), tuple(one["committed_at"]))
                for one in stored["samples"]
            ]
    samples = write(engine, params, "unsteered samples")
    check_texts_differ(samples, "unsteered samples")
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(".partial")
    partial.write_text(json.dumps({"key": key, "samples": [asdict(one) for one in samples]}), encoding="utf-8")
    partial.rename(cache)
    return samples


def sample_params(recipe: CalibrationRecipe, row: int) -> GenerationParams:
    """Parameters of one unsteered sample."""
    return GenerationParams(
        max_tokens=recipe.sample_tokens,
        steps=recipe.sample_steps,
        order=recipe.order,
        transfer=recipe.transfer,
        temperature=recipe.temperature,
        seed=recipe.seed,
        row=row,
        ignore_eos=True,
    )
