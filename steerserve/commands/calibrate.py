"""`steerserve calibrate`: find attributes in labelled texts; or measure what pushing those of a folder does."""

import argparse
from pathlib import Path
from typing import Any

from steerserve.commands.command import CommandParser, add_command, check_folders
from steerserve.commands.flags import FlagGroup
from steerserve.errors import SteerserveError
from steerserve.memory import keep_freed_memory

MODEL = FlagGroup("steerserve.config", "ModelConfig")
RECIPE = FlagGroup("steerserve.calibrate.run", "CalibrationRecipe")
SHARED = ("judge_texts", "order", "transfer", "temperature", "rows", "seed")
"""Fields of the recipe that a measurement takes as well."""
PROFILE = FlagGroup("steerserve.calibrate.measure", "ProfileRecipe", skip=SHARED)


def add_to(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    """Add the command."""
    add_command(
        commands,
        "calibrate",
        add_flags,
        "Find attributes that can be steered, from texts with labels. For each attribute: the SAE features that tell "
        "its texts from the others', a direction a layer, when during denoising it forms, and a default strength. "
        "With --profile instead: measure what pushing each attribute of a folder does and costs over denoising, alone "
        "and together, and write it into the folder. Needs the extra: pip install 'steerserve[train]'.",
        """
        steerserve calibrate --model made/model --sae made/saes --data texts --out made/attributes
        steerserve calibrate --model made/model --data texts --profile made/attributes
        """,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.set_defaults(run=run)
    group = parser.add_argument_group("folders")
    for name, text in {
        "model": "model folder",
        "data": "folder of .jsonl or .jsonl.gz files with a `text` and labels a line",
    }.items():
        group.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=text)
    for name, text in {
        "sae": "folder of SAEs of this model; needed without --profile",
        "out": "folder of attributes to write; needed without --profile",
        "profile": "folder of attributes to measure instead: s, c and rho of each, joint.json, and a plot of each",
    }.items():
        group.add_argument(f"--{name}", type=Path, metavar="DIR", help=text)
    MODEL.add_to(parser, "model")
    RECIPE.add_to(parser, f"recipe (with --profile only {_flags(SHARED)})")
    PROFILE.add_to(parser, "measured profile (with --profile)")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate every attribute of the recipe into the output folder, or measure those of a folder."""
    measured = arguments.profile is not None
    given, others = RECIPE.given(arguments), PROFILE.given(arguments)
    if measured:
        folders = [name for name in ("sae", "out") if getattr(arguments, name) is not None]
        unused = [*folders, *(name for name in given if name not in SHARED)]
        if unused:
            raise SteerserveError(f"--profile measures attributes as they are: leave out {_flags(unused)}")
    else:
        if missing := [name for name in ("sae", "out") if getattr(arguments, name) is None]:
            raise SteerserveError(f"{_flags(missing)} must be given, or --profile")
        if others:
            raise SteerserveError(f"{_flags(list(others))} must be given with --profile only")
    check_folders(arguments, "model", "sae", "data", "profile")
    keep_freed_memory()
    placed: Any = MODEL.build(arguments)
    if measured:
        from steerserve.calibrate.measure import measure

        recipe = PROFILE.build(arguments, **given)
        measure(arguments.model, arguments.profile, arguments.data, recipe, placed)
        return 0

    from steerserve.calibrate.run import calibrate

    calibrate(arguments.model, arguments.sae, arguments.data, arguments.out, RECIPE.build(arguments), placed)
    return 0


def _flags(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
