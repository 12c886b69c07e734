"""A DiT checkpoint's tensors under this package's names: one prefix, checked shapes, constant modulations folded."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from steerserve.errors import ArtifactError
from steerserve.models.families.dit import ROTARY_BASE, Dit, DitConfig, SigmaMap
from steerserve.models.llama import rotary_frequencies
from steerserve.models.state_dict import check_layout
from steerserve.numerics import aligned

_PREFIXES = ("", "backbone.", "model.", "module.")
"""What published and converted checkpoints put before every name."""

_OWN_PREFIX = "backbone."
_FREQUENCIES = "rotary_emb.inv_freq"
_MODULATION = "adaLN_modulation"


def adapt_dit(config: DitConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of `DitDiffusionLM`.

    Raises ArtifactError naming, as the checkpoint does, what is missing, unexpected or misshapen, and rotary
    frequencies of another base. Where the model does not follow the noise level, sigma is 0 in every forward: each
    modulation is then the constant W silu(sigma_map(0)) + b, in float32, and the layers that gave it are left out.
    """
    with torch.device("meta"):
        layout = {name: tensor.shape for name, tensor in Dit(replace(config, conditional=True)).state_dict().items()}
    prefix = max(_PREFIXES, key=lambda prefix: sum(prefix + name in tensors for name in layout))
    rest = dict(tensors)
    frequencies = rest.pop(prefix + _FREQUENCIES, None)
    check_layout("the checkpoint", {prefix + name: shape for name, shape in layout.items()}, rest)
    if frequencies is not None:
        _check_frequencies(prefix + _FREQUENCIES, frequencies, config.hidden_size // config.num_heads)
    bare = {name: rest[prefix + name] for name in layout}
    return {_OWN_PREFIX + name: tensor for name, tensor in (bare if config.conditional else _folded(bare)).items()}


@torch.no_grad()
def _folded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every modulation computed at sigma 0 [parts * hidden_size], float32."""
    inside = {
        name.removeprefix("sigma_map."): aligned(tensor.float())
        for name, tensor in tensors.items()
        if name.startswith("sigma_map.")
    }
    with torch.device("meta"):
        sigma_map = SigmaMap(len(inside["mlp.2.bias"]))
    sigma_map.load_state_dict(inside, assign=True)
    condition = sigma_map(torch.zeros(1, device=inside["mlp.2.bias"].device))[0]
    folded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")
        if not owner.endswith(_MODULATION):
            if not name.startswith("sigma_map."):
                folded[name] = tensor
        elif kind == "weight":
            folded[f"{owner}.constant"] = F.linear(condition, aligned(tensor.float()), tensors[f"{owner}.bias"].float())
    return folded


def _check_frequencies(name: str, got: Tensor, head_size: int) -> None:
    expected = rotary_frequencies(head_size, ROTARY_BASE, got.device)
    if got.shape != expected.shape:
        raise ArtifactError(f"misshapen tensor: {name} is {list(got.shape)}, expected {list(expected.shape)}")
    # A half-precision file rounds the frequencies; any other base is further off than that rounding.
    rtol = 1e-2 if got.element_size() < 4 else 1e-5
    if not torch.allclose(got.float(), expected, rtol=rtol, atol=0):
        raise ArtifactError(f"{name} holds other rotary frequencies than those of base 10000, the only one implemented")
