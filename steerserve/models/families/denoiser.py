"""How a network that `transformers` has is run as a denoiser: the published ones by `model_type`, others as flags say.

Sources: dLLM (arXiv 2602.22661) for the `a2d-` models and the chats of BERTs; DiffuGPT and DiffuLLaMA (arXiv
2410.17891); SDAR (arXiv 2510.06303); Fast-dLLM v2 (arXiv 2509.26328).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from steerserve.errors import ArtifactError
from steerserve.models.base import SamplerDefaults

Token = str | int
"""A token of a vocabulary, or its id."""


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer's files say of tokens."""

    roles: Mapping[str, int] = field(default_factory=dict)
    """Ids of special tokens: `mask_token_id` and so on."""
    vocabulary: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Denoiser:
    """What a network's own config does not say of it. A token that is None is taken from the folder's files."""

    base: str
    """The `model_type` by which `transformers` knows the network."""
    shift: int = 0
    """The state that decides token j stands at j - shift."""
    mask_token: Token | None = None
    """The token that stands where nothing is written yet."""
    usual_mask: str = ""
    """The mask token's name in the vocabulary, where no file gives it that role."""
    bos_token: Token | None = None
    """The token put before every prompt; None: none is, whatever the files name."""
    block: int | None = None
    """Length of the blocks between which attention is causal; None: a position sees all others."""
    turn_end: str | None = None
    """The token that ends a chat turn, where the vocabulary has it."""
    defaults: SamplerDefaults = field(default_factory=SamplerDefaults)
    """How the authors sample it."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """Variables that the authors render the chat template with."""


# The settings of dLLM's own examples.
_GREEDY = SamplerDefaults(temperature=0.0, order="confidence", transfer="linear")
_DYNAMIC = SamplerDefaults(temperature=1.0, order="confidence", transfer={"type": "threshold", "value": 0.85})
_QWEN: dict[str, Any] = {
    "usual_mask": "<|mask|>",
    "turn_end": "<|im_end|>",
    "defaults": _GREEDY,
    "template": {"enable_thinking": False},
}

PUBLISHED: Mapping[str, Denoiser] = {
    "a2d-qwen2": Denoiser("qwen2", **_QWEN),
    "a2d-qwen3": Denoiser("qwen3", **_QWEN),
    "a2d-llama": Denoiser("llama", usual_mask="<|mask|>", turn_end="<|eot_id|>", defaults=_GREEDY),
    "modernbert": Denoiser("modernbert", defaults=_GREEDY),
    "roberta": Denoiser("roberta", defaults=_GREEDY),
    # Its folders say the length of their blocks, and were trained with four tokens where they do not.
    "sdar": Denoiser("qwen3", block=4, usual_mask="<|MASK|>", turn_end="<|im_end|>", defaults=_DYNAMIC),
    # Its own loop takes a block's first token alone, and goes through a block by eights.
    "Fast_dLLM_Qwen": Denoiser(
        "qwen2",
        shift=1,
        block=32,
        usual_mask="|<MASK>|",
        turn_end="<|im_end|>",
        defaults=SamplerDefaults(temperature=0.0, order="confidence", transfer={"type": "threshold", "value": 0.9}),
    ),
    # Every prompt of theirs begins with the tokenizer's BOS. The settings are those of their inference scripts.
    "gpt2": Denoiser(
        "gpt2",
        shift=1,
        bos_token="<|endoftext|>",
        defaults=SamplerDefaults(temperature=0.95, top_p=0.9, order="random", transfer={"type": "origin", "eps": 1e-9}),
    ),
    "llama": Denoiser(
        "llama",
        shift=1,
        bos_token="<s>",
        defaults=SamplerDefaults(temperature=0.9, top_p=0.9, order="random", transfer={"type": "origin", "eps": 1e-9}),
    ),
}
"""Published denoisers by the `model_type` of their `config.json`. Those of `gpt2` and `llama` are DiffuGPT and
DiffuLLaMA: their vocabulary has a mask token, which an autoregressive model's has not."""

_BLOCKS = ("block_size", "block_length", "bd_size")
"""Keys of a config for the length of its blocks."""
SAID = ("attention", "base", "block_length", "bos_token", "mask_token", "shift")
"""What `--denoiser` takes."""


def denoiser_of(raw: Mapping[str, Any], said: str | None) -> Denoiser | None:
    """The denoiser that a parsed `config.json` is of, changed by what a person says of it; None where neither knows it
    as one.

    said: the value of `--denoiser`, see `read_denoiser`.
    """
    kind = raw.get("model_type")
    published = PUBLISHED.get(kind) if isinstance(kind, str) else None
    if published is not None and published.block is not None:
        own = next((raw[name] for name in _BLOCKS if raw.get(name) is not None), published.block)
        published = replace(published, block=own)
    if said is None:
        return published
    given = read_denoiser(said)
    base = given.pop("base", published.base if published else kind)
    if not isinstance(base, str):
        raise ArtifactError(f"config.json: model_type is {kind!r}; --denoiser base=NAME says which network it is")
    return replace(published, base=base, **given) if published else Denoiser(base, **given)


def read_denoiser(said: str) -> dict[str, Any]:
    """The fields of `Denoiser` in text such as `mask_token=<|mask|>,shift=1,attention=full`.

    A token of digits only is an id. Raises ArtifactError naming the key, its value and what is allowed.
    """
    given: dict[str, Any] = {}
    for part in said.split(","):
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals or key not in SAID or not value:
            raise ArtifactError(f"--denoiser: {part.strip()!r} is no key=value with a key of {', '.join(SAID)}")
        if key in given:
            raise ArtifactError(f"--denoiser: {key} is given twice")
        given[key] = value
    attention, block = given.pop("attention", None), given.pop("block_length", None)
    if attention not in (None, "full", "block"):
        raise ArtifactError(f"--denoiser: attention must be full or block, got {attention!r}")
    if (attention == "block") != (block is not None):
        raise ArtifactError("--denoiser: attention=block and block_length=N go together")
    if block is not None and (not block.isdecimal() or int(block) < 1):
        raise ArtifactError(f"--denoiser: block_length must be a whole number above 0, got {block!r}")
    if attention is not None:
        given["block"] = None if block is None else int(block)
    if given.get("shift", "0") not in ("0", "1"):
        raise ArtifactError(f"--denoiser: shift must be 0 or 1, got {given['shift']!r}")
    for key in ("shift", "mask_token", "bos_token"):
        if key in given and given[key].isdecimal():
            given[key] = int(given[key])
    return given
