"""Models, features and attributes small enough to be made on the spot, of the real classes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from schedulers import CommitmentProfile
from steerserve.config import EngineConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.events import Committed, Done, Event, Failed, Result
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from steerserve.models import DiffusionLM
from steerserve.models.families.bert import BertConfig, BertDiffusionLM
from steerserve.models.families.denoiser import Tokens, denoiser_of
from steerserve.models.families.dream import DreamConfig, DreamDiffusionLM
from steerserve.models.families.huggingface import HuggingFaceLM
from steerserve.models.families.llada import LladaConfig, LladaDiffusionLM
from steerserve.models.families.llada2 import Llada2Config, Llada2DiffusionLM
from steerserve.models.families.lladamoe import LladaMoeConfig, LladaMoeDiffusionLM
from steerserve.models.families.mdlm import MdlmDiffusionLM
from steerserve.models.families.sedd import SeddDiffusionLM
from steerserve.saes import FeatureStats, SaeFacts, SparseAutoencoder
from steerserve.saes.activation import TopK
from steerserve.steering.attribute import Attribute, AttributeSite, FeatureWeight, load_attribute
from steerserve.steering.vectors import NamedVector

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, EOS, MASK = range(5)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("the", "team", "king", "won", "lost", "match", "city", "ship", "and", "then")
PIECES = (*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS, *(f"##{word}" for word in WORDS))
PIECES = (*PIECES, *(str(i) for i in range(97 - len(PIECES))))
VOCAB, HIDDEN, CONTEXT, FEATURES = len(PIECES), 32, 96, 48
MODEL_SHA = "5eed" * 16

BERT = BertConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=CONTEXT,
    mask_token_id=MASK,
    sep_token_id=EOS,
    cls_token_id=CLS,
    pad_token_id=PAD,
    unk_token_id=UNK,
)
LLADA = LladaConfig(
    d_model=HIDDEN,
    n_layers=3,
    n_heads=4,
    vocab_size=VOCAB,
    max_sequence_length=CONTEXT,
    mask_token_id=MASK,
    eos_token_id=EOS,
    mlp_hidden_size=48,
    embedding_size=VOCAB + 3,
    rope_theta=500000.0,
)
LLADA_MOE = LladaMoeConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=3,
    num_attention_heads=4,
    expert_intermediate_size=24,
    num_experts=6,
    num_experts_per_tok=2,
    moe_layer_freq=(1, 1, 1),
    rope_theta=50000.0,
    max_position_embeddings=CONTEXT,
    mask_token_id=MASK,
    eos_token_id=EOS,
)
LLADA2 = Llada2Config(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    max_position_embeddings=CONTEXT,
    rope_theta=600000.0,
    num_shared_experts=1,
    block_size=8,
    mask_token_id=MASK,
    eos_token_id=EOS,
)
DREAM = DreamConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=CONTEXT,
    rope_theta=1e6,
    mask_token_id=MASK,
    eos_token_id=EOS,
)


def tokenizer() -> Tokenizer:
    """WordPiece over PIECES: every lower-case word can be spelled."""
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    made.add_special_tokens(list(SPECIAL))
    return made


def randomise(model: DiffusionLM, seed: int, deviation: float = 0.35) -> None:
    """Weights so large that the model is sure of something, and every norm and bias matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if norm else deviation * noise)
    model.requires_grad_(False)
    model.eval()


def bert(seed: int = 0, **changes: Any) -> BertDiffusionLM:
    """A BERT of random weights; `changes` to BERT's config."""
    model = BertDiffusionLM(replace(BERT, **changes))
    randomise(model, seed)
    return model


def llada(seed: int = 0, **changes: Any) -> LladaDiffusionLM:
    """A LLaDA of random weights; `changes` to LLADA's config."""
    model = LladaDiffusionLM(replace(LLADA, **changes))
    randomise(model, seed)
    return model


def dream(seed: int = 0, **changes: Any) -> DreamDiffusionLM:
    """A Dream of random weights; `changes` to DREAM's config."""
    model = DreamDiffusionLM(replace(DREAM, **changes))
    randomise(model, seed)
    return model


def lladamoe(seed: int = 0, **changes: Any) -> LladaMoeDiffusionLM:
    """A LLaDA-MoE of random weights; `changes` to LLADA_MOE."""
    model = LladaMoeDiffusionLM(replace(LLADA_MOE, **changes))
    randomise(model, seed)
    for bias in model.buffers():
        bias.copy_(torch.linspace(0, 0.3, len(bias)))
    return model


def llada2(seed: int = 0, **changes: Any) -> Llada2DiffusionLM:
    """A LLaDA2 of random weights, which never predicts its mask token; `changes` to LLADA2."""
    model = Llada2DiffusionLM(replace(LLADA2, **changes))
    randomise(model, seed)
    for bias in model.buffers():
        bias.copy_(torch.linspace(0.3, 0, len(bias)))
    if not model.config.tie_word_embeddings:
        # As no published model does: the loop of LLaDA2.1 would go on for ever.
        model.lm_head.weight[MASK] = 0.0
    return model


def mdlm(seed: int = 0, **changes: Any) -> MdlmDiffusionLM:
    """An MDLM of random weights with the ids of `tokenizer`; `changes` to its `config.json`."""
    raw = {
        "vocab_size": VOCAB,
        "model_length": CONTEXT,
        "hidden_dim": HIDDEN,
        "cond_dim": 32,
        "n_blocks": 3,
        "n_heads": 4,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
    }
    model = MdlmDiffusionLM.from_config(raw | changes)
    randomise(model, seed, 0.2)
    return model


def sedd(
    seed: int = 0,
    vocab_size: int = VOCAB,
    noise: str = "loglinear",
    sigmas: tuple[float, float] = (1e-4, 20.0),
    scale_by_sigma: bool = True,
) -> SeddDiffusionLM:
    """A SEDD of random weights; its mask is the last of the vocab_size tokens and its end of text the one before."""
    sizes = {"hidden_size": HIDDEN, "cond_dim": 32, "length": CONTEXT, "n_blocks": 3, "n_heads": 4}
    raw = {
        "tokens": vocab_size - 1,
        "graph": {"type": "absorb"},
        "noise": {"type": noise, "sigma_min": sigmas[0], "sigma_max": sigmas[1]},
        "model": {"type": "ddit", "scale_by_sigma": scale_by_sigma} | sizes,
    }
    model = SeddDiffusionLM.from_config(raw)
    randomise(model, seed, 0.2)
    return model


HUGGING_FACE: dict[str, dict[str, Any]] = {
    "a2d-qwen2": {"num_key_value_heads": 2},
    "a2d-qwen3": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {},
    "llama": {"num_key_value_heads": 4},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": CLS, "sep_token_id": EOS},
    "roberta": {},
    "sdar": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "block_size": 4},
    "Fast_dLLM_Qwen": {"num_key_value_heads": 2, "tie_word_embeddings": True, "bd_size": 8},
}
"""Keys of the config of each published denoiser whose network transformers has, beside those that all have."""


def huggingface_config(name: str, **changes: Any) -> dict[str, Any]:
    """The `config.json` of a denoiser by its published `model_type`; its special tokens are those of `tokenizer`."""
    return (
        {
            "model_type": name,
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": CONTEXT,
            "mask_token_id": MASK,
            "eos_token_id": EOS,
            "bos_token_id": CLS,
            "pad_token_id": PAD,
        }
        | HUGGING_FACE.get(name, {})
        | changes
    )


def huggingface(name: str, seed: int = 0, **changes: Any) -> HuggingFaceLM:
    """A network of transformers with random weights, run as the denoiser of that `model_type`."""
    raw = huggingface_config(name, **changes)
    denoiser = denoiser_of(raw, None)
    assert denoiser is not None
    model = HuggingFaceLM(raw, replace(denoiser, bos_token=None), Tokens())
    model.load_state_dict(model.state_dict())
    randomise(model, seed)
    return model


def sae(
    layer: int, seed: int = 0, policy: Any = "mask", name: str | None = None, features: int = FEATURES
) -> SparseAutoencoder:
    """A TopK SAE of random weights with statistics; feature 0 was never active."""
    generator = torch.Generator().manual_seed(100 + seed)
    shapes = {"W_enc": (HIDDEN, features), "b_enc": (features,), "W_dec": (features, HIDDEN), "b_dec": (HIDDEN,)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    most = 1 + torch.rand(features, generator=generator)
    most[0] = 0.0
    stats = FeatureStats(max_act=most, mean_act=most / 2, density=torch.full((features,), 0.1))
    identity = name or f"layer-{layer}-{policy}"
    facts = SaeFacts(identity, layer, HIDDEN, features, "topk", sha256="ff" * 32, policy=policy, k=8)
    return SparseAutoencoder(facts, tensors, TopK(8), stats)


def attribute(
    folder: Path, name: str, layers: Sequence[int] = (1,), seed: int = 0, cost: bool = False, **changes: Any
) -> Attribute:
    """An attribute that rises over the first half of denoising, saved to and loaded from `folder`."""
    generator = torch.Generator().manual_seed(200 + seed)
    curve = tuple(min(1.0, i / 32) ** 2 for i in range(65))
    profile = CommitmentProfile(
        curve, samples=8, cost=tuple(2.0 - i / 64 for i in range(64)) if cost else None
    ).to_json()
    fields: dict[str, Any] = {
        "name": name,
        "model_sha256": MODEL_SHA,
        "layers": tuple(layers),
        "strength": 0.4,
        "unit": "residual",
        "scope": "masked",
        "schedule": {"type": "commitment"},
        "sites": {
            layer: AttributeSite(5.0 + layer, f"layer-{layer}-mask", "ff" * 32, (FeatureWeight(3, 0.9, 1e-4, 1.0),))
            for layer in layers
        },
        "directions": {
            (layer, kind): unit(torch.randn(HIDDEN, generator=generator))
            for layer in layers
            for kind in ("sae", "diff_means")
        },
        "profile": profile,
        "provenance": {"texts": 12},
    } | changes
    Attribute(**fields).save(folder)
    return load_attribute(folder, MODEL_SHA, num_layers=BERT.num_hidden_layers, hidden_size=HIDDEN)


def unit(vector: Tensor) -> Tensor:
    return vector.div(vector.norm())


def catalogue(model: DiffusionLM, folder: Path) -> Catalogue:
    """Two attributes, one of them at two layers, and SAEs for both policies; `folder` must be empty."""
    attributes = [
        attribute(folder / "sports", "topic/sports", (1,), seed=1),
        attribute(folder / "old", "register/archaic", (0, 2), seed=2, cost=True, schedule={"type": "uniform"}),
    ]
    saes = [sae(1, seed=1), sae(2, seed=2), sae(2, seed=3, policy="visible")]
    norms = {layer: site.residual_norm for one in attributes for layer, site in one.sites.items()}
    return Catalogue(
        model.facts,
        {one.name: one for one in attributes},
        {one.facts.id: one for one in saes},
        norms,
        vectors={"warm": vector()},
    )


def vector() -> NamedVector:
    """A named vector at two layers, stored at norms 3 and 4."""
    generator = torch.Generator().manual_seed(300)
    layers = {layer: unit(torch.randn(HIDDEN, generator=generator)) for layer in (0, 2)}
    return NamedVector("warm", layers, {0: 3.0, 2: 4.0}, "aa" * 32, "warm.safetensors")


def engine(model: DiffusionLM, folder: Path, **config: Any) -> DiffusionEngine:
    """A whole engine over `model`, with `catalogue`."""
    return DiffusionEngine(model, tokenizer(), catalogue(model, folder), EngineConfig(**config))


def drain(served: DiffusionEngine) -> list[Event]:
    """Step until nothing is left; every event in order."""
    events: list[Event] = []
    for _ in range(10_000):
        if not served.batcher.unfinished and not served.scoring and not served.aborted:
            return events
        events += served.step()
    raise AssertionError("the engine does not come to an end")


def results(events: Sequence[Event]) -> dict[str, Result]:
    """Results of the rows that finished, by request id."""
    return {event.request_id: event.result for event in events if isinstance(event, Done)}


def terminal(events: Sequence[Event]) -> list[str]:
    """Request ids of the terminal events, in order."""
    return [event.request_id for event in events if isinstance(event, Done | Failed)]


def run(served: DiffusionEngine, *params: GenerationParams) -> list[tuple[Request, Result]]:
    """Admit, run together and drain; requests with their results."""
    requests = [served.admit(one) for one in params]
    served.add(requests)
    found = results(drain(served))
    return [(request, found[request.id]) for request in requests]


def solo(served: DiffusionEngine, params: GenerationParams) -> tuple[Request, list[Event]]:
    """Run one row alone; its request and its events."""
    request = served.admit(params)
    served.add([request])
    return request, drain(served)


def tokens_of(served: DiffusionEngine, params: GenerationParams) -> list[int]:
    """The response that a row alone comes to."""
    [(request, _)] = run(served, params)
    return request.response


def replayed(events: list[Event], request: Request) -> tuple[list[int], dict[int, int]]:
    """The response as the committed events build it, and the step of each position."""
    tokens, when = [MASK] * request.params.max_tokens, {}
    for event in events:
        if isinstance(event, Committed) and event.request_id == request.id:
            for position, token in zip(event.positions, event.tokens, strict=True):
                assert tokens[position] == MASK, "a position was committed twice"
                tokens[position], when[position] = token, event.step
    return tokens, when
