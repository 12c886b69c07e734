"""`steerserve label`: find out what the features of SAEs stand for, and name them."""

import argparse
from pathlib import Path

from steerserve.commands.command import BUNDLED, CommandParser, add_command, check_folders, check_output
from steerserve.commands.flags import FlagGroup
from steerserve.commands.values import layer_list
from steerserve.errors import SteerserveError
from steerserve.extras import require_extra
from steerserve.memory import keep_freed_memory

MODEL = FlagGroup("steerserve.config", "ModelConfig")
RECIPE = FlagGroup("steerserve.label.recipe", "LabelRecipe")


def add_to(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    """Add the command."""
    add_command(
        commands,
        "label",
        add_flags,
        "Find out what each feature of SAEs stands for, and name it. For each feature: its strongest contexts on your "
        "texts, how often and how strongly it is active at each mask ratio, when during denoising it forms, which "
        "tokens it promotes, its nearest features, and a name made of its contexts' words. All of it is written beside "
        "the SAE as features.db, which the server shows and searches, with the statistics that the unit max_act needs. "
        "A run that was stopped goes on where it was. Needs the extra `train`.",
        """
        steerserve label --sae made/saes --model made/model --data texts
        steerserve label --sae saes --model model --data texts --explainer http://127.0.0.1:8001/v1 \\
            --explainer-model NAME
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
        help="folder of .jsonl or .jsonl.gz files with a `text` a line",
    )
    group.add_argument("--model", type=Path, metavar="DIR", help="model folder; the bundled model where left out")
    group.add_argument("--sae", type=Path, required=True, metavar="DIR", help="folder of SAEs, at any depth")
    group.add_argument("--sae-layers", type=layer_list, metavar="N,...", help="only SAEs of these layers")
    group.add_argument("--sae-k", type=int, metavar="N", help="only SAEs of so many active features a token")
    group = parser.add_argument_group("names (without --explainer: made of the words of the contexts)")
    group.add_argument(
        "--explainer", metavar="URL", help="base URL of a chat endpoint of OpenAI's interface, ends in /v1"
    )
    group.add_argument("--explainer-model", metavar="NAME", help="the model to ask there")
    MODEL.add_to(parser, "model")
    RECIPE.add_to(parser, "recipe")


def run(arguments: argparse.Namespace) -> int:
    """Label every SAE of the folder."""
    if (arguments.explainer is None) != (arguments.explainer_model is None):
        raise SteerserveError("--explainer and --explainer-model need each other")
    check_folders(arguments, "model", "sae", "data")
    check_output("--sae", arguments.sae)
    require_extra("train", "tqdm", "sklearn", "scipy")
    keep_freed_memory()

    from steerserve.label.explainer import Explainer
    from steerserve.label.run import label

    explainer = None if arguments.explainer is None else Explainer(arguments.explainer, arguments.explainer_model)
    label(
        arguments.model or BUNDLED / "model",
        arguments.sae,
        arguments.data,
        RECIPE.build(arguments),
        MODEL.build(arguments),
        arguments.sae_layers,
        arguments.sae_k,
        explainer,
    )
    return 0
