"""`steerserve train`: the recipes that made the bundled tokenizer, model and SAEs, for texts of your own."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from steerserve.commands.command import CommandParser, add_command, check_folders, check_output
from steerserve.commands.flags import FlagGroup
from steerserve.commands.values import layer_list
from steerserve.errors import ArtifactError
from steerserve.extras import require_extra
from steerserve.memory import keep_freed_memory

if TYPE_CHECKING:
    from steerserve.models.families.bert import BertDiffusionLM
    from steerserve.train.tokenizer import Vocabulary

HELPS = {
    "learning_rate": "highest learning rate",
    "weight_decay": "weight decay of AdamW",
    "context": "longest canvas in tokens",
    "seed": "what everything random is drawn from",
    "features": "features of each SAE",
    "k": "features that may be active on a token",
    "policies": "which positions to train on; one SAE each",
    "batch": "hidden states of one optimiser step",
}
DLM = FlagGroup("steerserve.train.dlm", "DlmRecipe", helps=HELPS)
FRESH = FlagGroup("steerserve.train.fresh", "FreshSize")
MODEL = FlagGroup("steerserve.config", "ModelConfig", skip=("dtype", "device", "revision"))
SAE = FlagGroup("steerserve.train.sae", "SaeRecipe", helps=HELPS)

DATA = "folder of .jsonl or .jsonl.gz files, one object with a `text` a line"
SAMPLES = 12
"""Unselected samples in the card of a trained model."""


def add_to(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    """Add the command."""
    add_command(
        commands,
        "train",
        add_things,
        "Train a tokenizer, a diffusion model or its SAEs on your own texts. Needs the extra `train`. "
        "Runs are seeded; those of dlm and sae go on where they stopped.",
        """
        steerserve train tokenizer --data texts --out made/tokenizer
        steerserve train dlm --data texts --tokenizer made/tokenizer --out made/model
        steerserve train sae --data texts --model made/model --out made/saes --layers 2,3,4
        """,
    )


def add_things(parser: argparse.ArgumentParser) -> None:
    """Add the three things that can be trained."""
    things = parser.add_subparsers(title="what to train", metavar="THING", required=True, parser_class=CommandParser)
    add_command(
        things,
        "tokenizer",
        add_tokenizer_flags,
        "Choose the pieces of a lossless lower-case WordPiece tokenizer. Writes tokenizer.json and vocabulary.json. "
        "With --encoder the pieces are those of the encoder that occur in the texts, so that its embeddings can be "
        "taken over; without it they are learnt from the texts.",
        "steerserve train tokenizer --data texts --out made/tokenizer --size 16384",
    )
    add_command(
        things,
        "dlm",
        add_dlm_flags,
        "Train a masked diffusion model of the BERT family. Writes a model folder that can be served, and beside it "
        "what is needed to go on: run the command again after a stop.",
        "steerserve train dlm --data texts --tokenizer made/tokenizer --out made/model --tokens 12000000",
    )
    add_command(
        things,
        "sae",
        add_sae_flags,
        "Train sparse autoencoders on a model's hidden states. One SAE a layer and policy (masked positions, visible "
        "positions), trained with SAELens and saved in its layout.",
        "steerserve train sae --data texts --model made/model --out made/saes --layers 2,3,4",
    )


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `train tokenizer`."""
    parser.set_defaults(run=train_tokenizer)
    _add_folders(parser, data=DATA, out="folder to write")
    parser.add_argument("--encoder", type=Path, metavar="DIR", help="pretrained encoder with a vocab.txt")
    parser.add_argument("--size", type=int, default=16384, metavar="N", help="number of pieces (default: %(default)s)")


def add_dlm_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `train dlm`."""
    parser.set_defaults(run=train_dlm)
    _add_folders(parser, data=DATA, tokenizer="folder that `train tokenizer` wrote", out="model folder to write")
    parser.add_argument("--encoder", type=Path, metavar="DIR", help="start from this encoder, not from random weights")
    DLM.add_to(parser, "recipe")
    FRESH.add_to(parser, "size of the model (where there is no --encoder)")


def add_sae_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `train sae`."""
    parser.set_defaults(run=train_sae)
    _add_folders(parser, data=DATA, model="model folder", out="folder of SAEs to write")
    parser.add_argument("--layers", type=layer_list, required=True, metavar="N,...", help="layers, counted from 0")
    MODEL.add_to(parser, "model")
    SAE.add_to(parser, "recipe")


def _add_folders(parser: argparse.ArgumentParser, **helps: str) -> None:
    group = parser.add_argument_group("folders")
    for name, text in helps.items():
        group.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=text)


def train_tokenizer(arguments: argparse.Namespace) -> int:
    """Write tokenizer.json and vocabulary.json (pieces, and where each starts from)."""
    check_folders(arguments, "data", "encoder")
    check_output("--out", arguments.out)

    from steerserve.train import corpus
    from steerserve.train.encoder import read_vocabulary
    from steerserve.train.fresh import learn_vocabulary
    from steerserve.train.tokenizer import build_tokenizer, choose_vocabulary

    texts = [row["text"] for path in corpus.files(arguments.data).values() for row in corpus.rows(path)]
    if arguments.encoder is None:
        vocabulary = learn_vocabulary(texts, arguments.size)
    else:
        vocabulary = choose_vocabulary(texts, read_vocabulary(arguments.encoder), arguments.size)
    arguments.out.mkdir(parents=True, exist_ok=True)
    build_tokenizer(vocabulary.pieces).save(str(arguments.out / "tokenizer.json"))
    raw = {"pieces": vocabulary.pieces, "origins": vocabulary.origins}
    (arguments.out / "vocabulary.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    return 0


def train_dlm(arguments: argparse.Namespace) -> int:
    """Train or go on, then write the model folder."""
    check_folders(arguments, "data", "tokenizer", "encoder")
    check_output("--out", arguments.out)
    require_extra("train", "tqdm")
    keep_freed_memory()

    from steerserve.models import load_tokenizer
    from steerserve.train.dlm import train
    from steerserve.train.encoder import start_from_encoder
    from steerserve.train.fresh import save_model_folder, start_fresh
    from steerserve.train.report import held_out, samples

    recipe = DLM.build(arguments)
    vocabulary = _read_vocabulary(arguments.tokenizer)
    tokenizer = load_tokenizer(arguments.tokenizer)
    model: BertDiffusionLM
    if arguments.encoder is None:
        model = start_fresh(vocabulary, FRESH.build(arguments), recipe.context, recipe.seed)
    else:
        model = start_from_encoder(arguments.encoder, vocabulary, recipe.context)
    train(model, arguments.data, tokenizer, arguments.out, recipe)
    save_model_folder(model, tokenizer, arguments.out)
    model = model.eval().requires_grad_(False)
    card = {
        "recipe": asdict(recipe),
        "held_out": held_out(model, tokenizer, arguments.data, recipe.context),
        "samples": samples(model, tokenizer, [""] * SAMPLES, max_tokens=recipe.context // 2, ignore_eos=True),
    }
    (arguments.out / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")
    return 0


def _read_vocabulary(folder: Path) -> "Vocabulary":
    from steerserve.train.tokenizer import Vocabulary

    path = folder / "vocabulary.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Vocabulary(tuple(raw["pieces"]), tuple(raw["origins"]))
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder} is no tokenizer folder: vocabulary.json: {error}") from error


def train_sae(arguments: argparse.Namespace) -> int:
    """Train one SAE a layer and policy into the output folder."""
    check_folders(arguments, "data", "model")
    check_output("--out", arguments.out)
    require_extra("train", "sae_lens", "tqdm")
    keep_freed_memory()

    from steerserve.models import open_model
    from steerserve.train.sae import train_saes

    opened = open_model(arguments.model, MODEL.build(arguments, dtype="float32", device="cpu"))
    train_saes(
        opened.load(arguments.model.resolve().name),
        opened.tokenizer,
        arguments.data,
        arguments.out,
        arguments.layers,
        SAE.build(arguments),
        opened.sha256,
    )
    return 0
