"""The small interface every model family implements."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from steerserve.errors import ArtifactError
from steerserve.models.memory import Memory
from steerserve.models.sigma import Sigma

Config = TypeVar("Config")
Choice = str | Mapping[str, Any]
"""A name, or `{"type": name, ...options}`."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a checkpoint that the engine needs; read from its config, never assumed."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_length: int
    """Longest canvas in tokens, prompt included."""
    mask_id: int
    eos_id: int
    bos_id: int | None = None
    """Token put before every prompt, or None where the family uses none."""
    forbidden_ids: tuple[int, ...] = ()
    """Special tokens that are never text: the sampler gives them probability zero."""
    turn_end_id: int | None = None
    """Token that ends a chat turn, where the family has one beside the end of text."""
    more_end_ids: tuple[int, ...] = ()
    """Further tokens that the checkpoint's files say a text ends at."""
    shift: int = 0
    """The state that decides token j stands at j - shift (at 0 where that is before the canvas)."""
    sigma: Sigma | None = None
    """The noise schedule, where the forward takes the noise level or the samplers need it."""
    parameterisation: Literal["logits", "score"] = "logits"
    """What `head` gives: logits of the token, or log ratios p(token) / p(mask) (SEDD)."""
    scale_by_sigma: bool = False
    """True if log ratios are `head` minus log(expm1 sigma) and log(vocab_size - 1) (SEDD)."""

    block: int | None = None
    """Length of the blocks, counted from the start of the canvas, between which attention is causal; None: a position
    attends to all others."""
    keys: tuple[int, int] | None = None
    """Key-value heads of a layer and their size, where the forward can `resume` from those it made before."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: end of text, end of turn, and those that the files name beside them."""
        turn = () if self.turn_end_id is None else (self.turn_end_id,)
        return tuple(dict.fromkeys((self.eos_id, *turn, *self.more_end_ids)))


@dataclass(frozen=True)
class SamplerDefaults:
    """How a model is sampled where a request does not say: its family's defaults, then its `generation_config.json`."""

    temperature: float = 1.0
    top_p: float = 1.0
    order: Choice = "confidence"
    transfer: Choice = "linear"
    ignore_eos: bool = False
    top_k: int | None = None


class Sites(Protocol):
    """Called by a forward at every layer's output; it may change the hidden state or only read it."""

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden [rows, length, hidden_size] -> the same shape; the same object where nothing is to be done."""
        ...


class DiffusionLM(nn.Module):
    """A bidirectional model that predicts the tokens behind the masks of a canvas."""

    facts: ModelFacts
    defaults: SamplerDefaults = SamplerDefaults()
    attention: str = "full"
    """What a position attends to, in words."""
    template: Mapping[str, Any] = {}
    """Variables that the chat template is rendered with."""

    @classmethod
    def adapt(cls, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG003 (interface)
        """A checkpoint's tensors under the model's own `state_dict` names: unchanged, unless the family's names differ.

        raw is the parsed `config.json`; tensors are keyed by their names in the file, in the file's dtype. Called
        before the strict comparison; where a family renames, it raises ArtifactError naming by the file's own names
        what is missing, unexpected or misshapen.
        """
        return tensors

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,
        sigma: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states.

        tokens [rows, length] int64; lengths [rows] int64, the real tokens of each row (None: all of them),
        padding is on the right and is never attended to; sites is called after each layer; sigma [rows] float32, the
        noise level, needed where `facts.sigma` is set and not read elsewhere; at [rows, K] int64: the positions whose
        states are asked for, a multiple of 16 of them, to which the last layer's queries and all that follows are then
        confined, and sites is not called after that layer; None: all.
        Returns [rows, length or K, hidden_size], normalised and ready for `head`, with the same bits either way on CPU.
        """
        raise NotImplementedError

    def resume(
        self, tokens: Tensor, memory: Memory, lengths: Tensor | None = None, sites: Sites | None = None
    ) -> Tensor:
        """Final hidden states of some positions, which attend to the keys and values kept of the others as well.

        tokens [rows, length] at `memory.position`; lengths [rows] are those of the whole canvases. Where the memory is
        of whole canvases this is `forward`, and fills it. Returns [rows, length, hidden_size]. Only where `facts.keys`
        is set.
        """
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of hidden states [..., hidden_size]; call it on the masked positions only."""
        raise NotImplementedError


def deciding(states: Tensor, shift: int) -> Tensor:
    """The state that decides each token: states [rows, length, ...] moved `shift` places to the right, the first kept.

    Row j of the result is row j - shift of the states, or row 0 (Dream's `cat([l[:, :1], l[:, :-1]])`).
    """
    return (
        states if shift == 0 else torch.cat([states[:, :1].expand(-1, shift, *states.shape[2:]), states[:, :-shift]], 1)
    )


def read_fields(kind: type[Config], given: Mapping[str, Any], family: str) -> Config:
    """A family's config dataclass from those keys of a parsed `config.json` that it names, other keys left aside.

    Raises ArtifactError listing the keys that the family needs and the file lacks.
    """
    known = fields(kind)  # type: ignore[arg-type]
    needed = [one.name for one in known if one.default is MISSING and one.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise ArtifactError(f"config.json has no {', '.join(missing)}, which the {family} family needs")
    return kind(**{one.name: given[one.name] for one in known if one.name in given})


def check_fixed(raw: Mapping[str, Any], family: str, fixed: Mapping[str, Any]) -> None:
    """Raise ArtifactError where a config asks for a variant of the family that is not implemented."""
    for name, allowed in fixed.items():
        if raw.get(name, allowed) != allowed:
            raise ArtifactError(f"config.json: {name} is {raw[name]!r}, the {family} family implements {allowed!r}")


def check_sizes(**sizes: object) -> None:
    """Raise ArtifactError naming the size of a config that is no whole number above 0."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ArtifactError(f"config.json: {name} must be a whole number above 0, got {size!r}")
