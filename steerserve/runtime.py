"""Put a server's parts together from folders on disk: model, SAEs, attributes, engine."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import schedulers
from steerserve.config import EngineConfig
from steerserve.engine.catalogue import Catalogue
from steerserve.engine.self_test import check_steering
from steerserve.engine.torch_engine import TorchEngine
from steerserve.errors import ArtifactError
from steerserve.models import load_model, load_tokenizer, read_sampler_defaults, weights_sha256
from steerserve.saes import SparseAutoencoder, load_saes
from steerserve.server.service import Service
from steerserve.steering.attribute import Attribute, load_attributes
from steerserve.steering.operators import CODES
from steerserve.steering.plan import SCOPES

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Runtime:
    """A loaded engine and the service a server is built from."""

    engine: TorchEngine
    service: Service

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.engine.decode(ids)


def load_runtime(model: Path | None, saes: Path | None, attributes: Path | None, config: EngineConfig) -> Runtime:
    """Load, check that everything belongs together, and test that steering takes; raises ArtifactError.

    Without a model the bundled one is loaded with its SAEs and attributes; a model of one's own comes with the SAEs
    and attributes named beside it, or with none.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if model is None:
        model = BUNDLED / "model"
        saes, attributes = saes or BUNDLED / "saes", attributes or BUNDLED / "attributes"
    lm = load_model(model)
    tokenizer = load_tokenizer(model)
    if tokenizer.get_vocab_size() > lm.facts.vocab_size:
        raise ArtifactError(
            f"{model}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {lm.facts.vocab_size}"
        )
    digest = weights_sha256(model)
    loaded_saes = load_saes(saes) if saes is not None else {}
    for sae in loaded_saes.values():
        sae.facts.check_model(lm.facts.hidden_size, lm.facts.num_layers, digest)
    facts = lm.facts
    loaded = load_attributes(attributes, digest, facts.num_layers, facts.hidden_size) if attributes is not None else {}
    defaults = read_sampler_defaults(model)
    check_attributes(loaded, loaded_saes)
    norms = residual_norms(loaded, loaded_saes)
    engine = TorchEngine(lm, tokenizer, Catalogue(facts, loaded, loaded_saes, norms, defaults), config)
    check_steering(engine)
    name = "bundled" if model == BUNDLED / "model" else model.resolve().name
    service = Service(
        engine=engine,
        model_id=name,
        created=int((model / "config.json").stat().st_mtime),
        decode=engine.decode,
        end_ids=frozenset({facts.eos_id}),
        max_length=facts.max_length,
        load=lambda: {
            "queue_length": len(engine.waiting),
            "running_rows": len(engine.running),
            "max_queue": config.max_queue,
            "max_rows": config.max_rows,
        },
        model_card={
            "family": facts.family,
            "sha256": digest,
            "max_model_len": facts.max_length,
            "num_layers": facts.num_layers,
            "hidden_size": facts.hidden_size,
            "vocab_size": facts.vocab_size,
            "sampler_defaults": asdict(defaults),
            "parameters": sum(p.numel() for p in lm.parameters()),
        },
        attributes={one.name: attribute_card(one) for one in loaded.values()},
        saes={sae_id: sae_card(sae) for sae_id, sae in loaded_saes.items()},
        capabilities=capabilities(engine),
    )
    return Runtime(engine, service)


def attribute_card(attribute: Attribute) -> dict[str, Any]:
    """What `/v1/attributes/{name}` says: the card, its hash and its dispersion."""
    profile = schedulers.CommitmentProfile.from_json(attribute.profile) if attribute.profile else None
    return attribute.card() | {
        "sha256": attribute.sha256,
        "rho": profile.efficiency() if profile else None,
    }


def sae_card(sae: SparseAutoencoder) -> dict[str, Any]:
    """What `/v1/saes` says of an SAE."""
    facts = sae.facts
    return {
        "layer": facts.layer,
        "policy": facts.policy,
        "features": facts.features,
        "activation": facts.activation,
        "k": facts.k,
        "sha256": facts.sha256,
        "units": ["residual", "raw"] + (["max_act"] if sae.stats is not None else []),
    }


def check_attributes(attributes: dict[str, Attribute], saes: dict[str, SparseAutoencoder]) -> None:
    """Raise ArtifactError for a schedule or profile that cannot be compiled, or a feature list of another SAE."""
    for one in attributes.values():
        try:
            profile = schedulers.CommitmentProfile.from_json(one.profile) if one.profile else None
            schedulers.compile_gains(*schedulers.build_strength(one.schedule), profile)
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"attribute {one.name!r}: {error}") from error
        for layer, site in one.sites.items():
            if site.sae in saes and saes[site.sae].facts.sha256 != site.sae_sha256:
                raise ArtifactError(
                    f"attribute {one.name!r}: its features at layer {layer} are not of the {site.sae} loaded"
                )


def residual_norms(attributes: dict[str, Attribute], saes: dict[str, SparseAutoencoder]) -> dict[int, float]:
    """Mean norm of the hidden state at masked positions by layer: what attributes say, else the SAEs' own measure."""
    stated = {
        sae.facts.layer: sae.facts.metadata.get("residual_norm") for sae in saes.values() if sae.facts.policy == "mask"
    }
    norms = {layer: float(norm) for layer, norm in stated.items() if isinstance(norm, int | float) and norm > 0}
    return norms | {layer: site.residual_norm for one in attributes.values() for layer, site in one.sites.items()}


def capabilities(engine: TorchEngine) -> dict[str, Any]:
    """What this engine honours; anything else is refused."""
    config = engine.config
    return {
        "engine": "torch",
        "device": str(engine.device),
        "operators": [op for op in CODES if op != "read"],
        "units": ["residual", "max_act", "raw"],
        "scopes": [*SCOPES, "positions"],
        "schedules": list(schedulers.STRENGTHS),
        "norms": list(schedulers.NORMS),
        "orders": list(schedulers.ORDERS),
        "transfers": list(schedulers.TRANSFERS),
        "layers": engine.catalogue.facts.num_layers,
        "max_rows": config.max_rows,
        "max_queue": config.max_queue,
        "max_steps": config.max_steps,
        "max_interventions": config.max_interventions,
    }
