"""Denoisers whose network `transformers` has: its own classes, run with attention both ways.

Nothing of a network is written again here. The library calls `attend_both_ways` for the attention of every layer, and
each layer's forward is wrapped, so that the pushes of a site act behind it. No code of a folder is run.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steerserve.errors import ArtifactError
from steerserve.models.attention import attend, padding_mask, taken
from steerserve.models.base import DiffusionLM, ModelFacts, Sites, check_sizes
from steerserve.models.families.denoiser import Denoiser, Token, Tokens
from steerserve.models.memory import Memory
from steerserve.models.pretrained import quiet_transformers
from steerserve.models.state_dict import leave_out_copies

ATTENTION: Final = "steerserve"
"""Name of `attend_both_ways` among the attention functions of `transformers`."""
_UNLIKE: Final = ("softcap", "s_aux", "position_bias")
"""What some networks pass to their attention and `attend` has not."""
_SCALED: Final = ("final_logit_softcapping", "logits_scaling", "logit_scale", "mup_enabled")
"""Settings of a config that change logits after the head."""
_COMPUTED: Final = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".position_ids")
"""Ends of the names of tensors that older files hold and every network computes."""
_EMBEDDINGS: Final = ("wte.weight", "embed_tokens.weight", "tok_embeddings.weight", "word_embeddings.weight")
_UNUSED: Final = ("bert.pooler.", "roberta.pooler.", "cls.seq_relationship.")
"""Parts of a pretrained encoder that predict no token."""
_WRAPPED: Final = {"denoise_model.": "transformer.", "embed_tokens.": "transformer.wte."}
"""DiffuGPT's names, which holds a GPT-2 in a class of its own, and GPT-2's."""


@dataclass
class _Running:
    """What the attention and the sites of one forward need to know."""

    sites: Sites | None
    mask: Tensor | None
    """Which keys may be attended to, as `padding_mask` gives it."""
    memory: Memory | None
    block: int | None
    """Length of the blocks between which attention is causal; None: a position sees all others."""
    attended: int = 0
    """Layers whose attention has been computed."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def masked(self, window: int | None, key: Tensor) -> Tensor | None:
        """The mask of a layer that sees the positions of key [..., width, head size] less than `window` away; None: all
        of them.

        A position sees itself, also where it is padding: a softmax over nothing would be no number, which spreads.
        """
        if self.block is not None:
            window = None
        elif window is None or window >= key.shape[2]:
            return self.mask
        if window not in self.masks:
            place = torch.arange(key.shape[2] if self.mask is None else self.mask.shape[3], device=key.device)
            apart = place[:, None] - place[None, :]
            if window is not None:
                seen = apart.abs() < window
            else:
                blocks = place // (self.block or 1)
                seen = blocks[:, None] >= blocks[None, :]
            self.masks[window] = seen[None, None] if self.mask is None else (seen & self.mask) | (apart == 0)
        return self.masks[window]


_RUNNING: ContextVar[_Running] = ContextVar("running")


def attend_both_ways(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` asks for it, each tensor [rows, heads, length, head size]: [rows, length, heads, head
    size]. The library's own mask is none where it does not know an attention function, and is not looked at."""
    del attention_mask
    running = _RUNNING.get()
    for name in _UNLIKE:
        if more.get(name) is not None:
            raise ArtifactError(f"attention with {name}, as in {type(module).__name__}, is not implemented")
    if running.memory is not None:
        key, value = running.memory.exchange(int(cast(Any, module.layer_idx)), key, value)
    # A decoder's window is of the text before it; what is run as a denoiser was trained without.
    window = None if getattr(module, "is_causal", True) else more.get("sliding_window")
    mixed = attend(query, key, value, running.masked(window, key), scaling)
    running.attended += 1
    return mixed.view(*mixed.shape[:2], query.shape[1], -1), None


class _Sited:
    """A layer's forward, and the site behind it."""

    def __init__(self, forward: Callable[..., Any], layer: int) -> None:
        self.forward, self.layer = forward, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.forward(*args, **kwargs)
        sites = _RUNNING.get().sites
        if sites is None:
            return out
        if isinstance(out, tuple):
            return (sites(self.layer, out[0]), *out[1:])
        return sites(self.layer, out)


class _WithoutWeights(TorchFunctionMode):
    """Makes a network whose weights take no memory and whose buffers, such as rotary frequencies, are computed.

    Layers allocate their weights by `torch.empty`, which is left to the meta device around this; everything else that
    makes a tensor makes it on the CPU.
    """

    MAKERS: Final = (torch.arange, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in self.MAKERS and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class HuggingFaceLM(DiffusionLM):
    """A network of `transformers` as a denoiser; sites are the outputs of its layers."""

    def __init__(self, raw: Mapping[str, Any], denoiser: Denoiser, tokens: Tokens) -> None:
        """raw: a parsed `config.json`; tokens: those of the tokenizer.

        Raises ArtifactError where `transformers` has no such network, or it is of a kind that is not implemented.
        """
        super().__init__()
        self.denoiser, self.defaults, self.template = denoiser, denoiser.defaults, denoiser.template
        config = _config(raw, denoiser)
        with _WithoutWeights():
            self.network: Any = _network(config)
        # GPT-2 warns of pad tokens, which every canvas ends with.
        self.network.config.pad_token_id = None
        for index, layer in enumerate(_layers(self.body, config)):
            layer.forward = _Sited(layer.forward, index)
        embeddings: Any = getattr(self.body, "embeddings", None)
        # RoBERTa counts positions from the one after its padding's.
        self._first: int = (
            embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0
        )
        windowed = not self.is_decoder and "sliding_attention" in (getattr(config, "layer_types", None) or ())
        self.facts = _facts(raw, config, denoiser, tokens, self._first, windowed)
        if self.facts.block is not None:
            self.attention = f"full within blocks of {self.facts.block} positions, causal between them"
        elif windowed:
            near = [index for index, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
            self.attention = f"full; at layers {', '.join(map(str, near))} within {config.sliding_window} positions"
        self._tied = dict(self.network.all_tied_weights_keys)
        self._untie()

    @property
    def body(self) -> Any:
        """The network without its head."""
        return self.network.base_model

    @property
    def is_decoder(self) -> bool:
        """True if the network was made to read from left to right."""
        return not type(self.network).__name__.endswith("ForMaskedLM")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights by the names of `transformers`, without those that are tied to others."""
        found = self.network.state_dict(*args, **kwargs)
        for name in self._tied:
            found.pop(kwargs.get("prefix", "") + name, None)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as torch does; buffers follow the weights to their device, and tied weights are tied again."""
        self._untie()
        found = self.network.load_state_dict(state_dict, strict, assign)
        device = next(self.parameters()).device
        for module in self.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        for name, source in self._tied.items():
            owner, _, leaf = name.rpartition(".")
            self.network.get_submodule(owner)._parameters[leaf] = self.network.get_parameter(source)
        return found

    def adapt(self, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]  # noqa: ARG002
        """The checkpoint's tensors under the names that `transformers` writes today, without what it computes and
        without tied weights that were written out."""
        prefix, wanted = self.network.base_model_prefix + ".", self.state_dict().keys() | self._tied.keys()
        named = {}
        for old, tensor in tensors.items():
            name = _renamed(old)
            # A file of the base model alone has its names without the prefix.
            name = name if name in wanted or prefix + name not in wanted else prefix + name
            if name in wanted or not (name.endswith(_COMPUTED) or name.startswith(_UNUSED)):
                named[name] = tensor
        return leave_out_copies(named, self._tied)

    def _untie(self) -> None:
        for name in self._tied:
            owner, _, leaf = name.rpartition(".")
            self.network.get_submodule(owner)._parameters.pop(leaf, None)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,
        sigma: Tensor | None = None,  # noqa: ARG002 (the interface's; this family takes no noise level)
        at: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, as `DiffusionLM.forward` states; every position is computed, whichever are asked for."""
        width = tokens.shape[1]
        position = torch.arange(width, device=tokens.device)[None]
        return taken(self._run(tokens, position, width, lengths, sites, None), at)

    def resume(
        self, tokens: Tensor, memory: Memory, lengths: Tensor | None = None, sites: Sites | None = None
    ) -> Tensor:
        """Final hidden states of some positions, as `DiffusionLM.resume` states."""
        whole = torch.arange(memory.width, device=tokens.device)[None]
        position = whole if memory.filled is None else memory.position
        return self._run(tokens, position, memory.width, lengths, sites, memory)

    def _run(
        self,
        tokens: Tensor,
        position: Tensor,
        width: int,
        lengths: Tensor | None,
        sites: Sites | None,
        memory: Memory | None,
    ) -> Tensor:
        running = _Running(sites, padding_mask(lengths, width, tokens.device), memory, self.facts.block)
        token = _RUNNING.set(running)
        try:
            out: Tensor = self.body(input_ids=tokens, position_ids=position + self._first, use_cache=False)[0]
        finally:
            _RUNNING.reset(token)
        if running.attended != self.facts.num_layers:
            raise ArtifactError(
                f"{self.denoiser.base}: {running.attended} of {self.facts.num_layers} layers compute attention as "
                "other networks of transformers do; the others cannot be made to attend both ways"
            )
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size]."""
        network = self.network
        if hasattr(network, "decoder") and hasattr(network, "head"):
            out: Tensor = network.decoder(network.head(hidden))
        else:
            out = network.cls(hidden) if hasattr(network, "cls") else network.lm_head(hidden)
        return out


@dataclass(frozen=True)
class HuggingFaceFamily:
    """Makes a `HuggingFaceLM` of a folder's config, as a family class makes its model."""

    denoiser: Denoiser
    tokens: Tokens

    def from_config(self, raw: dict[str, Any]) -> HuggingFaceLM:
        """The model without its weights; raises ArtifactError as `HuggingFaceLM` does."""
        return HuggingFaceLM(raw, self.denoiser, self.tokens)

    def resized(self, raw: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """A parsed `config.json` with the vocabulary of the weights: DiffuGPT's embedding got its mask token after the
        config was written."""
        sizes = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_EMBEDDINGS) and tensor.ndim == 2]
        return raw | {"vocab_size": sizes[0]} if sizes else raw


def _renamed(name: str) -> str:
    """The present name of a tensor."""
    for old, new in _WRAPPED.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _config(raw: Mapping[str, Any], denoiser: Denoiser) -> Any:
    """The config of `transformers` in a parsed `config.json`."""
    given = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map", "architectures")}
    with quiet_transformers() as transformers:
        if denoiser.base not in transformers.CONFIG_MAPPING:
            raise ArtifactError(f"transformers {transformers.__version__} has no network {denoiser.base!r}")
        try:
            config = transformers.AutoConfig.for_model(denoiser.base, **given)
        except Exception as error:  # transformers raises exceptions of many kinds for values that it refuses
            raise ArtifactError(f"config.json: {' '.join(str(error).split())}") from error
    for name in _SCALED:
        if getattr(config, name, None) not in (None, False, 1, 1.0):
            raise ArtifactError(f"config.json: {name} is {getattr(config, name)!r}; such logits are not implemented")
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ArtifactError(f"config.json: {denoiser.base} is a mixture of experts, which is not implemented")
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "num_hidden_layers"):
        raise ArtifactError(f"config.json: {denoiser.base} is no network of one stack of layers over tokens")
    return config


def _network(config: Any) -> Any:
    """The network of a config, which predicts tokens and whose attention is ours."""
    with quiet_transformers() as transformers:
        transformers.AttentionInterface.register(ATTENTION, attend_both_ways)
        kinds = (transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
        kind = next((kind[type(config)] for kind in kinds if type(config) in kind), None)
        if kind is None or not kind._supports_attention_backend:
            raise ArtifactError(f"config.json: {config.model_type} is no network that can be made to attend both ways")
        config._attn_implementation = ATTENTION
        try:
            return kind(config)
        except Exception as error:  # as above
            raise ArtifactError(f"config.json: {' '.join(str(error).split())}") from error


def _layers(body: nn.Module, config: Any) -> list[Any]:
    """The layers of a network, in order: the modules whose outputs `transformers` gives as hidden states."""
    told = (getattr(type(body), "_can_record_outputs", None) or {}).get("hidden_states")
    kind = getattr(told, "target_class", told)
    found = [module for module in body.modules() if isinstance(kind, type) and isinstance(module, kind)]
    if len(found) != config.num_hidden_layers:
        raise ArtifactError(
            f"config.json: {config.model_type} has {config.num_hidden_layers} layers, of which {len(found)} were "
            "found: the outputs of its layers cannot be steered"
        )
    return found


def _facts(
    raw: Mapping[str, Any], config: Any, denoiser: Denoiser, tokens: Tokens, first: int, windowed: bool
) -> ModelFacts:
    """Facts of a network; raises ArtifactError where no file names a mask token or an end of text."""
    longest: Any = getattr(config, "max_position_embeddings", None)
    check_sizes(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=longest,
    )
    kind, ids = raw.get("model_type"), tokens.roles
    mask = _id(denoiser.mask_token, tokens, "mask_token")
    mask = mask if mask is not None else raw.get("mask_token_id", ids.get("mask_token_id"))
    mask = tokens.vocabulary.get(denoiser.usual_mask) if mask is None else mask
    if mask is None:
        raise ArtifactError(
            f"config.json: {kind!r} names no mask token, and neither do the tokenizer's files: an autoregressive model "
            "is no denoiser. One that was trained as such is served with --denoiser mask_token=TOKEN,shift=0|1"
        )
    turn_end = tokens.vocabulary.get(denoiser.turn_end or "")
    # What pads the texts that a chat is trained on is an end too: the authors' models write it behind the answer.
    named = (ids.get("eos_token_id"), raw.get("eos_token_id"), ids.get("sep_token_id"), ids.get("pad_token_id"))
    ends = [end for end in dict.fromkeys(named) if end is not None]
    if not ends:
        raise ArtifactError(f"config.json: {kind!r} names no end of text, and neither do the tokenizer's files")
    block = denoiser.block
    if block is not None:
        check_sizes(block_size=block)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelFacts(
        family=kind if isinstance(kind, str) else denoiser.base,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        max_length=longest - first,
        mask_id=mask,
        eos_id=ends[0],
        bos_id=_id(denoiser.bos_token, tokens, "bos_token"),
        turn_end_id=turn_end,
        more_end_ids=tuple(end for end in ends[1:] if end != turn_end),
        shift=denoiser.shift,
        block=block,
        keys=None if windowed or block is not None else (heads, size),
    )


def _id(token: Token | None, tokens: Tokens, what: str) -> int | None:
    """The id of a token; raises ArtifactError where the vocabulary has none of that name."""
    if token is None or isinstance(token, int):
        return token
    found = tokens.vocabulary.get(token)
    if found is None:
        raise ArtifactError(
            f"the tokenizer's vocabulary has no {token!r}, which is the {what}; --denoiser {what}=TOKEN names another"
        )
    return found
