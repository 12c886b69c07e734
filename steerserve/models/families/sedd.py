"""The SEDD family: a DiT that gives log ratios p(token) / p(mask), in the layout of `louaaron/sedd-small` and medium.

Source: SEDD (arXiv 2310.16834), with the absorbing graph, and the authors' code.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models.base import ModelFacts, SamplerDefaults, check_sizes
from steerserve.models.families.dit import DitConfig, DitDiffusionLM, check_heads
from steerserve.models.families.dit_weights import adapt_dit
from steerserve.models.sigma import Geometric, LogLinear, Sigma

_NEEDED = (
    *("tokens", "graph.type", "noise.type"),
    *("model.hidden_size", "model.cond_dim", "model.length", "model.n_blocks", "model.n_heads", "model.scale_by_sigma"),
)
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "graph.type": ("absorb",),
    "noise.type": ("loglinear", "geometric"),
    "model.type": ("ddit",),
    "model.scale_by_sigma": (True, False),
}


@dataclass(frozen=True)
class SeddConfig:
    """What the model needs of a published `config.json`."""

    dit: DitConfig
    length: int
    noise: Sigma
    scale_by_sigma: bool


class SeddDiffusionLM(DitDiffusionLM):
    """SEDD over the absorbing graph; every forward takes the noise level."""

    defaults = SamplerDefaults(order="random", transfer="analytic")

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "SeddDiffusionLM":
        """Build from a parsed `config.json`; an ArtifactError names the key that is missing or not implemented.

        The graph adds the mask as the last token; the one before it is the end of text, as in GPT-2's vocabulary.
        """
        config = _read(raw)
        vocabulary = config.dit.vocab_size
        facts = ModelFacts(
            family="sedd",
            vocab_size=vocabulary,
            hidden_size=config.dit.hidden_size,
            num_layers=config.dit.num_layers,
            max_length=config.length,
            mask_id=vocabulary - 1,
            eos_id=vocabulary - 2,
            forbidden_ids=(vocabulary - 1,),
            sigma=config.noise,
            parameterisation="score",
            scale_by_sigma=config.scale_by_sigma,
        )
        return cls(config.dit, facts)

    @classmethod
    def adapt(cls, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors under this package's names, as `adapt_dit` gives them."""
        return adapt_dit(_read(raw).dit, tensors)


def log_score(logits: Tensor, sigma: Tensor, tokens: Tensor, vocab_size: int, scale_by_sigma: bool) -> Tensor:
    """Log ratios log p(token) / p(current token) of what `SeddDiffusionLM.head` gives, at least float32.

    logits [rows, ..., vocab_size], sigma [rows] above 0, tokens [rows, ...] the current ones, whose own entry is 0;
    vocab_size counts the mask. With scale_by_sigma the head leaves out the mean of the ratio of a masked position,
    1 / ((e^sigma - 1) (vocab_size - 1)), which is put back here. Source: SEDD (arXiv 2310.16834), the authors' code.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale_by_sigma:
        # e^sigma - 1 in float64, where a small sigma keeps its digits and a large one does not overflow.
        level = torch.expm1(sigma.double()).log() + math.log(vocab_size - 1)
        scores = scores - level.to(scores.dtype).reshape(-1, *[1] * tokens.ndim)
    return scores.scatter(-1, tokens[..., None], 0.0)


def _read(raw: dict[str, Any]) -> SeddConfig:
    """The family's keys of a parsed `config.json`, checked and named by their path in it."""
    given: dict[str, Any] = {"tokens": raw["tokens"]} if "tokens" in raw else {}
    for name in ("graph", "noise", "model"):
        section = raw.get(name)
        if not isinstance(section, dict):
            raise ArtifactError(f"config.json: {name} must be an object, got {section!r}")
        given |= {f"{name}.{key}": value for key, value in section.items()}
    needed = (*_NEEDED, "noise.sigma_min", "noise.sigma_max") if given.get("noise.type") == "geometric" else _NEEDED
    if missing := [name for name in needed if name not in given]:
        raise ArtifactError(f"config.json has no {', '.join(missing)}, which the sedd family needs")
    for name, allowed in _ALLOWED.items():
        if name in given and given[name] not in allowed:
            raise ArtifactError(
                f"config.json: {name} is {given[name]!r}, the sedd family implements {' or '.join(map(repr, allowed))}"
            )
    sizes = ("tokens", "model.hidden_size", "model.cond_dim", "model.length", "model.n_blocks", "model.n_heads")
    check_sizes(**{name: given[name] for name in sizes})
    check_heads(**{name: given[name] for name in ("model.hidden_size", "model.n_heads")})
    return SeddConfig(
        dit=DitConfig(
            vocab_size=given["tokens"] + 1,
            hidden_size=given["model.hidden_size"],
            cond_dim=given["model.cond_dim"],
            num_layers=given["model.n_blocks"],
            num_heads=given["model.n_heads"],
            conditional=True,
        ),
        length=given["model.length"],
        noise=_noise(given),
        scale_by_sigma=given["model.scale_by_sigma"],
    )


def _noise(given: dict[str, Any]) -> Sigma:
    if given["noise.type"] == "loglinear":
        return LogLinear(eps=1e-3)
    low, high = given["noise.sigma_min"], given["noise.sigma_max"]
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not 0 < low < high < math.inf:
        raise ArtifactError(
            f"config.json: noise.sigma_min and noise.sigma_max must be two numbers above 0, the second the larger, "
            f"got {low!r} and {high!r}"
        )
    return Geometric(low=float(low), high=float(high))
