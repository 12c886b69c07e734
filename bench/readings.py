"""What `feedback` reads under its push, against the same canvas without it.

    python bench/readings.py

Runs the bundled model under `feedback` for each attribute and a few seeds, rebuilds the canvas of every step from what
was committed, and reads it again twice by plain forward passes: without any push, and under the push of that step,
which is what a loop would see that read its own row. Writes `readings.json` and `readings.md` to bench/results. No
number of it is a time.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerserve.config import EngineConfig
from steerserve.engine.admission.conditions import gauge
from steerserve.engine.api.conditions import Quantity
from steerserve.engine.api.events import Committed, Done, Event
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward.meter import ReadoutBatch
from steerserve.engine.request.request import Request
from steerserve.runtime.load import load_runtime

RESULTS = Path(__file__).parent / "results"
TOKENS = STEPS = 24


@dataclass(frozen=True)
class Step:
    """One forward of a run; readings are mean activations of the attribute's steering features."""

    strength: float
    told: float
    """As the receipt has it, to six decimals."""
    unsteered: float
    """What is read of the same canvas without any push."""
    own_row: float
    """What would be read of the pushed row itself."""


@dataclass(frozen=True)
class Run:
    """One text."""

    attribute: str
    seed: int
    reads: str
    layers: list[int]
    target: float
    let_go_at: float | None
    steps: list[Step]
    end: float
    """What is read of the finished text without any push."""


def measured(engine: DiffusionEngine, name: str, seed: int, strength: float) -> Run:
    """One text under `feedback`, read again step by step."""
    push = Intervention(attribute=name, strength=strength, schedule="feedback", scope="masked")
    params = GenerationParams(
        prompt="the", max_tokens=TOKENS, steps=STEPS, seed=seed, ignore_eos=True, interventions=(push,)
    )
    request = engine.admit(params)
    engine.add([request])
    events: list[Event] = []
    while not any(isinstance(event, Done) for event in events):
        events += engine.step()
    [done] = [event for event in events if isinstance(event, Done)]
    assert done.result.receipt is not None
    told = done.result.receipt["interventions"][0]
    canvases = _canvases(request, events)
    loop = told["feedback"]
    steps = []
    for canvas, gain, reading in zip(canvases, loop["gains"], loop["readings"], strict=False):
        plain, own = (_reading(engine, name, request, canvas, at) for at in (0.0, gain))
        steps.append(Step(round(strength * gain, 6), reading, plain, own))
    end = _reading(engine, name, request, canvases[-1], 0.0)
    layers = [site["layer"] for site in told["sites"]]
    return Run(name, seed, done.result.receipt["reads"], layers, loop["target"], loop["let_go_at"], steps, end)


def _canvases(request: Request, events: list[Event]) -> list[list[int]]:
    """The canvas before each step, and the finished one."""
    response = [request.mask_id] * TOKENS
    canvases = [[*request.prompt_ids, *response]]
    for event in events:
        if isinstance(event, Committed):
            for position, token in zip(event.positions, event.tokens, strict=True):
                response[position] = token
            canvases.append([*request.prompt_ids, *response])
    return canvases


@torch.inference_mode()
def _reading(engine: DiffusionEngine, name: str, request: Request, canvas: list[int], gain: float) -> float:
    """The mean over the response of the attribute's steering features, by one plain forward under so much push."""
    facts, tokens = engine.model.facts, torch.tensor([canvas])
    directions = {push.layer: push for push in request.interventions[0].pushes}
    state = (torch.arange(len(canvas)) - facts.shift).clamp(min=0)
    pushed = torch.zeros(len(canvas), dtype=torch.bool)
    pushed[state[tokens[0] == facts.mask_id]] = True
    kept: dict[int, Tensor] = {}

    def sites(layer: int, hidden: Tensor) -> Tensor:
        kept[layer] = hidden
        if layer not in directions or gain == 0:
            return hidden
        return hidden + gain * directions[layer].strength * directions[layer].direction * pushed[None, :, None]

    engine.model(tokens, sites=sites)
    read = gauge(engine.catalogue, Quantity(attribute=name, read="activation"), "")
    response = torch.zeros(1, len(canvas), dtype=torch.bool)
    response[0, request.start : request.stop] = True
    return float(ReadoutBatch([(0, read)], torch.device("cpu")).read(kept, response, state)[0])


def table(runs: list[Run], strength: float) -> str:
    """The runs as Markdown."""
    lines = [
        "# What feedback reads",
        "",
        f"Bundled model, prompt `the`, {TOKENS} tokens in {STEPS} steps, strength {strength:g} residual norms, seeds "
        f"{', '.join(str(one) for one in sorted({run.seed for run in runs}))}; every reading is of the same canvas. "
        "`error`: the largest difference between what was read and the canvas without any push (the receipt rounds to "
        "six decimals). `own row`: the largest difference that the push itself would have made, had its row been read. "
        "`has it`: texts that read at least the target when they are done, of those that feedback let go of.",
        "",
        "| attribute | layers | target | forwards | pushed | error | own row | let go | has it |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in sorted({run.attribute for run in runs}):
        mine = [run for run in runs if run.attribute == name]
        steps = [step for run in mine for step in run.steps]
        gone = [run for run in mine if run.let_go_at is not None]
        lines.append(
            f"| {name} | {' '.join(str(one) for one in mine[0].layers)} | {mine[0].target:.3f} | {len(steps)} "
            f"| {sum(step.strength > 0 for step in steps)} "
            f"| {max(abs(step.told - step.unsteered) for step in steps):.1e} "
            f"| {max(abs(step.own_row - step.unsteered) for step in steps):.3f} "
            f"| {len(gone)} of {len(mine)} | {sum(run.end >= run.target for run in gone)} of {len(gone)} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="texts of each attribute")
    parser.add_argument("--strength", type=float, default=1.2, help="in residual norms")
    parser.add_argument("--attributes", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    engine: Any = load_runtime(None, None, None, EngineConfig()).engine
    names = arguments.attributes or sorted(engine.catalogue.attributes)
    runs = [
        measured(engine, name, seed, arguments.strength) for name in names for seed in range(1, arguments.seeds + 1)
    ]
    said = table(runs, arguments.strength)
    (arguments.out / "readings.md").write_text(said, encoding="utf-8")
    told = ",\n".join(json.dumps(asdict(run)) for run in runs)
    (arguments.out / "readings.json").write_text(f"[\n{told}\n]\n", encoding="utf-8")
    print(said)


if __name__ == "__main__":
    main()
