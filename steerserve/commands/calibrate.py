"""`steerserve calibrate`: find attributes in labelled texts; or measure what pushing those of a folder does, or train
their probes."""

import argparse
from collections.abc import Sequence
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
PROBES = FlagGroup("steerserve.calibrate.probes", "ProbeRecipe", skip=("seed",))


def add_to(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    """Add the command."""
    add_command(
        commands,
        "calibrate",
        add_flags,
        "Find attributes that can be steered, from texts with labels. For each attribute: the SAE features that tell "
        "its texts from the others', a direction a layer, when during denoising it forms, and a default strength. "
        "With --profile instead: measure what pushing each attribute of a folder does and costs over denoising, alone "
        "and together, and write it into the folder. With --probes instead: train anew what tells whether a finished "
        "text has an attribute, for each attribute of a folder. Needs the extra: pip install 'steerserve[train]'.",
        """
        steerserve calibrate --model made/model --sae made/saes --data texts --out made/attributes
        steerserve calibrate --model made/model --data texts --profile made/attributes
        steerserve calibrate --model made/model --data texts --probes made/attributes
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
        "sae": "folder of SAEs of this model; needed without --profile or --probes",
        "out": "folder of attributes to write; needed without --profile or --probes",
        "profile": "folder of attributes to measure instead: s, c and rho of each, joint.json, and a plot of each",
        "probes": "folder of attributes to train the probes of instead, which judge finished texts",
    }.items():
        group.add_argument(f"--{name}", type=Path, metavar="DIR", help=text)
    MODEL.add_to(parser, "model")
    RECIPE.add_to(parser, f"recipe (with --profile only {_flags(SHARED)}, with --probes only --seed)")
    PROFILE.add_to(parser, "measured profile (with --profile)")
    PROBES.add_to(parser, "probes (not with --profile)")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate every attribute of the recipe into the output folder; or measure those of a folder, or train their
    probes."""
    recipe, profile, probes = RECIPE.given(arguments), PROFILE.given(arguments), PROBES.given(arguments)
    folders = [name for name in ("sae", "out", "profile", "probes") if getattr(arguments, name) is not None]
    if "probes" in folders:
        _refuse("--probes trains probes of attributes as they are", [*folders, *recipe, *profile], ("probes", "seed"))
    elif "profile" in folders:
        _refuse("--profile measures attributes as they are", [*folders, *recipe, *probes], ("profile", *SHARED))
    elif missing := [name for name in ("sae", "out") if name not in folders]:
        raise SteerserveError(f"{_flags(missing)} must be given, or --profile or --probes")
    elif profile:
        raise SteerserveError(f"{_flags(list(profile))} must be given with --profile only")
    check_folders(arguments, "model", "sae", "data", "profile", "probes")
    keep_freed_memory()
    placed: Any = MODEL.build(arguments)
    if "probes" in folders:
        from steerserve.calibrate.probes import train_probes

        train_probes(arguments.model, arguments.probes, arguments.data, PROBES.build(arguments, **recipe), placed)
    elif "profile" in folders:
        from steerserve.calibrate.measure import measure

        measure(arguments.model, arguments.profile, arguments.data, PROFILE.build(arguments, **recipe), placed)
    else:
        from steerserve.calibrate.run import calibrate

        built = RECIPE.build(arguments)
        trained = PROBES.build(arguments, seed=built.seed)
        calibrate(arguments.model, arguments.sae, arguments.data, arguments.out, built, placed, trained)
    return 0


def _refuse(why: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    if unused := [name for name in given if name not in allowed]:
        raise SteerserveError(f"{why}: leave out {_flags(unused)}")


def _flags(names: Sequence[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
