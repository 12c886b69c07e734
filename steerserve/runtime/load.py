"""Put a server's parts together from folders on disk: model, SAEs, attributes, engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import schedulers
from schedulers import JointProfile
from steerserve.config import BackendConfig, EngineConfig, ModelConfig, SaeConfig
from steerserve.digests import files_sha256
from steerserve.engine.admission.admit import admit
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.admission.joint_file import load_joint
from steerserve.engine.admission.validate import check_method
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.features import LoadedFeatures
from steerserve.engine.forward.graphs.graphed import GraphedLM
from steerserve.engine.forward.graphs.recorder import CudaRecorder
from steerserve.engine.vllm.engine import VllmEngine
from steerserve.engine.vllm.features import FarFeatures
from steerserve.errors import ArtifactError, RequestError
from steerserve.models import ModelFacts, OpenedModel, SamplerDefaults, open_model
from steerserve.models.checkpoint.placement import type_name
from steerserve.numerics import round_rows_alike
from steerserve.runtime.backends import Folders, backend_facts, check_backend, check_graphs, vllm_engine
from steerserve.runtime.cards import attribute_card, capabilities, sae_card, vector_card
from steerserve.runtime.self_test import check_steering
from steerserve.saes import SparseAutoencoder, load_saes
from steerserve.saes.labels import read_labels
from steerserve.saes.tree import find_saes
from steerserve.server.service import Service
from steerserve.steering.attribute import Attribute, load_attributes
from steerserve.steering.vectors import NamedVector, load_vectors

BUNDLED = Path(__file__).parents[1] / "bundled"


@dataclass(frozen=True)
class Runtime:
    """A loaded engine and the service a server is built from."""

    engine: DiffusionEngine
    service: Service

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.engine.decode(ids)


def load_runtime(
    model: Path | None,
    saes: Path | None,
    attributes: Sequence[Path] | None,
    config: EngineConfig,
    model_config: ModelConfig | None = None,
    say: Callable[[str], None] | None = None,
    sae_config: SaeConfig | None = None,
    vectors: Sequence[Path] = (),
    backend: BackendConfig | None = None,
    check: Callable[[Callable[[GenerationParams], Any], int], None] | None = None,
) -> Runtime:
    """Load, check that everything belongs together, and test that steering takes; raises ArtifactError.

    Without a model the bundled one is loaded with its SAEs and attributes, and the folders of attributes add to these;
    a model of one's own comes with the SAEs and attributes named beside it, or with none; vectors are files or folders
    of directions by name. Everything that can be refused is, before the weights are loaded; `say` is told then what
    they take.
    check: called before the weights are loaded with what admits rows and the length of the longest canvas; may raise.
    """
    model_config, sae_config = model_config or ModelConfig(), sae_config or SaeConfig()
    backend = backend or BackendConfig()
    check_backend(backend, model_config)
    round_rows_alike()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if model is None:
        model = BUNDLED / "model"
        saes, attributes = saes or BUNDLED / "saes", [BUNDLED / "attributes", *(attributes or ())]
    opened = open_model(model, model_config)
    check_graphs(config, backend, opened.device)
    facts, digest, defaults = opened.facts, opened.sha256, opened.defaults
    check_defaults(model, defaults, facts)
    if saes is None and sae_config != SaeConfig():
        raise ArtifactError("SAEs are chosen by layer or k, but no folder of SAEs is named")
    loaded_saes = load_saes(saes, sae_config.sae_layers, sae_config.sae_k) if saes is not None else {}
    for sae in loaded_saes.values():
        sae.facts.check_model(facts.hidden_size, facts.num_layers, digest)
    if saes is not None and not loaded_saes:
        raise ArtifactError(f"{saes} holds no SAE")
    loaded, joint = all_attributes(attributes or (), digest, facts, say)
    named: dict[str, NamedVector] = {}
    for place in vectors:
        more = load_vectors(place, facts.num_layers, facts.hidden_size)
        if twice := sorted(named.keys() & more.keys()):
            raise ArtifactError(f"{place}: vectors named {twice} have been loaded from another place already")
        named |= more
    check_attributes(loaded, loaded_saes)
    norms = residual_norms(loaded, loaded_saes)
    name, longest = served_name(model, model_config), min(facts.max_length, config.max_canvas)
    # On the CPU the SAEs are in memory already, and what is available is without them.
    beside = 0 if opened.device.type == "cpu" else sum(map(sae_bytes, loaded_saes.values()))
    labels = {} if saes is None else sae_labels(saes, loaded_saes)
    if check is not None:
        known = Catalogue(facts, loaded, loaded_saes, norms, defaults, named, joint)
        check(partial(admit, catalogue=known, tokenizer=opened.tokenizer, config=config), longest)
    if backend.engine == "vllm":
        catalogue = Catalogue(facts, loaded, loaded_saes, norms, defaults, named, joint)
        engine: DiffusionEngine = vllm_engine(opened, catalogue, config, backend, Folders(model, saes), sae_config)
    else:
        lm = opened.load(name, say, beside)
        lm = GraphedLM(lm, CudaRecorder(opened.device)) if config.cuda_graphs else lm
        loaded_saes = {sae_id: sae.to(opened.device) for sae_id, sae in loaded_saes.items()}
        catalogue = Catalogue(facts, loaded, loaded_saes, norms, defaults, named, joint)
        engine = DiffusionEngine(lm, opened.tokenizer, catalogue, config)
        check_steering(engine)
    features = LoadedFeatures(engine, labels) if loaded_saes else None
    if loaded_saes and isinstance(engine, VllmEngine):
        features = FarFeatures(engine, labels)
    service = Service(
        engine=engine,
        model_id=name,
        created=int((model / "config.json").stat().st_mtime),
        decode=engine.decode,
        vocabulary=engine.vocabulary,
        end_ids=frozenset(facts.end_ids),
        max_length=longest,
        load=lambda: {
            "queue_length": len(engine.waiting) + len(engine.scoring),
            "running_rows": len(engine.running),
            "max_queue": config.max_queue,
            "max_rows": config.max_rows,
        },
        model_card={
            "family": facts.family,
            "sha256": digest,
            "config_sha256": files_sha256([model / "config.json"]),
            "sha256_pinned": model_config.sha256 is not None,
            "revision": model_config.revision,
            "dtype": type_name(opened.dtype),
            "device": str(opened.device),
            "max_model_len": longest,
            "num_layers": facts.num_layers,
            "hidden_size": facts.hidden_size,
            "vocab_size": facts.vocab_size,
            "sampler_defaults": asdict(defaults),
            "parameters": opened.checkpoint.parameters,
        },
        attributes={one.name: attribute_card(one) for one in loaded.values()},
        saes={sae_id: sae_card(sae, norms) for sae_id, sae in loaded_saes.items()},
        vectors={one.name: vector_card(one, norms) for one in named.values()},
        capabilities=capabilities(engine) | backend_facts(backend),
        bos_id=facts.bos_id,
        features=features,
        chat=chat(opened),
    )
    return Runtime(engine, service)


def all_attributes(
    folders: Sequence[Path], model_sha256: str, facts: ModelFacts, say: Callable[[str], None] | None
) -> tuple[dict[str, Attribute], JointProfile | None]:
    """The attributes of every folder by name, and the joint profile of the last folder that has one.

    Raises ArtifactError for a folder without attributes, and for two attributes of one name.
    """
    loaded: dict[str, Attribute] = {}
    profiles: dict[Path, JointProfile] = {}
    for folder in folders:
        attributes = load_attributes(folder, model_sha256, facts.num_layers, facts.hidden_size)
        if not attributes:
            raise ArtifactError(f"{folder} holds no attribute")
        if twice := sorted(loaded.keys() & attributes.keys()):
            raise ArtifactError(f"{folder}: attributes named {twice} have been loaded from another folder already")
        loaded |= attributes
        profile = load_joint(folder, model_sha256, attributes)
        if profile is not None:
            profiles[folder] = profile
    *others, last = profiles or (None,)
    if others and say is not None:
        say(f"joint allocation is by {last}/joint.json, not by that of {', '.join(map(str, others))}")
    return loaded, None if last is None else profiles[last]


def served_name(model: Path, config: ModelConfig) -> str:
    """The name that requests give a model: the chosen one, else `bundled` or its folder's."""
    own = model.resolve() == (BUNDLED / "model").resolve()
    return config.served_name or ("bundled" if own else model.resolve().name)


def chat(opened: OpenedModel) -> Callable[[Sequence[Mapping[str, Any]]], str] | None:
    """The prompt of a conversation by the model's chat template, without the BOS that every prompt gets anyway."""
    template, bos = opened.chat, opened.facts.bos_id
    if template is None:
        return None
    start = "" if bos is None else opened.tokenizer.id_to_token(bos) or ""
    return lambda messages: template.render(messages).removeprefix(start)


def sae_labels(directory: Path, saes: dict[str, SparseAutoencoder]) -> dict[str, Mapping[int, str]]:
    """Labels of the features of each SAE by index, where its folder has any."""
    folders = find_saes(directory)
    return {name: read_labels(folders[name], sae.facts.features) for name, sae in saes.items()}


def sae_bytes(sae: SparseAutoencoder) -> int:
    """Memory that an SAE takes."""
    return sum(buffer.numel() * buffer.element_size() for buffer in sae.buffers())


def check_defaults(folder: Path, defaults: SamplerDefaults, facts: ModelFacts) -> None:
    """Raise ArtifactError for an order or transfer in `generation_config.json` that is not known, or not for this
    model."""
    try:
        order, transfer = schedulers.build_order(defaults.order), schedulers.build_transfer(defaults.transfer)
        check_method(facts, order, transfer, blocks=1)
    except (ValueError, RequestError) as error:
        raise ArtifactError(f"{folder}/generation_config.json: {error}") from error


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
    # An SAE of masked positions has the last word, and one of visible ones none: their states differ in norm.
    usable = sorted((sae.facts for sae in saes.values() if sae.facts.policy != "visible"), key=lambda f: f.policy or "")
    stated = {facts.layer: facts.metadata.get("residual_norm") for facts in usable}
    norms = {layer: float(norm) for layer, norm in stated.items() if isinstance(norm, int | float) and norm > 0}
    return norms | {layer: site.residual_norm for one in attributes.values() for layer, site in one.sites.items()}
