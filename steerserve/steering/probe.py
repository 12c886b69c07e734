"""A probe: a classifier that tells from the model's own states of a finished text if the text has an attribute."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.numerics import aligned
from steerserve.pointers import refuse_pointer

FILE: Final = "probe.safetensors"
ENTRY: Final = "probe"
"""Entry of the file's metadata that holds everything but the weights, as JSON."""


@dataclass(frozen=True)
class Probe:
    """Logistic regression on the mean state of a text's tokens, none of them masked and nothing pushed.

    A linear probe as in Alain and Bengio (arXiv 1610.01644): log-odds = <weights, mean over tokens of h> + bias.
    """

    layer: int
    """Layer whose output it reads."""
    weights: Tensor = field(repr=False)
    """[hidden_size], float32."""
    bias: float
    accuracy: float
    """On texts it was not trained on, target and contrast counting the same."""
    texts: int
    """Texts it was trained on."""
    sha256: str = ""
    """SHA-256 of its file; empty before it is on disk."""

    def log_odds(self, mean: Tensor) -> Tensor:
        """Log of p / (1 - p) in nats [texts] that each text has the attribute, of mean states [texts, hidden_size]."""
        return mean.float() @ self.weights.to(mean.device) + self.bias

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON."""
        return {"layer": self.layer, "accuracy": self.accuracy, "texts": self.texts, "sha256": self.sha256}

    def save(self, folder: Path) -> None:
        """Write `probe.safetensors` into the folder of its attribute."""
        card = {"layer": self.layer, "bias": self.bias, "accuracy": self.accuracy, "texts": self.texts}
        # One entry: safetensors writes several in no fixed order, and the file's hash would not be the probe's.
        metadata = {ENTRY: json.dumps(card)}
        # In one go: a file that was begun would keep the attribute from being loaded.
        partial = folder / f"{FILE}.partial"
        save_file({"weights": self.weights.float().contiguous()}, partial, metadata)
        partial.rename(folder / FILE)


def load_probe(folder: Path, num_layers: int, hidden_size: int) -> Probe | None:
    """The probe in an attribute's folder, None without one; raises ArtifactError where it does not fit the model."""
    probe = read_probe(folder)
    if probe is not None and (not 0 <= probe.layer < num_layers or probe.weights.shape != (hidden_size,)):
        raise ArtifactError(
            f"{folder / FILE}: reads {list(probe.weights.shape)} states of layer {probe.layer}, which does not fit a "
            f"model of {num_layers} layers of size {hidden_size}"
        )
    return probe


def read_probe(folder: Path) -> Probe | None:
    """The probe in an attribute's folder, of any model, None without one; raises ArtifactError for a broken one."""
    path = folder / FILE
    if not path.exists():
        return None
    refuse_pointer(path)
    try:
        with safe_open(path, "pt") as opened:
            card, weights = json.loads((opened.metadata() or {})[ENTRY]), aligned(opened.get_tensor("weights").float())
        probe = Probe(
            int(card["layer"]),
            weights,
            float(card["bias"]),
            float(card["accuracy"]),
            int(card["texts"]),
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, SafetensorError) as error:
        raise ArtifactError(f"{path} is no probe: {type(error).__name__}: {error}") from error
    if not math.isfinite(probe.bias) or not bool(torch.isfinite(weights).all()):
        raise ArtifactError(f"{path}: weights and bias must be finite")
    if not 0 <= probe.accuracy <= 1 or probe.texts < 0:
        raise ArtifactError(
            f"{path}: accuracy must be between 0 and 1 and texts 0 or more, got {probe.accuracy} and {probe.texts}"
        )
    return probe
