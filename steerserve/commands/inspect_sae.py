"""`steerserve inspect sae`: what an SAE on disk holds, and how well it reconstructs a model's states on text."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerserve.commands.flags import FlagGroup
from steerserve.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

    from steerserve.models import OpenedModel
    from steerserve.saes import SparseAutoencoder

MODEL = FlagGroup("steerserve.config", "ModelConfig", skip=("revision", "sha256"))

RATIOS = 8
"""Noised copies of each text; their mask ratios are spread evenly over LOW to HIGH (arXiv 2602.05859)."""
LOW, HIGH = 0.05, 0.5
TOKENS = 4096
"""Tokens of text after which no further text is read."""
CROP = 2048
"""Longer texts are cropped to so many tokens."""
STATES = 8192
"""States of each policy that are scored, at most."""

NAMES = {"mask": "masked", "visible": "visible"}


def add_sae_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only an SAE has."""
    group = parser.add_argument_group("of SAEs")
    group.add_argument("--sae-layers", metavar="L,L", help="of a folder of several: only those of these layers")
    group.add_argument("--sae-k", type=int, metavar="K", help="of a folder of several: only those of so many features")
    group.add_argument("--text", nargs="+", metavar="TEXT", help="texts, or files of them (.jsonl[.gz], or one a line)")
    group.add_argument("--model", type=Path, metavar="DIR", help="model whose states on the texts are reconstructed")
    MODEL.add_to(parser, "model of --text")


def inspect_sae(arguments: argparse.Namespace) -> dict[str, Any]:
    """Facts of an SAE, how alive its features are, and its tensors; of a folder of several, a list of them."""
    from steerserve.saes.reading import describe, load_sae
    from steerserve.saes.tree import check_sweeps, find_saes, select

    path: Path = arguments.path
    if (arguments.text is None) != (arguments.model is None):
        raise ArtifactError("--text and --model need each other: SAEs are scored on a model's states on texts")
    folders = find_saes(path)
    if not folders:
        raise ArtifactError(f"{path} has no SAE in it")
    described = {name: describe(folder) for name, folder in folders.items()}
    layers = None if arguments.sae_layers is None else parse_layers(arguments.sae_layers)
    chosen = select(path, described, layers, arguments.sae_k)
    hidden: Mapping[int, Mapping[str, Tensor]] = {}
    if arguments.text is not None:
        from steerserve.models import open_model

        check_sweeps(folders, {name: described[name] for name in chosen})
        opened = open_model(arguments.model, MODEL.build(arguments))
        saes = [load_sae(folders[name], name) for name in chosen]
        for sae in saes:
            sae.facts.check_model(opened.facts.hidden_size, opened.facts.num_layers, opened.sha256)
        hidden = states_on(opened, list(texts_of(arguments.text)), sorted({sae.facts.layer for sae in saes}))
    if list(folders.values()) == [path]:
        sae = load_sae(path)
        return {"kind": "sae", "path": str(path), "facts": facts_of(sae, hidden), "tensors": _tensors(sae.state_dict())}
    rows: list[dict[str, Any]] = []
    for name in chosen:
        one = described[name]
        row = {"id": name, "layer": one.layer, "policy": one.policy, "k": one.k, "activation": one.activation}
        rows.append(row | (facts_of(load_sae(folders[name], name), hidden) if hidden else {}))
    return {"kind": "saes", "path": str(path), "saes": rows}


def parse_layers(text: str) -> list[int]:
    """Layers of `3,4`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ArtifactError(f"--sae-layers: {text!r}, but whole numbers with commas between are needed") from error


def facts_of(sae: "SparseAutoencoder", hidden: Mapping[int, Mapping[str, "Tensor"]]) -> dict[str, Any]:
    """Facts, norms of the decoder's rows, what feature statistics say, and scores on the states of the SAE's layer."""
    norms = sae.decoder_norm
    facts = asdict(sae.facts)
    facts["decoder_norm"] = {
        name: round(float(value), 4)
        for name, value in (("min", norms.min()), ("mean", norms.mean()), ("max", norms.max()))
    }
    if sae.stats is not None:
        facts |= {
            "dead_features": int((sae.stats.density == 0).sum()),
            "active_features_per_token": round(float(sae.stats.density.sum()), 3),
            "largest_activation": round(float(sae.stats.max_act.max()), 4),
        }
    for policy, states in hidden.get(sae.facts.layer, {}).items():
        facts[f"at {NAMES[policy]} positions"] = scores(sae, states)
    return facts


def scores(sae: "SparseAutoencoder", states: "Tensor") -> dict[str, float]:
    """Explained variance, active features per token and dead share over hidden states [N, hidden_size]."""
    from steerserve.train.sae_quality import reconstruction

    found, _ = reconstruction(sae, states)
    names = {"l0": "active_features_per_token", "states": "tokens"}
    return {names.get(name, name): round(value, 4) for name, value in found.items()}


def states_on(opened: "OpenedModel", texts: Sequence[str], layers: Sequence[int]) -> dict[int, dict[str, "Tensor"]]:
    """States [N, hidden_size] of the layers on noised copies of the texts, at masked and at visible positions."""

    from steerserve.calibrate.texts.noising import noised_texts
    from steerserve.saes.sae import Policy
    from steerserve.train.activations import states

    policies: tuple[Policy, ...] = ("mask", "visible")
    lengths = [min(CROP, len(one.ids)) for one in opened.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    read = [text for text, before in zip(texts, accumulate(lengths, initial=0), strict=False) if before < TOKENS]
    ratios = [LOW + (HIGH - LOW) * (i + 0.5) / RATIOS for i in range(RATIOS)]
    model = opened.load(opened.checkpoint.folder.resolve().name)
    kept: dict[int, dict[str, list[Tensor]]] = {layer: {policy: [] for policy in policies} for layer in layers}
    for batch, _ in noised_texts(read, opened.tokenizer, opened.facts, ratios, CROP, seed=0, batch_tokens=TOKENS):
        found = states(model, batch, layers)
        for layer, of_layer in kept.items():
            for policy in policies:
                of_layer[policy].append(found[layer].cpu()[batch.chosen(policy)].float())
    return {
        layer: {policy: _sample(policy, parts) for policy, parts in of_layer.items()}
        for layer, of_layer in kept.items()
    }


def _sample(policy: str, parts: Sequence["Tensor"]) -> "Tensor":
    import torch

    every = torch.cat([torch.empty(0), *parts])
    if len(every) < 2:
        raise ArtifactError(f"the texts leave {len(every)} {NAMES[policy]} positions to score, 2 are needed")
    return every[torch.linspace(0, len(every) - 1, min(len(every), STATES)).long()]


def texts_of(given: Sequence[str]) -> Iterator[str]:
    """Texts given as they are or in files: the `text` of each row of a `.jsonl[.gz]`, else one a line."""
    from steerserve.train import corpus

    for one in given:
        path = Path(one)
        # A text may be longer than a file's name can be.
        if len(one) > 255 or not path.is_file():
            yield one
        elif ".jsonl" in path.suffixes:
            yield from (row["text"] for row in corpus.rows(path))
        else:
            yield from (line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def show_saes(found: Mapping[str, Any]) -> None:
    """One table of several SAEs."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    scored = {at: policy for policy in NAMES.values() if (at := f"at {policy} positions") in found["saes"][0]}
    columns = ("id", "layer", "policy", "k", "activation")
    table = Table(title=f"SAEs in {escape(found['path'])}", title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for policy in scored.values():
        for name in ("explained", "active"):
            table.add_column(f"{policy}\n{name}", justify="right", no_wrap=True)
    for row in found["saes"]:
        cells = ["" if row[name] is None else str(row[name]) for name in columns]
        for at in scored:
            cells += [f"{row[at]['explained_variance']:.4f}", f"{row[at]['active_features_per_token']:.1f}"]
        table.add_row(*map(escape, cells))
    Console(highlight=False).print(table)


def _tensors(tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(tensor.shape), "norm": round(float(tensor.float().norm()), 4)}
        for name, tensor in sorted(tensors.items())
    ]
