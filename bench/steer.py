"""How far each attribute steers, and at what cost: python bench/steer.py --data DIR [--quick]

For every attribute: texts without steering and with its default strength and schedule, from the same noise; the share
that a classifier assigns to the target, and the loss of the texts under the unsteered model. The classifier is trained
on a split of its own, on which nothing was calibrated. Two controls at the same strength: the difference-of-means
direction, and the uniform schedule. Every attribute is written as it is finished, so that a run can be resumed.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from steerserve.calibrate.generation import Written, write
from steerserve.calibrate.intervals import bootstrap_ratio, wilson
from steerserve.calibrate.quality import distinct_pairs, text_losses
from steerserve.calibrate.tasks import Group, Task
from steerserve.calibrate.texts import labelled_texts
from steerserve.config import EngineConfig
from steerserve.engine.params import GenerationParams, Intervention
from steerserve.engine.torch_engine import TorchEngine
from steerserve.errors import SteerserveError
from steerserve.memory import keep_freed_memory
from steerserve.runtime import load_runtime
from steerserve.steering.attribute import Attribute
from steerserve.train.classifiers import Judge, train_judge

CONTROLS = {
    "diff_means": {"direction": "diff_means"},
    "uniform": {"schedule": "uniform"},
}
"""What each control changes in the intervention."""


@dataclass(frozen=True)
class Settings:
    """How much is written, and how; results of other settings are not mixed."""

    texts: int
    control_texts: int
    tokens: int
    steps: int
    order: str | Mapping[str, Any] | None
    temperature: float | None
    quality_masks: int
    judge_texts: int
    seed: int


QUICK = Settings(128, 64, 47, 24, None, None, 8, 12_000, 7)
FULL = Settings(512, 512, 63, 63, None, None, 8, 12_000, 7)


@dataclass(frozen=True)
class Texts:
    """Texts of one condition and their figures, by row."""

    texts: tuple[str, ...]
    losses: tuple[float, ...]
    distinct: tuple[float, ...]


def compose(engine: TorchEngine, settings: Settings, count: int, interventions: Sequence[Intervention]) -> Texts:
    """`count` unconditional texts; the same row draws the same noise in every condition."""
    params = [
        GenerationParams(
            max_tokens=settings.tokens,
            steps=settings.steps,
            order=settings.order,
            temperature=settings.temperature,
            seed=settings.seed,
            row=row,
            ignore_eos=True,
            interventions=tuple(interventions),
        )
        for row in range(count)
    ]
    written: list[Written] = write(engine, params, interventions[0].attribute or "" if interventions else "unsteered")
    losses = text_losses(engine.model, [one.tokens for one in written], settings.quality_masks)
    distinct = tuple(distinct_pairs(one.tokens) for one in written)
    return Texts(tuple(one.text for one in written), tuple(losses.tolist()), distinct)


def compare(judge: Judge, target: str, steered: Texts, unsteered: Texts) -> dict[str, Any]:
    """The figures of one condition, with 95 % intervals, against the unsteered texts of the same rows."""
    count = len(steered.texts)
    hits = int(judge.assigned(target, steered.texts).sum())
    below = unsteered.losses[:count]
    return {
        "texts": count,
        "share": hits / count,
        "share_interval": wilson(hits, count),
        "probability": float(judge.probability(target, steered.texts).mean()),
        "loss": float(np.mean(steered.losses)),
        "loss_ratio": float(np.mean(steered.losses) / np.mean(below)),
        "loss_ratio_interval": bootstrap_ratio(steered.losses, below),
        "distinct_2": float(np.mean(steered.distinct)),
    }


def measure(
    engine: TorchEngine, attribute: Attribute, task: Task, judge: Judge, unsteered: Texts, settings: Settings
) -> dict[str, Any]:
    """All conditions of one attribute."""
    steered = compose(engine, settings, settings.texts, [Intervention(attribute=attribute.name)])
    controls = {}
    for name, change in CONTROLS.items():
        fields: dict[str, Any] = {"attribute": attribute.name, **change}
        texts = compose(engine, settings, settings.control_texts, [Intervention(**fields)])
        controls[name] = compare(judge, task.target, texts, unsteered)
    return {
        "sha256": attribute.sha256,
        "layers": list(attribute.layers),
        "strength": attribute.strength,
        "unit": attribute.unit,
        "judge": judge.summary(),
        "unsteered": compare(judge, task.target, unsteered, unsteered),
        "steered": compare(judge, task.target, steered, unsteered),
        **controls,
        "examples": {"unsteered": list(unsteered.texts[:3]), "steered": list(steered.texts[:3])},
    }


def run(engine: TorchEngine, data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Measure every attribute of the engine into `out`, keeping those measured before under the same settings."""
    header: dict[str, Any] = json.loads(json.dumps({"settings": asdict(settings)}))
    results: dict[str, Any] = {}
    if out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        results = before["attributes"] if before.get("settings") == header["settings"] else {}
    attributes = engine.catalogue.attributes
    results = {
        name: result
        for name, result in results.items()
        if name in attributes and result["sha256"] == attributes[name].sha256
    }
    judges: dict[Group, Judge] = {}
    unsteered: Texts | None = None
    for name, attribute in attributes.items():
        if name not in results:
            task = Task.from_json(attribute.provenance.get("task"), f"provenance.task of {name}")
            if task.group not in judges:
                texts = labelled_texts(data, task.group, "bench", settings.judge_texts, settings.seed)
                judges[task.group] = train_judge(texts, settings.seed)
            if unsteered is None:
                unsteered = compose(engine, settings, settings.texts, [])
            results[name] = measure(engine, attribute, task, judges[task.group], unsteered, settings)
        ordered = {one: results[one] for one in attributes if one in results}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(header | {"attributes": ordered}, indent=1) + "\n", encoding="utf-8")
    return header | {"attributes": {name: results[name] for name in attributes}}


def as_calibrated(settings: Settings, attributes: Iterable[Attribute]) -> Settings:
    """The settings with the order and temperature that the strengths were chosen under, where all attributes agree."""
    recipes = [attribute.provenance.get("recipe", {}) for attribute in attributes]
    for name in ("order", "temperature"):
        values = [recipe[name] for recipe in recipes if name in recipe]
        if values and all(value == values[0] for value in values):
            settings = replace(settings, **{name: values[0]})
    return settings


def table(report: Mapping[str, Any]) -> str:
    """The results as a Markdown table."""
    head = ["attribute", "strength", "unsteered", "steered", "loss ratio", "distinct-2"]
    head += ["diff. of means: share, loss", "uniform: share, loss", "judge"]
    lines = [head, ["---"] * len(head)]
    for name, one in report["attributes"].items():
        steered = one["steered"]
        controls = (f"{percent(one[key]['share'])}, {one[key]['loss_ratio']:.2f}" for key in CONTROLS)
        lines.append(
            [
                name,
                f"{one['strength']:g} at {','.join(map(str, one['layers']))}",
                percent(one["unsteered"]["share"]),
                f"{percent(steered['share'])} ({' to '.join(map(percent, steered['share_interval']))})",
                f"{steered['loss_ratio']:.3f} ({' to '.join(f'{x:.3f}' for x in steered['loss_ratio_interval'])})",
                f"{steered['distinct_2']:.3f}",
                *controls,
                percent(one["judge"]["accuracy"]),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    """A share as a whole percentage."""
    return f"{100 * share:.0f} %"


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """One line of figures for a machine to read."""
    return {
        name: {
            "unsteered": round(one["unsteered"]["share"], 3),
            "steered": round(one["steered"]["share"], 3),
            "loss_ratio": round(one["steered"]["loss_ratio"], 3),
        }
        for name, one in report["attributes"].items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the last line printed is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled texts that was calibrated on")
    for name in ("model", "sae", "attributes"):
        parser.add_argument(f"--{name}", type=Path, help=f"folder of the {name}; default: the bundled one")
    parser.add_argument("--quick", action="store_true", help="128 short texts an attribute instead of 512")
    parser.add_argument("--out", type=Path, help="default: bench/results/steer[-quick].json")
    parser.add_argument("--threads", type=int, help="CPU threads")
    given = parser.parse_args(arguments)
    keep_freed_memory()
    settings = QUICK if given.quick else FULL
    out = given.out or Path(__file__).parent / "results" / f"steer{'-quick' if given.quick else ''}.json"
    config = EngineConfig(max_rows=64, max_queue=settings.texts, threads=given.threads)
    try:
        engine = load_runtime(given.model, given.sae, given.attributes, config).engine
        report = run(engine, given.data, out, as_calibrated(settings, engine.catalogue.attributes.values()))
    except SteerserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = table(report)
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(json.dumps(summary(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
