"""What the limits on KL come to: nats a token that are asked, predicted and measured, for attributes and for features.

    python bench/max_kl.py [--model DIR] [--texts 64] [--features 3] [--out bench/results/max_kl.json]

Every attribute at `--strength` of the residual norm and random features of the first SAEs at `--feature-strength` times
their largest activation, all uniform; each without a limit, with `max_predicted_kl` (attributes alone: features have no
calibrated cost) and with `max_kl`, over the same noise. Every run is measured. `over` counts the texts whose measured
KL is above the limit; `passes` is forward passes against the run without a limit, `acts` the mean share of the strength
that was left. Prints a table, and writes JSON and a Markdown file beside it after each line; goes on where it was
stopped.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steerserve.config import EngineConfig
from steerserve.engine.api.events import Done, Result
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Limits
from steerserve.engine.engine import DiffusionEngine
from steerserve.memory import keep_freed_memory
from steerserve.runtime.load import load_runtime

LIMITS = (Limits(max_predicted_kl=0.3), Limits(max_kl=0.3), Limits(max_kl=0.05))
"""Limits, in nats a token."""
SETTINGS = ("texts", "tokens", "steps", "strength", "feature_strength", "features", "seed")
"""What the records of a run depend on, beside the model."""


def pushes(
    engine: DiffusionEngine, strengths: tuple[float, float], features: int, seed: int
) -> Iterator[tuple[str, Intervention]]:
    """What is pushed, with its name."""
    for name in sorted(engine.catalogue.attributes):
        yield name, Intervention(attribute=name, strength=strengths[0], unit="residual", schedule="uniform")
    generator = torch.Generator().manual_seed(seed)
    saes = [one for one in engine.catalogue.saes.values() if one.stats is not None]
    for sae in (saes[i % len(saes)] for i in range(features)):
        assert sae.stats is not None
        live = (sae.stats.max_act > 0).nonzero()[:, 0]
        index = int(live[int(torch.randint(len(live), (1,), generator=generator))])
        yield (
            f"{sae.facts.id}:{index}",
            Intervention(
                feature=FeatureRef(sae.facts.id, index), strength=strengths[1], unit="max_act", schedule="uniform"
            ),
        )


def receipts(engine: DiffusionEngine, params: GenerationParams, texts: int, batch: int) -> list[dict[str, Any]]:
    """Rows of the same request that differ in their noise alone."""
    found = []
    for first in range(0, texts, batch):
        rows = [engine.admit(replace(params, row=row)) for row in range(first, min(first + batch, texts))]
        engine.add(rows)
        results: dict[str, Result] = {}
        while len(results) < len(rows):
            results |= {event.request_id: event.result for event in engine.step() if isinstance(event, Done)}
        found += [results[row.id].receipt or {} for row in rows]
    return found


def record(name: str, kind: str, asked: float | None, made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one push under one limit."""
    measured = [one["measured_kl"] for one in made]
    strengths = [one["interventions"][0]["strength_per_step"] for one in made]
    whole = made[0]["interventions"][0]
    predicted = [one["predicted_kl"] for one in made]
    return {
        "push": name,
        "limit": kind,
        "asked": asked,
        "texts": len(made),
        "predicted": None if None in predicted else statistics.mean(predicted),
        "measured": statistics.mean(measured),
        "largest": max(measured),
        "over": None if asked is None else sum(one > asked for one in measured),
        "passes": sum(one["forward_passes"] for one in made),
        "applied": sum(one["interventions"][0]["applied"] for one in made),
        "strength": whole["strength"],
        "mean_strength": statistics.mean(statistics.mean(steps) for steps in strengths),
        "each": [round(one, 6) for one in measured],
    }


def measure(
    engine: DiffusionEngine,
    base: GenerationParams,
    strengths: tuple[float, float],
    features: int,
    texts: int,
    batch: int,
    known: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """One record for each push and limit, those of `known` as they are; strengths: of attributes and of features."""
    kept = {(one["push"], one["limit"], one["asked"]): one for one in known}
    for name, push in pushes(engine, strengths, features, base.seed):
        free = replace(base, interventions=(push,), measure_kl=True)
        for limits in (None, *LIMITS):
            kind = "none" if limits is None else "max_predicted_kl" if limits.max_kl is None else "max_kl"
            # Without a calibrated cost nothing is predicted that could be limited.
            if kind == "max_predicted_kl" and engine.admit(free).plan["predicted_kl"] is None:
                continue
            asked = None if limits is None else getattr(limits, kind)
            if (name, kind, asked) in kept:
                yield kept[name, kind, asked]
            else:
                yield record(name, kind, asked, receipts(engine, replace(free, limits=limits), texts, batch))


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as Markdown."""
    free = {one["push"]: one for one in records if one["limit"] == "none"}
    lines = [
        "| push | limit | asked | predicted | measured | largest | over | passes | acts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in records:
        whole = free[one["push"]]
        asked = "" if one["asked"] is None else f"{one['asked']:g}"
        predicted = "" if one["predicted"] is None else f"{one['predicted']:.3f}"
        over = "" if one["over"] is None else f"{one['over']} of {one['texts']}"
        acts = one["mean_strength"] / whole["mean_strength"] if whole["mean_strength"] else 0.0
        lines.append(
            f"| {one['push']} | {one['limit']} | {asked} | {predicted} | {one['measured']:.3f} | {one['largest']:.3f} "
            f"| {over} | {one['passes'] / whole['passes']:.2f} | {acts:.2f} |"
        )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--sae", type=Path)
    parser.add_argument("--attributes", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--feature-strength", type=float, default=8.0)
    parser.add_argument("--features", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args(given)
    keep_freed_memory()
    config = EngineConfig(threads=arguments.threads)
    folders = None if arguments.attributes is None else [arguments.attributes]
    engine = load_runtime(arguments.model, arguments.sae, folders, config).engine
    base = GenerationParams(
        max_tokens=arguments.tokens, steps=arguments.steps, seed=arguments.seed, ignore_eos=True, prompt=""
    )
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "device": str(engine.device),
        "family": engine.model.facts.family,
        **{name: getattr(arguments, name) for name in SETTINGS},
    }
    before = json.loads(arguments.out.read_text()) if arguments.out is not None and arguments.out.is_file() else {}
    same = all(before.get(name) == value for name, value in result.items())
    known, result["records"] = before["records"] if same else [], []
    strengths = arguments.strength, arguments.feature_strength
    for one in measure(engine, base, strengths, arguments.features, arguments.texts, arguments.batch, known):
        print(one["push"], one["limit"], one["asked"], f"{one['measured']:.4f}", f"{one['largest']:.4f}", flush=True)
        result["records"].append(one)
        # After each line: a long run that is stopped has told what it has measured.
        write(result, arguments.out)
    print(table(result["records"]))


def write(result: dict[str, Any], out: Path | None) -> None:
    """Write JSON and, beside it, the table."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        head = (
            f"`python bench/max_kl.py`: {result['family']} on {result['device']}, {result['texts']} texts of "
            f"{result['tokens']} tokens in {result['steps']} steps for each line, unconditional, the model's own order "
            f"and temperature; attributes at {result['strength']:g} residual, features at "
            f"{result['feature_strength']:g} times their largest activation. Nats a token: `predicted` and `measured` "
            f"are means over texts, `largest` the largest "
            f"measured; `over`: texts measured above the limit. `passes`: forward passes, and `acts`: mean strength, "
            f"both against the line without a limit.\n\n"
        )
        out.with_suffix(".md").write_text(head + table(result["records"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
