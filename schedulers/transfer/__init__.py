"""Transfers: how many masked positions commit at a step."""

from collections.abc import Mapping
from typing import Final

from schedulers.choice import Choice, build
from schedulers.transfer.base import NoiseSchedule, Quota, Transfer
from schedulers.transfer.cosine import Cosine
from schedulers.transfer.entropy_bound import EntropyBound
from schedulers.transfer.independent import Analytic, Ddpm, Euler, Origin
from schedulers.transfer.joint_threshold import JointThreshold
from schedulers.transfer.linear import Linear
from schedulers.transfer.remdm import Remdm
from schedulers.transfer.threshold import Threshold
from schedulers.transfer.timesteps import Timesteps

TRANSFERS: Final[Mapping[str, type[Transfer]]] = {
    "linear": Linear,
    "cosine": Cosine,
    "threshold": Threshold,
    "joint_threshold": JointThreshold,
    "entropy_bound": EntropyBound,
    "timesteps": Timesteps,
    "origin": Origin,
    "ddpm": Ddpm,
    "ddpm_cache": Ddpm,
    "remdm": Remdm,
    "analytic": Analytic,
    "euler": Euler,
}


def build_transfer(choice: Choice) -> Transfer:
    """The transfer that `choice` names; raises ValueError."""
    return build("transfer", TRANSFERS, choice)


__all__ = [
    "TRANSFERS",
    "Analytic",
    "Cosine",
    "Ddpm",
    "EntropyBound",
    "Euler",
    "JointThreshold",
    "Linear",
    "NoiseSchedule",
    "Origin",
    "Quota",
    "Remdm",
    "Threshold",
    "Timesteps",
    "Transfer",
    "build_transfer",
]
