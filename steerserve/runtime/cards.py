"""Cards of what a server has loaded: attributes, SAEs, vectors, and the capabilities of its engine."""

from collections.abc import Mapping
from typing import Any

import schedulers
from steerserve.engine.api.scoring import MAX_ROUNDS
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.kv_cache import CACHES
from steerserve.saes import SparseAutoencoder
from steerserve.steering.attribute import Attribute
from steerserve.steering.names import COMBINE, CONTROLS, OPERATORS, SCOPE_NAMES, UNITS
from steerserve.steering.vectors import NamedVector


def attribute_card(attribute: Attribute) -> dict[str, Any]:
    """Answer of `/v1/attributes/{name}`: the card, its hash, its dispersion and its probe."""
    profile = schedulers.CommitmentProfile.from_json(attribute.profile) if attribute.profile else None
    return attribute.card() | {
        "sha256": attribute.sha256,
        "rho": profile.efficiency() if profile else None,
        "probe": attribute.probe.card() if attribute.probe else None,
    }


def sae_card(sae: SparseAutoencoder, norms: Mapping[int, float]) -> dict[str, Any]:
    """Entry of an SAE in `/v1/saes`."""
    facts = sae.facts
    return {
        "layer": facts.layer,
        "policy": facts.policy,
        "features": facts.features,
        "activation": facts.activation,
        "k": facts.k,
        "sha256": facts.sha256,
        "trained_on": _trained_on(facts.metadata),
        "remarks": list(facts.remarks),
        "units": [
            *(["max_act"] if sae.stats is not None else []),
            *(["residual"] if facts.layer in norms else []),
            "raw",
            "stored",
        ],
    }


def _trained_on(metadata: Mapping[str, Any]) -> str | None:
    """The model an SAE says that it was trained on, as its layout names it."""
    trainer = metadata.get("trainer")
    named = trainer.get("lm_name") if isinstance(trainer, Mapping) else metadata.get("model_name")
    return named if isinstance(named, str) else None


def vector_card(vector: NamedVector, norms: Mapping[int, float]) -> dict[str, Any]:
    """Entry of a vector in `/v1/vectors`; `norms` are its own strength, in hidden units by layer."""
    return {
        "layers": sorted(vector.layers),
        "norms": {str(layer): norm for layer, norm in sorted(vector.norms.items())},
        "source": vector.source,
        "sha256": vector.sha256,
        "units": [*(["residual"] if all(layer in norms for layer in vector.layers) else []), "raw", "stored"],
    }


def capabilities(engine: DiffusionEngine) -> dict[str, Any]:
    """Capabilities of this engine; anything else is refused."""
    config = engine.config
    return {
        "engine": "torch",
        "device": str(engine.device),
        "operators": list(OPERATORS),
        "units": list(UNITS),
        "combine": [one for one in COMBINE if one != "joint" or engine.catalogue.joint is not None],
        "controls": list(CONTROLS),
        "limits": ["max_kl", "max_predicted_kl", "max_delta"],
        "probes": [one.name for one in engine.catalogue.attributes.values() if one.probe is not None],
        "scopes": [*SCOPE_NAMES, "positions"],
        "schedules": list(schedulers.SCHEDULES),
        "norms": list(schedulers.NORMS),
        "orders": list(schedulers.ORDERS),
        "transfers": list(schedulers.TRANSFERS),
        "caches": list(CACHES),
        "layers": engine.catalogue.facts.num_layers,
        "max_rows": config.max_rows,
        "max_batch_tokens": config.max_batch_tokens,
        "max_queue": config.max_queue,
        "max_steps": config.max_steps,
        "max_interventions": config.max_interventions,
        "max_refine_rounds": MAX_ROUNDS,
    }
