"""The command line: `steerserve serve | generate | batch | inspect | train | calibrate | label | keys`."""

import argparse
import sys
from collections.abc import Sequence

import steerserve
from steerserve.commands import batch, calibrate, generate, inspect, keys, label, serve, train
from steerserve.commands.command import CommandParser
from steerserve.errors import SteerserveError
from steerserve.extras import install_command

WRONG_INPUT = 2
INTERRUPTED = 130
TRAIN_EXTRA = ("sae_lens", "scipy", "sklearn", "tqdm")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; building it imports neither torch nor a model."""
    parser = argparse.ArgumentParser(
        prog="steerserve",
        description="Generate text with a diffusion language model, steered by features of sparse autoencoders.",
        epilog="`steerserve COMMAND --help` explains a command and shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"steerserve {steerserve.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    for command in (serve, generate, batch, inspect, train, calibrate, label, keys):
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for wrong input or a folder that is not what it should be."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except SteerserveError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_EXTRA:
            raise
        return _fail(f"this command needs {error.name}: {install_command('train')}")
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(message: str) -> int:
    sys.stderr.write(f"steerserve: {message}\n")
    return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
