"""Put a server's parts together from folders on disk: model, SAEs, attributes, engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import schedulers
from steerserve.config import BackendConfig, EngineConfig, ModelConfig, SaeConfig
from steerserve.digests import files_sha256
from steerserve.engine.admission.admit import admit
from steerserve.engine.admission.validate import check_method
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.effects import LoadedEffects
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
from steerserve.runtime.backends import Folders, check_backend, check_graphs, vllm_engine
from steerserve.runtime.self_test import check_steering
from steerserve.runtime.steering import Cards, SteeringReload, SteeringSources
from steerserve.saes import SparseAutoencoder, load_saes
from steerserve.saes.feature_store import FEATURES, FeatureStore
from steerserve.saes.labels import read_labels
from steerserve.saes.tree import find_saes
from steerserve.server.service import Service

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
    sources = SteeringSources(tuple(attributes or ()), tuple(vectors), facts, digest, loaded_saes)
    catalogue = sources.catalogue(defaults, say)
    name, longest = served_name(model, model_config), min(facts.max_length, config.max_canvas)
    # On the CPU the SAEs are in memory already, and what is available is without them.
    beside = 0 if opened.device.type == "cpu" else sum(map(sae_bytes, loaded_saes.values()))
    labels = {} if saes is None else sae_labels(saes, loaded_saes)
    stores = {} if saes is None else feature_stores(saes, loaded_saes)
    if check is not None:
        check(partial(admit, catalogue=catalogue, tokenizer=opened.tokenizer, config=config), longest)
    if backend.engine == "vllm":
        engine: DiffusionEngine = vllm_engine(opened, catalogue, config, backend, Folders(model, saes), sae_config)
    else:
        lm = opened.load(name, say, beside)
        lm = GraphedLM(lm, CudaRecorder(opened.device)) if config.cuda_graphs else lm
        sources = replace(sources, saes={sae_id: sae.to(opened.device) for sae_id, sae in loaded_saes.items()})
        catalogue = replace(catalogue, saes=sources.saes)
        engine = DiffusionEngine(lm, opened.tokenizer, catalogue, config)
        check_steering(engine)
    features = LoadedFeatures(engine, labels, stores) if loaded_saes else None
    if loaded_saes and isinstance(engine, VllmEngine):
        features = FarFeatures(engine, labels, stores)
    cards = Cards.of(engine, backend)
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
        attributes=cards.attributes,
        saes=cards.saes,
        vectors=cards.vectors,
        capabilities=cards.capabilities,
        bos_id=facts.bos_id,
        features=features,
        effects=None if isinstance(engine, VllmEngine) else LoadedEffects(engine),
        chat=chat(opened),
        revision=lambda: engine.catalogue.revision,
        artifacts=(*sources.attributes, *sources.vectors),
        reload=SteeringReload(engine, opened.tokenizer, sources, cards, backend, longest),
    )
    return Runtime(engine, service)


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


def feature_stores(directory: Path, saes: dict[str, SparseAutoencoder]) -> dict[str, FeatureStore]:
    """What was found out about the features of each SAE, where its folder has it."""
    folders = {name: folder / FEATURES for name, folder in find_saes(directory).items() if name in saes}
    return {
        name: FeatureStore.open(path, saes[name].facts.features, saes[name].facts.sha256)
        for name, path in folders.items()
        if path.exists()
    }


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
