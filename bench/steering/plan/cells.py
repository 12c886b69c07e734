"""The cells of a run: one task, method and strength each, as the request that its rows share."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.steering.plan.methods import METHODS, Fields, Method, interventions
from bench.steering.plan.settings import Settings
from bench.steering.plan.targets import Target, pairs, singles, triples
from steerserve.steering.attribute import Attribute

EXPERIMENTS: Final = ("single", "sets", "controls", "orders")
UNSTEERED: Final = "unsteered"
INFILL: Final = "infill"
FREE: Final = "unconditional"


@dataclass(frozen=True)
class Cell:
    """Rows that differ in their noise alone (and, where they fill in a text, in the text)."""

    experiment: str
    task: str
    attributes: tuple[str, ...]
    method: str
    factor: float
    texts: int
    kl_texts: int
    request: Fields
    """Fields of `GenerationParams` but for seed and row, interventions as dicts."""

    def key(self, origin: Mapping[str, Any]) -> str:
        """A hash of all that decides its rows; `origin` names the weights, attributes and judges."""
        mine = {name: origin["attributes"].get(name) for name in self.attributes}
        told = {"origin": {**origin, "attributes": mine}, "cell": vars(self)}
        if "combine" not in self.request:
            told["origin"].pop("joint", None)
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def work(self) -> float:
        """Token positions it takes through the model, in proportion to its time."""
        canvas = self.request["max_tokens"] + 1
        canvas += (self.request.get("context") or 0) * 2
        refine = self.request.get("refine")
        again = 0 if refine is None else refine["rounds"] * refine["span"] / self.request["max_tokens"]
        measured = min(self.kl_texts, self.texts) if self.request["interventions"] else 0
        return float((self.texts * self.candidates * (1 + again) + measured) * canvas * self.request["steps"])

    @property
    def candidates(self) -> int:
        """Texts written for each that is kept."""
        return int(self.request.get("best_of", 1))


def plan(
    settings: Settings,
    attributes: Mapping[str, Attribute],
    only: Sequence[str],
    methods: Collection[str] = tuple(METHODS),
) -> list[Cell]:
    """All cells, in the order in which they are run: what others are compared with comes first."""
    cells = [_unsteered(settings)] if set(only) & {"single", "sets", "controls"} else []
    targets = singles(attributes)
    several = [*pairs(attributes, settings.sets), *triples(attributes, settings.sets)]
    for name, method in METHODS.items():
        experiment = "controls" if _is_control(name, method) else "single"
        if method.role == "triples":
            if "sets" in only and name in methods:
                threes = triples(attributes, settings.sets)
                cells += [cell for one in threes for cell in _of_three(settings, one, name, method, attributes)]
            continue
        if method.push is None or name not in methods:
            continue
        if method.singles and experiment in only:
            cells += [cell for one in targets for cell in _grid(settings, experiment, one, name, method, attributes)]
        if method.sets and "sets" in only:
            cells += [cell for one in several for cell in _grid(settings, "sets", one, name, method, attributes)]
    if "orders" in only:
        cells += _orders(settings, attributes)
    return cells


def _is_control(name: str, method: Method) -> bool:
    return method.role == "control" or name.startswith(("difference", "clamp", "top feature"))


def _unsteered(settings: Settings) -> Cell:
    texts = max(settings.texts, settings.side_texts)
    return Cell("single", UNSTEERED, (), "none", 0.0, texts, 0, _request(settings))


def _grid(
    settings: Settings, experiment: str, target: Target, name: str, method: Method, attributes: Mapping[str, Attribute]
) -> list[Cell]:
    several = len(target.attributes) > 1
    texts = settings.texts if method.role == "core" and len(target.attributes) != 2 else settings.side_texts
    factors = settings.set_factors if several else settings.factors if method.role == "core" else settings.side_factors
    factors = (1.0,) if method.role == "control" else factors
    chosen = [attributes[one] for one in target.attributes]
    return [
        Cell(
            experiment,
            target.name,
            target.attributes,
            name,
            factor,
            texts,
            min(settings.kl_texts, texts),
            _request(settings, interventions(method, chosen, factor)) | dict(method.request),
        )
        for factor in factors
    ]


def _of_three(
    settings: Settings, target: Target, name: str, method: Method, attributes: Mapping[str, Attribute]
) -> list[Cell]:
    """Where probes have a say in the text they decide the cell as the request does."""
    chosen = [attributes[one] for one in target.attributes]
    asked: Fields = dict(method.request)
    if method.candidates > 1:
        asked["best_of"] = method.candidates
    if method.judged:
        asked["verdicts"] = list(target.attributes)
        asked["probes"] = [one.probe.sha256 if one.probe is not None else None for one in chosen]
    return [
        Cell(
            "sets",
            target.name,
            target.attributes,
            name,
            factor,
            settings.ranked_texts,
            0,
            _request(settings, interventions(method, chosen, factor)) | asked,
        )
        for factor in (settings.ranked_factors if method.push is not None else (1.0,))
    ]


def _orders(settings: Settings, attributes: Mapping[str, Attribute]) -> list[Cell]:
    """Every order at every number of steps: filling in held-out texts, writing freely, and steered to each topic."""
    names = sorted(attributes)
    cells = []
    for steps in settings.order_steps:
        for order in _order_choices(settings, names[0] if names else None):
            for task in (INFILL, FREE):
                cells.append(_order_cell(settings, task, (), order, steps, []))
    steered = [one for one in singles(names) if one.attributes[0].startswith("topic/")] or singles(names)
    steps = settings.order_steps[len(settings.order_steps) // 2]
    for target in steered:
        attribute = attributes[target.attributes[0]]
        push = interventions(METHODS["commitment"], [attribute], 1.0)
        for order in _order_choices(settings, attribute.name):
            cells.append(_order_cell(settings, target.name, target.attributes, order, steps, push))
    return cells


def _order_choices(settings: Settings, attribute: str | None) -> list[Fields]:
    informed = [{"type": "sae_stability", "weight": weight} for weight in settings.order_weights]
    if attribute is not None:
        informed += [
            {"type": "sae_attribute", "weight": weight, "attribute": attribute} for weight in settings.order_weights
        ]
    return [{"type": name} for name in ("random", "confidence", "margin", "entropy")] + informed


def _order_cell(
    settings: Settings, task: str, attributes: tuple[str, ...], order: Fields, steps: int, push: list[Fields]
) -> Cell:
    request = _request(settings, push) | {"order": order, "steps": steps, "max_tokens": settings.order_tokens}
    if task == INFILL:
        # The likeliest token each time: what is filled in is compared with what was there.
        request |= {"temperature": 0.0, "context": settings.order_context}
    weight = f" {order['weight']:g}" if "weight" in order else ""
    # What an order reads decides the rows too.
    attributes = tuple(dict.fromkeys([*attributes, *([order["attribute"]] if "attribute" in order else [])]))
    return Cell("orders", task, attributes, f"{order['type']}{weight}", float(steps), settings.order_texts, 0, request)


def _request(settings: Settings, pushes: Sequence[Fields] = ()) -> Fields:
    return {
        "max_tokens": settings.tokens,
        "steps": settings.steps,
        "ignore_eos": True,
        "interventions": list(pushes),
    }
