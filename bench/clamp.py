"""What an SAE's encoder reads of a feature that is clamped, by four rules for the push.

    python bench/clamp.py [--features 24] [--out bench/results/clamp.json]

Texts of the bundled model are masked again in part, and the states of their masked positions at an SAE's layer are
pushed as a clamp pushes them: to 0, half and the whole of a feature's largest activation. Then the encoder reads them.
Features are drawn among those active on at least one token in a thousand. The rules, for the value s, the encoder's
activation a and pre-activation p, its column w and the decoder row d:

    projection   h + (s - <h, d/|d|>) d/|d|       a clamp of a direction
    row          h + (s - a) d                    the latent set in the reconstruction, the error kept
    row / (w.d)  h + (s - a) d / (w.d)            the same, by what the encoder reads of the row
    served       what the server does: p in the place of a where s is above 0

The same weights are also read under other activations; those have no statistics of their own, and keep the largest
activations of the first. Writes JSON and a Markdown table beside it.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from steerserve.config import EngineConfig
from steerserve.engine.api.events import Done
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import TorchEngine
from steerserve.runtime.load import load_runtime
from steerserve.saes import SparseAutoencoder
from steerserve.saes.activation import AbsTopK, Activation, JumpRelu, Relu, TopK
from steerserve.saes.matching_pursuit import MatchingPursuitAutoencoder, Pursuit
from steerserve.steering.plan import SteeringPlan
from steerserve.steering.push import Push

SAES = ("layer-2-mask", "layer-3-mask", "layer-4-mask")
NAMED = {"layer-3-mask": 93}
"""Features that are measured beside those drawn."""
SHARES = (0.0, 0.5, 1.0)
"""Values asked for, in shares of a feature's largest activation."""
RULES = ("projection", "row", "row / (w.d)", "served")
PROMPTS = ("the", "the team won the match", "the company said its profit", "a film about", "the king", "oil prices")
MASKED = (0.3, 0.6, 0.9)
STATES = 256


@dataclass(frozen=True)
class Record:
    """One rule, SAE and value, over all features and states; readings are in shares of each largest activation."""

    sae: str
    activation: str
    features: int
    asked: float
    rule: str
    low: float
    median: float
    high: float
    """The 10th, 50th and 90th hundredths of what is read back."""
    error: float
    """Mean distance of what is read from what was asked."""
    exact: float
    """Share of readings within a hundredth of the largest activation."""
    unread: float
    """Share of readings that are 0 where more was asked."""
    push: float
    """Mean |delta| / |h|."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    given = _parser().parse_args(arguments)
    torch.manual_seed(0)
    engine = load_runtime(None, None, None, EngineConfig()).engine
    assert isinstance(engine, TorchEngine)
    saes = [engine.catalogue.saes[name] for name in SAES]
    states = states_of(engine, [sae.facts.layer for sae in saes])
    records: list[Record] = []
    for sae in saes:
        features = drawn(sae, given.features)
        for name, other in read_otherwise(sae, states[sae.facts.layer]).items():
            # A pursuit takes a step for every feature it finds.
            some, part = (features[:4], STATES // 4) if name == "matching pursuit" else (features, STATES)
            records += measure(other, name, some, states[sae.facts.layer][:part])
            if name == sae.facts.activation and sae.facts.id in NAMED:
                only = measure(other, name, [NAMED[sae.facts.id]], states[sae.facts.layer])
                records += [replace(one, sae=f"{sae.facts.id}:{NAMED[sae.facts.id]}") for one in only]
    out: Path = given.out
    told = {"features": given.features, "states": STATES, "records": [asdict(one) for one in records]}
    out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(records), encoding="utf-8")
    print(table(records))


def states_of(engine: TorchEngine, layers: Sequence[int]) -> dict[int, Tensor]:
    """States [STATES, hidden_size] by layer, at masked positions of the model's own texts."""
    rows = [
        GenerationParams(prompt=prompt, max_tokens=32, steps=16, seed=seed, ignore_eos=True)
        for prompt in PROMPTS
        for seed in range(2)
    ]
    requests = [engine.admit(row) for row in rows]
    engine.add(requests)
    while not all(request.finished for request in requests):
        assert not any(isinstance(event, Done) and not event.result.tokens for event in engine.step())
    generator = torch.Generator().manual_seed(0)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for request in requests:
        for share in MASKED:
            canvas = torch.tensor([request.canvas])
            hidden = (torch.rand(canvas.shape, generator=generator) < share)[0]
            hidden[: request.start] = False
            canvas[0, hidden] = engine.model.facts.mask_id
            plan = SteeringPlan([[]], captures=frozenset(layers))
            with torch.inference_mode():
                engine.model(canvas, None, plan)
            for layer in layers:
                found[layer].append(plan.captured[layer][0, hidden])
    order = torch.randperm(sum(len(one) for one in found[layers[0]]), generator=generator)[:STATES]
    return {layer: torch.cat(parts)[order] for layer, parts in found.items()}


def drawn(sae: SparseAutoencoder, count: int) -> list[int]:
    """Features of an SAE that are not rare."""
    assert sae.stats is not None
    live = (sae.stats.density >= 1e-3).nonzero()[:, 0]
    chosen = torch.randperm(len(live), generator=torch.Generator().manual_seed(1))[:count]
    return sorted(live[chosen].tolist())


def read_otherwise(sae: SparseAutoencoder, states: Tensor) -> dict[str, SparseAutoencoder]:
    """An SAE as it is and, of that of layer 3, the same weights under other activations."""
    found = {sae.facts.activation: sae}
    if sae.facts.layer != 3 or sae.facts.k is None:
        return found
    tensors = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    threshold = sae.pre(states).topk(sae.facts.k, dim=-1).values[:, -1].median()
    activations: dict[str, Activation] = {
        "relu": Relu(),
        "batch topk (one threshold)": JumpRelu(threshold),
        "topk, a quarter of its k": TopK(sae.facts.k // 4),
        "abs topk": AbsTopK(sae.facts.k),
    }
    for name, activation in activations.items():
        found[name] = SparseAutoencoder(sae.facts, tensors, activation, sae.stats)
    pursuit = Pursuit(max_iterations=sae.facts.k)
    own = {name: tensors[name] for name in ("W_dec", "b_dec")}
    return found | {"matching pursuit": MatchingPursuitAutoencoder(sae.facts, own, pursuit, sae.stats)}


def measure(sae: SparseAutoencoder, activation: str, features: Sequence[int], states: Tensor) -> list[Record]:
    """Every value by every rule."""
    assert sae.stats is not None
    records = []
    for share in SHARES:
        read: dict[str, list[Tensor]] = {rule: [] for rule in RULES}
        size: dict[str, list[Tensor]] = {rule: [] for rule in RULES}
        for feature in features:
            largest = float(sae.stats.max_act[feature])
            for rule, pushed in clamped(sae, feature, share * largest, states).items():
                read[rule].append(sae.encode(pushed)[:, feature] / largest)
                size[rule].append((pushed - states).norm(dim=1) / states.norm(dim=1))
        for rule in RULES:
            value = torch.cat(read[rule])
            low, median, high = value.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            records.append(
                Record(
                    sae=sae.facts.id,
                    activation=activation,
                    features=len(features),
                    asked=share,
                    rule=rule,
                    low=low,
                    median=median,
                    high=high,
                    error=float((value - share).abs().mean()),
                    exact=float(((value - share).abs() < 0.01).float().mean()),
                    unread=float((value == 0).float().mean()) if share else 0.0,
                    push=float(torch.cat(size[rule]).mean()),
                )
            )
    return records


def clamped(sae: SparseAutoencoder, feature: int, asked: float, states: Tensor) -> dict[str, Tensor]:
    """The states [N, hidden_size] that each rule makes of these."""
    row, unit, active = sae.W_dec[feature], sae.direction(feature), sae.encode(states)[:, feature]
    own = float(sae.W_enc[:, feature] @ row)
    push = Push(sae.facts.layer, unit, "clamp", asked, torch.ones(1), sae=sae, feature=feature)
    plan = SteeringPlan([[push]])
    plan.set_step(torch.zeros(1, dtype=torch.float64), torch.ones(1, 5, len(states), dtype=torch.bool))
    return {
        "projection": states + (asked - states @ unit)[:, None] * unit,
        "row": states + (asked - active)[:, None] * row,
        "row / (w.d)": states + ((asked - active) / own)[:, None] * row,
        "served": plan(sae.facts.layer, states[None])[0],
    }


def table(records: Sequence[Record]) -> str:
    """The records in Markdown."""
    lines = [
        "`python bench/clamp.py`: latents asked of a clamp and read back by the encoder, in shares of each feature's "
        "largest activation, at masked positions of the bundled model. exact: within .01 of what was asked; unread: "
        "read as 0 where more was asked.",
        "",
        "| SAE | activation | features | asked | rule | read: median (10 to 90 %) | error | exact | unread | push |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.sae} | {one.activation} | {one.features} | {one.asked:g} | {one.rule} | {one.median:.3f} "
        f"({one.low:.3f} to {one.high:.3f}) | {one.error:.3f} | {one.exact:.0%} | {one.unread:.0%} | {one.push:.3f} |"
        for one in records
    ]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--features", type=int, default=24, help="features drawn of each SAE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "clamp.json")
    return parser


if __name__ == "__main__":
    main()
