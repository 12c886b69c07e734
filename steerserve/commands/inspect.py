"""`steerserve inspect`: what a folder on disk holds."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steerserve.commands.command import CommandParser, add_command
from steerserve.commands.inspect_sae import add_sae_flags, inspect_sae, show_saes
from steerserve.errors import ArtifactError


def add_to(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    """Add the command."""
    add_command(
        commands,
        "inspect",
        add_flags,
        "Show what a model, SAE or attribute folder holds. It is loaded and checked just as the server would; then "
        "facts, hashes, and the shape and norm of every tensor are shown. Of a model: whether it can be served, as "
        "what, what memory it takes, and what it lacks.",
        """
        steerserve inspect model made/model
        steerserve inspect sae made/saes/layer-4-mask
        steerserve inspect sae made/saes --model made/model --text texts.jsonl
        steerserve inspect attribute made/attributes/topic/sports --json
        """,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.set_defaults(run=run)
    parser.add_argument("kind", choices=sorted(INSPECTORS), metavar="KIND", help="model, sae or attribute")
    parser.add_argument("path", type=Path, metavar="PATH", help="the folder")
    parser.add_argument("--json", action="store_true", help="write one JSON object, not tables")
    add_sae_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load, check and show one folder."""
    if not arguments.path.is_dir():
        raise ArtifactError(f"{arguments.path} is not a folder")
    found = INSPECTORS[arguments.kind](arguments)
    if arguments.json:
        sys.stdout.write(json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    elif found["kind"] == "saes":
        show_saes(found)
    else:
        show(found)
    return 0


def inspect_model(folder: Path, tokenizer_folder: Path | None = None, denoiser: str | None = None) -> dict[str, Any]:
    """Facts of a model, as what it is served, what it lacks for that, and its tensors in the type they have on disk,
    which are read one at a time.

    A model without a tokenizer of its own is shown nevertheless, unless one is named. Raises ArtifactError for a folder
    that is no model of any known kind.
    """
    import torch

    from steerserve.engine.request.kv_cache import CACHES
    from steerserve.models import load_tokenizer, open_checkpoint, read_sampler_defaults, weights_sha256
    from steerserve.models.checkpoint.available_memory import amount, available_bytes
    from steerserve.models.checkpoint.placement import choose_dtype, type_name
    from steerserve.models.text.tokenizer import has_tokenizer
    from steerserve.runtime.load import check_defaults

    checkpoint = open_checkpoint(folder, denoiser=denoiser, place=tokenizer_folder)
    known, tensors = checkpoint.facts, dict(checkpoint.tensors)
    place = tokenizer_folder or (folder if has_tokenizer(folder) else None)
    tokenizer = load_tokenizer(place, known.family) if place else None
    lacks = [] if tokenizer else ["it has no tokenizer: --tokenizer DIR names one"]
    if tokenizer and tokenizer.get_vocab_size() > known.vocab_size:
        lacks.append(f"its tokenizer has {tokenizer.get_vocab_size()} tokens, the model {known.vocab_size}")
    defaults = read_sampler_defaults(folder, checkpoint.shell.defaults)
    try:
        check_defaults(folder, defaults, known)
    except ArtifactError as error:
        lacks.append(str(error))
    cpu = torch.device("cpu")
    dtype = choose_dtype("auto", cpu, checkpoint.dtype)
    need, available = checkpoint.parameters * dtype.itemsize, available_bytes(cpu)
    if available is not None and need > available:
        lacks.append(f"it takes {amount(need)} of memory in {type_name(dtype)}, {amount(available)} are available")
    facts = {
        "can_be_served": not lacks,
        "lacks": lacks,
        **asdict(known),
        "mask_token": tokenizer.id_to_token(known.mask_id) if tokenizer else None,
        "attention": checkpoint.shell.attention,
        "caches": list(CACHES) if known.keys else [],
        "sampler_defaults": asdict(defaults),
        "parameters": checkpoint.parameters,
        "dtype": type_name(checkpoint.dtype),
        "memory": f"{amount(need)} in {type_name(dtype)}, the type on this CPU",
        "tokenizer_pieces": tokenizer.get_vocab_size() if tokenizer else None,
        "sha256": weights_sha256(folder),
    }
    return {"kind": "model", "path": str(folder), "facts": facts, "tensors": _tensors(tensors)}


def inspect_attribute(folder: Path) -> dict[str, Any]:
    """Facts of an attribute, its sites, and its directions; the model it was made for need not be there."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from steerserve.pointers import refuse_pointer
    from steerserve.steering.attribute import load_attribute
    from steerserve.steering.probe import read_probe

    if not (folder / "attribute.json").is_file():
        raise ArtifactError(f"{folder} is no attribute: it has no attribute.json")
    for name in ("attribute.json", "directions.safetensors"):
        refuse_pointer(folder / name)
    try:
        raw = json.loads((folder / "attribute.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "directions.safetensors")
        made_for, layers, width = (
            raw["model_sha256"],
            max(map(int, raw["sites"])) + 1,
            len(next(iter(tensors.values()))),
        )
    except (OSError, ValueError, KeyError, TypeError, StopIteration, SafetensorError) as error:
        raise ArtifactError(f"{folder} is no attribute: {type(error).__name__}: {error}") from error
    probe = read_probe(folder)
    attribute = load_attribute(folder, made_for, max(layers, probe.layer + 1 if probe else 0), width)
    facts = {key: value for key, value in attribute.card().items() if key not in ("sites", "profile")}
    facts["sha256"] = attribute.sha256
    facts["has_profile"] = attribute.profile is not None
    facts["probe"] = probe.card() if probe else None
    for layer, site in attribute.sites.items():
        facts[f"layer {layer}"] = {
            "residual_norm": site.residual_norm,
            "sae": site.sae,
            "sae_sha256": site.sae_sha256,
            "features": {feature.index: round(feature.d, 3) for feature in site.features},
        }
    return {"kind": "attribute", "path": str(folder), "facts": facts, "tensors": _tensors(tensors)}


INSPECTORS: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "attribute": lambda arguments: inspect_attribute(arguments.path),
    "model": lambda arguments: inspect_model(
        arguments.path, *(getattr(arguments, f"ModelConfig.{name}", None) for name in ("tokenizer", "denoiser"))
    ),
    "sae": inspect_sae,
}


def _tensors(tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(tensor.shape), "norm": round(float(tensor.float().norm()), 4)}
        for name, tensor in sorted(tensors.items())
    ]


def show(found: Mapping[str, Any]) -> None:
    """Two tables: facts, tensors."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    facts = Table("fact", title=f"{found['kind']} {escape(found['path'])}", title_justify="left")
    facts.add_column("value", overflow="fold")
    for name, value in found["facts"].items():
        facts.add_row(name, escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    tensors = Table("tensor", "shape", title="tensors", title_justify="left")
    tensors.add_column("norm", justify="right")
    for row in found["tensors"]:
        tensors.add_row(escape(row["name"]), escape(str(row["shape"])), f"{row['norm']:.4g}")
    console = Console(highlight=False)
    console.print(facts)
    console.print(tensors)
