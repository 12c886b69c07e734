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
        "Make an API key. The key goes to standard error, once; its entry for the file of `serve --keys`, with the "
        "key's SHA-256 in its place, to standard output. The file is JSON: one entry, entries one after another, a "
        'list of them, or {"keys": [...]}; a name that ends in .toml is read as TOML, a [[keys]] table an entry. An '
        "entry needs name and sha256, and may hold limits: rate_per_minute, max_concurrent, max_strength (by unit), "
        "max_kl, max_predicted_kl, denied_attributes (globs), operators, vectors and features (true or false), "
        "mandatory (interventions as a request has them), max_overlap, max_loudness. SIGHUP has the server read the "
        "file again.",
        """
        steerserve keys team-a > keys.json
        steerserve keys team-b >> keys.json
        steerserve serve --keys keys.json
        """,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.set_defaults(run=run)
    parser.add_argument("name", help="name of the key, as logs and metrics show it")
    parser.add_argument("--hash", action="store_true", help="read a key from standard input instead of making one")


def run(arguments: argparse.Namespace) -> int:
    """Print the entry; raises RequestError for a name that the server would refuse."""
    from steerserve.server.auth.keys import KeyEntry
    from steerserve.server.protocol.parsing import validate

    made = f"sk-steer-{secrets.token_urlsafe(KEY_BYTES)}"
    key = sys.stdin.readline().rstrip("\r\n") if arguments.hash else made
    entry = {"name": arguments.name, "sha256": hashlib.sha256(key.encode()).hexdigest()}
    validate(entry, KeyEntry)
    if not arguments.hash:
        sys.stderr.write(f"{key}\n")
    sys.stdout.write(f"{json.dumps(entry)}\n")
    return 0
