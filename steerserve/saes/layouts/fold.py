"""Fold what layouts do around an encoder into the weights, so that every SAE follows the one definition.

Tensors are by name, as SparseAutoencoder has them; each function returns new ones and changes none.
"""

from collections.abc import Mapping

from torch import Tensor

from steerserve.errors import ArtifactError


def gated(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Rewrite a gated SAE (arXiv 2404.16014) with W_enc, b_gate, b_mag and r_mag as a JumpReLU, and give its threshold.

    With `x = (h - b_dec) W_enc` its magnitude is `x exp(r_mag) + b_mag`, our pre-activation; its gate `x + b_gate > 0`
    is then a threshold on that (arXiv 2407.14435, section 3).
    """
    growth = tensors["r_mag"].exp()
    held = {**tensors, "W_enc": tensors["W_enc"] * growth, "b_enc": tensors["b_mag"]}
    return held, tensors["b_mag"] - growth * tensors["b_gate"]


def plain_input(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rewrite an SAE that encodes `h W_enc + b_enc` as one that subtracts b_dec first: its bias is `b_enc + b_dec
    W_enc`."""
    return {**tensors, "b_enc": tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]}


def scaled_input(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Rewrite an SAE of states times `factor` as one of raw states; activations stay as they are."""
    return {
        **tensors,
        "W_enc": tensors["W_enc"] * factor,
        "W_dec": tensors["W_dec"] / factor,
        "b_dec": tensors["b_dec"] / factor,
    }


def unit_decoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply each pre-activation by the norm of its decoder row, and divide the row by it; needs a positively
    homogeneous activation, or one that is meant of the scaled pre-activations."""
    norm = decoder_norms(tensors["W_dec"])
    return {
        **tensors,
        "W_enc": tensors["W_enc"] * norm,
        "b_enc": tensors["b_enc"] * norm,
        "W_dec": tensors["W_dec"] / norm[:, None],
    }


def decoder_norms(decoder: Tensor) -> Tensor:
    """Norms [features] of the rows of W_dec; an ArtifactError where one is zero, as in a file that was cut short."""
    norm: Tensor = decoder.norm(dim=1)
    if not bool((norm > 0).all()):
        zero = int((norm == 0).sum())
        raise ArtifactError(f"W_dec: row {int(norm.argmin())} is zero ({zero} of {len(norm)} are): no feature has such")
    return norm
