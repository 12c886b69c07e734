"""`steerserve keys`: make an API key, or hash one, for the file that `serve --keys` reads."""

import argparse
import hashlib
import json
import secrets
import sys

from steerserve.commands.command import CommandParser, add_command

KEY_BYTES = 32


def add_to(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    """Add the command."""
    add_command(
        commands,
        "keys",
        add_flags,
        "Make an API key. The key goes to standard error, once; the entry that the file of `serve --keys` gets for it, "
        "with its SHA-256 in its place, to standard output.",
        """
        steerserve keys team-a
        steerserve serve --keys keys.json
        """,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.set_defaults(run=run)
    parser.add_argument("name", help="name of the key, as logs and metrics show it")
    parser.add_argument("--hash", action="store_true", help="read a key from standard input instead of making one")


def run(arguments: argparse.Namespace) -> int:
    """Print the entry."""
    if arguments.hash:
        key = sys.stdin.readline().rstrip("\r\n")
    else:
        key = f"sk-steer-{secrets.token_urlsafe(KEY_BYTES)}"
        sys.stderr.write(f"{key}\n")
    entry = {"name": arguments.name, "sha256": hashlib.sha256(key.encode()).hexdigest()}
    sys.stdout.write(f"{json.dumps(entry)}\n")
    return 0
