"""Hidden states of a diffusion model on noised text, gathered on disk for every layer and policy in one pass."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from steerserve.errors import ArtifactError
from steerserve.models.base import DiffusionLM, Sites, deciding
from steerserve.models.capture import layer_outputs
from steerserve.models.sigma import level_of_share
from steerserve.saes.sae import Policy
from steerserve.train.dlm import Documents, draw_masks


@dataclass(frozen=True)
class NoisedBatch:
    """Canvases with some tokens masked; everything is [rows, width] but `lengths` [rows]."""

    tokens: Tensor
    """Before masking."""
    canvas: Tensor
    """After masking: what the model sees."""
    lengths: Tensor
    masked: Tensor
    text: Tensor
    """True on text and on its first EOS; False on the BOS token, on padding and on the tail of further EOS."""

    def chosen(self, policy: Policy) -> Tensor:
        """The text positions of a policy, as a mask [rows, width]."""
        return self.text & (self.masked if policy == "mask" else ~self.masked)

    def share(self) -> Tensor:
        """Share of each row's text that is masked [rows], float32; 0 for a row without text."""
        return (self.masked & self.text).sum(1) / self.text.sum(1).clamp(min=1)


def noised_batches(
    documents: Documents, model: DiffusionLM, ratios: tuple[float, float], seed: int, batch_tokens: int
) -> Iterator[NoisedBatch]:
    """Endless noised crops whose mask ratios are uniform between the two given, spread evenly (low discrepancy).

    The BOS token and the EOS tail are seen by the model but are no text: their states hardly vary, and would fill
    features with nothing to steer.
    """
    low, high = ratios
    generator = torch.Generator().manual_seed(seed)
    for tokens, lengths, times in documents.batches(seed, 0, batch_tokens):
        width = tokens.shape[1]
        masked, _ = draw_masks(lengths, low + (high - low) * times, width, generator)
        ends = tokens == model.facts.eos_id
        ends_before = ends.cumsum(1) - ends.long()
        text = (torch.arange(width) < lengths[:, None]) & (ends_before == 0)
        text[:, 0] = False
        yield NoisedBatch(tokens, tokens.masked_fill(masked, model.facts.mask_id), lengths, masked, text)


def final_states(model: DiffusionLM, batch: NoisedBatch, sites: Sites | None = None) -> Tensor:
    """The final state that decides each token, ready for the head [rows, width, hidden_size], on the model's device.

    A family that takes a noise level gets that of each row's masked share.
    """
    device = next(model.parameters()).device
    schedule = model.facts.sigma
    sigma = None if schedule is None else level_of_share(schedule, batch.share()).to(device)
    return deciding(model(batch.canvas.to(device), batch.lengths.to(device), sites, sigma), model.facts.shift)


@torch.inference_mode()
def states(model: DiffusionLM, batch: NoisedBatch, layers: Sequence[int]) -> dict[int, Tensor]:
    """For each token the output of the layers where it is decided [rows, width, hidden_size], on the model's device,
    from a forward that ends at the deepest of them."""
    found = layer_outputs(layers, partial(final_states, model, batch))
    return {layer: deciding(hidden, model.facts.shift) for layer, hidden in found.items()}


class Store:
    """Hidden states [count, hidden_size] of one layer and policy as float16 in one file, in the order they came."""

    def __init__(self, path: Path, count: int, hidden_size: int, write: bool = False) -> None:
        shape = (count, hidden_size)
        self.path, self.filled = path, 0 if write else count
        self.rows = np.memmap(path, dtype=np.float16, mode="w+" if write else "r", shape=shape)

    def add(self, hidden: Tensor) -> int:
        """Append states [n, hidden_size], as many as there is room for; returns how many were taken."""
        taken = min(len(hidden), len(self.rows) - self.filled)
        half = hidden[:taken].half()
        if not bool(half.isfinite().all()):
            raise ArtifactError(
                f"{self.path.name}: hidden states up to {float(hidden.abs().max()):.3g} do not fit float16"
            )
        self.rows[self.filled : self.filled + taken] = half.cpu().numpy()
        self.filled += taken
        return taken

    def sample(self, ids: np.ndarray) -> Tensor:
        """States of the ids [n] in float32 [n, hidden_size]."""
        return torch.from_numpy(self.rows[ids]).float()

    def shuffled(self, seed: int, batch: int) -> Iterator[Tensor]:
        """Endless batches [batch, hidden_size] without replacement inside an epoch; the rest of an epoch is dropped."""
        if batch > len(self.rows):
            raise ValueError(f"batch must be at most the {len(self.rows)} states stored, got {batch}")
        random = np.random.default_rng(seed)
        while True:
            order = random.permutation(len(self.rows))
            for start in range(0, len(order) - batch + 1, batch):
                # Sorted reads run forward through the file; inside a batch the order means nothing.
                yield self.sample(np.sort(order[start : start + batch]))


def gather(
    model: DiffusionLM,
    batches: Iterator[NoisedBatch],
    wanted: Sequence[tuple[int, Policy]],
    count: int,
    directory: Path,
) -> Mapping[tuple[int, Policy], Store]:
    """`count` states for each (layer, policy) wanted; every forward feeds all of them. Files are replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    hidden_size = model.facts.hidden_size
    stores = {
        (layer, policy): Store(directory / f"layer-{layer}-{policy}.f16", count, hidden_size, write=True)
        for layer, policy in wanted
    }
    with tqdm(total=count * len(stores), unit="state", unit_scale=True, desc="activations") as bar:
        for batch in batches:
            due = {key: store for key, store in stores.items() if store.filled < count}
            if not due:
                break
            hidden = states(model, batch, sorted({layer for layer, _ in due}))
            for (layer, policy), store in due.items():
                bar.update(store.add(hidden[layer][batch.chosen(policy).to(hidden[layer].device)]))
    for store in stores.values():
        store.rows.flush()
    return stores
