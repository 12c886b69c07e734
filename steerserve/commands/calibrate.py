"""`steerserve calibrate`: find attributes in labelled texts."""

import argparse
from pathlib import Path

from steerserve.commands.command import CommandParser, add_command, check_folders
from steerserve.commands.flags import FlagGroup
from steerserve.memory import keep_freed_memory

MODEL = FlagGroup("steerserve.config", "ModelConfig")
RECIPE = FlagGroup("steerserve.calibrate.run", "CalibrationRecipe")


def add_to(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    """Add the command."""
    add_command(
        commands,
        "calibrate",
        add_flags,
        "Find attributes that can be steered, from texts with labels. For each attribute: the SAE features that tell "
        "its texts from the others', a direction a layer, when during denoising it forms, and a default strength. "
        "Needs the extra: pip install 'steerserve[train]'.",
        "steerserve calibrate --model made/model --sae made/saes --data texts --out made/attributes",
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.set_defaults(run=run)
    group = parser.add_argument_group("folders")
    for name, text in {
        "model": "model folder",
        "sae": "folder of SAEs of this model",
        "data": "folder of .jsonl or .jsonl.gz files with a `text` and labels a line",
        "out": "folder of attributes to write",
    }.items():
        group.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=text)
    MODEL.add_to(parser, "model")
    RECIPE.add_to(parser, "recipe")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate every attribute of the recipe into the output folder."""
    check_folders(arguments, "model", "sae", "data")
    keep_freed_memory()

    from steerserve.calibrate.run import calibrate

    recipe, placed = RECIPE.build(arguments), MODEL.build(arguments)
    calibrate(arguments.model, arguments.sae, arguments.data, arguments.out, recipe, placed)
    return 0
