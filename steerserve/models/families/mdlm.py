"""The MDLM family: a DiT that gives the logits of clean tokens, in the layout of `kuleshov-group/mdlm-owt`.

Source: MDLM (arXiv 2406.07524): the SUBS parameterisation gives the mask token probability zero and carries visible
tokens over. The first is the sampler's ban of `forbidden_ids`, the second how every canvas is kept.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models.base import ModelFacts, SamplerDefaults, check_sizes, read_fields
from steerserve.models.families.dit import DitConfig, DitDiffusionLM, check_heads
from steerserve.models.families.dit_weights import adapt_dit
from steerserve.models.sigma import LogLinear


@dataclass(frozen=True)
class MdlmConfig:
    """Keys of `config.json` under their published names."""

    vocab_size: int
    model_length: int
    hidden_dim: int
    cond_dim: int
    n_blocks: int
    n_heads: int
    time_conditioning: bool = False
    mask_token_id: int | None = None
    eos_token_id: int | None = None
    bos_token_id: int | None = None

    @property
    def dit(self) -> DitConfig:
        return DitConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_dim,
            cond_dim=self.cond_dim,
            num_layers=self.n_blocks,
            num_heads=self.n_heads,
            conditional=self.time_conditioning,
        )


class MdlmDiffusionLM(DitDiffusionLM):
    """MDLM; without `time_conditioning` sigma is always 0, and the modulations are constants."""

    defaults = SamplerDefaults(temperature=1.0, order="random", transfer="ddpm_cache")

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "MdlmDiffusionLM":
        """Build from a parsed `config.json`; a missing key or an impossible value is an ArtifactError naming it.

        Unless the config names them, the mask is the last token, and the end and the beginning of a text the one before
        it, as in the published vocabulary: GPT-2's with a mask added.
        """
        config = _read(raw)
        # The authors train on chunks that begin and end with GPT-2's one special token: without it in front, the model
        # puts one there, which would end every text before it began.
        mask = config.vocab_size - 1 if config.mask_token_id is None else config.mask_token_id
        eos = mask - 1 if config.eos_token_id is None else config.eos_token_id
        facts = ModelFacts(
            family="mdlm",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_dim,
            num_layers=config.n_blocks,
            max_length=config.model_length,
            mask_id=mask,
            eos_id=eos,
            bos_id=eos if config.bos_token_id is None else config.bos_token_id,
            forbidden_ids=(mask,),
            sigma=LogLinear() if config.time_conditioning else None,
        )
        return cls(config.dit, facts)

    @classmethod
    def adapt(cls, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors under this package's names, as `adapt_dit` gives them."""
        return adapt_dit(_read(raw).dit, tensors)


def _read(raw: dict[str, Any]) -> MdlmConfig:
    """The family's keys of a parsed `config.json`, checked."""
    config = read_fields(MdlmConfig, raw, "mdlm")
    check_sizes(
        vocab_size=config.vocab_size,
        model_length=config.model_length,
        hidden_dim=config.hidden_dim,
        cond_dim=config.cond_dim,
        n_blocks=config.n_blocks,
        n_heads=config.n_heads,
    )
    check_heads(hidden_dim=config.hidden_dim, n_heads=config.n_heads)
    if not isinstance(config.time_conditioning, bool):
        raise ArtifactError(f"config.json: time_conditioning must be true or false, got {config.time_conditioning!r}")
    return config
