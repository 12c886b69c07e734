"""`steerserve calibrate`: find attributes in labelled texts; or measure what pushing those of a folder does, or train
their probes."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerserve.commands.command import BUNDLED, CommandParser, add_command, check_folders, check_output
from steerserve.commands.flags import FlagGroup
from steerserve.errors import SteerserveError
from steerserve.extras import require_extra
from steerserve.memory import keep_freed_memory

MODEL = FlagGroup("steerserve.config", "ModelConfig")
RECIPE = FlagGroup("steerserve.calibrate.recipes", "CalibrationRecipe")
SHARED = ("judge_texts", "order", "transfer", "temperature", "rows", "seed")
"""Fields of the recipe that a measurement takes as well."""
PROFILE = FlagGroup("steerserve.calibrate.recipes", "ProfileRecipe", skip=SHARED)
PROBES = FlagGroup("steerserve.calibrate.recipes", "ProbeRecipe", skip=("seed",))


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
        "text has an attribute, for each attribute of a folder. Needs the extra `train`.",
        """
        steerserve calibrate --data texts --tasks tasks.json --out made/attributes --quick
        steerserve calibrate --model made/model --sae made/saes --data texts --out made/attributes
        steerserve calibrate --model made/model --data texts --profile made/attributes
        steerserve calibrate --model made/model --data texts --probes made/attributes
        """,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.set_defaults(run=run)
    group = parser.add_argument_group("folders")
    group.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of .jsonl or .jsonl.gz files with a `text` and labels a line",
    )
    for name, text in {
        "model": "model folder; the bundled model where left out",
        "sae": "folder of SAEs of the model; those of the bundled model where it is used, needed otherwise without "
        "--profile or --probes",
        "out": "folder of attributes to write; needed without --profile or --probes",
        "profile": "folder of attributes to measure instead: s, c and rho of each, joint.json, and a plot of each",
        "probes": "folder of attributes to train the probes of instead, which judge finished texts",
    }.items():
        group.add_argument(f"--{name}", type=Path, metavar="DIR", help=text)
    group.add_argument("--quick", action="store_true", help=f"a first look in minutes: {_settings(QUICK)}")
    MODEL.add_to(parser, "model")
    RECIPE.add_to(parser, f"recipe (with --profile only {_flags(SHARED)}, with --probes only --seed)")
    PROFILE.add_to(parser, "measured profile (with --profile)")
    PROBES.add_to(parser, "probes (not with --profile)")


QUICK: Mapping[str, Any] = {
    "texts": 200,
    "judge_texts": 2000,
    "samples": 32,
    "sample_tokens": 47,
    "sample_steps": 24,
    "strengths": (0.3, 0.65, 1.3),
    "search_texts": 8,
    "confirm_texts": 16,
}
"""The recipe's fields that `--quick` sets, where the command line does not."""


def run(arguments: argparse.Namespace) -> int:
    """Calibrate every attribute of the recipe into the output folder; or measure those of a folder, or train their
    probes."""
    recipe, profile, probes = RECIPE.given(arguments), PROFILE.given(arguments), PROBES.given(arguments)
    folders = [name for name in ("sae", "out", "profile", "probes") if getattr(arguments, name) is not None]
    if "probes" in folders:
        _refuse("--probes trains probes of attributes as they are", [*folders, *recipe, *profile], ("probes", "seed"))
    elif "profile" in folders:
        _refuse("--profile measures attributes as they are", [*folders, *recipe, *probes], ("profile", *SHARED))
    elif missing := [name for name in ("sae", "out") if name not in folders and (name == "out" or arguments.model)]:
        raise SteerserveError(f"{_flags(missing)} must be given, or --profile or --probes")
    elif profile:
        raise SteerserveError(f"{_flags(list(profile))} must be given with --profile only")
    if arguments.quick and ("probes" in folders or "profile" in folders):
        raise SteerserveError("--quick is a preset of the search for attributes: leave it out with --profile, --probes")
    check_folders(arguments, "model", "sae", "data", "profile", "probes")
    for name in ("out", "profile", "probes"):
        if name in folders:
            check_output(f"--{name}", getattr(arguments, name))
    require_extra("train", "sklearn", "scipy", "tqdm")
    keep_freed_memory()
    placed: Any = MODEL.build(arguments)
    model = arguments.model or BUNDLED / "model"
    if "probes" in folders:
        from steerserve.calibrate.probes import train_probes

        train_probes(model, arguments.probes, arguments.data, PROBES.build(arguments, **recipe), placed)
    elif "profile" in folders:
        from steerserve.calibrate.profile.measure import measure

        measure(model, arguments.profile, arguments.data, PROFILE.build(arguments, **recipe), placed)
    else:
        from steerserve.calibrate.run import calibrate
        from steerserve.calibrate.summary import serve_lines

        built = RECIPE.build(
            arguments, **({k: v for k, v in QUICK.items() if k not in recipe} if arguments.quick else {})
        )
        trained = PROBES.build(arguments, seed=built.seed)
        saes = arguments.sae or BUNDLED / "saes"
        made = calibrate(model, saes, arguments.data, arguments.out, built, placed, trained)
        lines = serve_lines(arguments.model, arguments.sae, arguments.out, list(made))
        sys.stderr.write(
            "\n".join([f"attributes made: {len(made)}; those that were there already are kept", *lines, ""])
        )
    return 0


def _refuse(why: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    if unused := [name for name in given if name not in allowed]:
        raise SteerserveError(f"{why}: leave out {_flags(unused)}")


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{_flags([name])} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in values.items()
    )


def _flags(names: Sequence[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
