"""What every subcommand has in common: its parser, its folders and how it fails on a wrong one."""

import argparse
import os
import textwrap
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import steerserve
from steerserve.errors import ArtifactError

BUNDLED = Path(steerserve.__file__).parent / "bundled"
"""The folder of the bundled model, its SAEs and attributes."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose arguments are added when it is first used: a command reads only what its own flags need."""

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Add the arguments, then parse. An unknown flag is refused here, by the parser that knows the others."""
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f" (did you mean {near[0]}?)" if near else ""))
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """End with the error alone: under the usage of a command with many flags it would not be seen."""
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` shows what it takes\n")


class Once(argparse.Action):
    """Stores a value, and refuses a second one, which argparse alone would take in place of the first."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print the version or the help and exit, as argparse actions do."""
        if getattr(namespace, self.dest, None) is not None:
            parser.error(f"{option_string} is given twice: {getattr(namespace, self.dest)} and {values}")
        setattr(namespace, self.dest, values)


def add_command(
    commands: "argparse._SubParsersAction[CommandParser]",
    name: str,
    fill: Callable[[argparse.ArgumentParser], None],
    description: str,
    example: str,
) -> None:
    """Add one command; `fill` adds its arguments, and sets `run` to the function that does it.

    The list of commands shows the first sentence of the description.
    """
    parser = commands.add_parser(
        name,
        help=description.split(". ")[0].rstrip("."),
        description="\n".join(textwrap.wrap(description, 100)),
        epilog="example:\n" + textwrap.indent(textwrap.dedent(example).strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.fill = fill


def add_artifacts(parser: argparse.ArgumentParser) -> None:
    """The folders a server or a generation is made from."""
    group = parser.add_argument_group("what to load (without --model: the bundled model with its SAEs and attributes)")
    for flag, text in {
        "--model": "model folder: config.json, weights, tokenizer files",
        "--sae": "folder of SAEs, at any depth, in any known layout",
    }.items():
        group.add_argument(flag, type=Path, action=Once, metavar="DIR", help=text)
    group.add_argument(
        "--attributes",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder of attributes, at any depth; may be given several times, and adds to those of the bundled model",
    )
    group.add_argument(
        "--vectors",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="file or folder of raw vectors: safetensors, GGUF control vectors; may be given several times",
    )


def check_folders(arguments: argparse.Namespace, *names: str) -> None:
    """Raise ArtifactError for a folder that was named but is not there, before anything slow is imported."""
    for name in names:
        value = getattr(arguments, name)
        for folder in value if isinstance(value, list) else [value]:
            if folder is not None and not folder.is_dir():
                raise ArtifactError(f"--{name.replace('_', '-')}: {folder} is not a folder")


def check_output(flag: str, folder: Path) -> None:
    """Raise ArtifactError for a folder that cannot be written to or made, before anything slow begins."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ArtifactError(f"{flag} {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArtifactError(f"{flag} {folder}: {there} cannot be written to")


def check_files(arguments: argparse.Namespace, **paths: Path | None) -> None:
    """Raise ArtifactError for a file or folder that a flag names but that is not there; `paths` by flag, beside those
    that every command with a model takes."""
    named = [("vectors", path) for path in arguments.vectors] + list(paths.items())
    for name, path in named:
        if path is not None and not path.exists():
            raise ArtifactError(f"--{name.replace('_', '-')}: {path} is not there")
