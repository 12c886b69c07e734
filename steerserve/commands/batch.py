"""`steerserve batch`: the requests of a file, sent to one server or several, and their answers in another file."""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from steerserve.commands.command import CommandParser, add_command
from steerserve.commands.flags import FlagGroup
from steerserve.errors import ArtifactError

if TYPE_CHECKING:
    from steerserve.batch.results import BatchResult

BATCH = FlagGroup("steerserve.batch.run", "BatchConfig")
KEY_VARIABLE = "STEERSERVE_API_KEY"
NOT_ALL_SERVED = 1


def add_to(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    """Add the command."""
    add_command(
        commands,
        "batch",
        add_flags,
        "Send the requests of a file to one server or several. The files are those of OpenAI's batches: a line of the "
        "input is a JSON object with custom_id, method, url and body; a line of the output has custom_id, response "
        "and error. End it at any time and run it again: requests that have a line are not sent again, so that in the "
        "end each has exactly one. Lines stand in the order of the answers. Exits with 0 where every request was "
        "served, with 1 where some lines are errors, and with 2 where it ended before each request had a line.",
        """
        steerserve batch in.jsonl out.jsonl
        steerserve batch in.jsonl out.jsonl --url http://10.0.0.1:8000 --url http://10.0.0.2:8000
        """,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.set_defaults(run=run)
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="file of requests, one a line")
    parser.add_argument("output", type=Path, metavar="OUT.jsonl", help="file that gets a line for each request")
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="drop the lines of requests that were not served by an earlier run, and send these again",
    )
    BATCH.add_to(parser, "servers")


def run(arguments: argparse.Namespace) -> int:
    """Send what has no line yet."""
    import asyncio

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from steerserve.batch.requests import read_requests
    from steerserve.batch.results import ResultFile
    from steerserve.batch.run import BatchConfig, BatchRun

    config: BatchConfig = BATCH.build(arguments)
    key = read_key(config.key_file)
    requests = read_requests(arguments.input)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ResultFile(arguments.output, [one.custom_id for one in requests], arguments.retry_failed) as results:
        there = len(results.results)
        if there:
            console.print(f"{there} of {len(requests)} requests have a line already", markup=False)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("requests", total=len(requests), completed=there)

            def advance(_: "BatchResult") -> None:
                progress.advance(task)

            def say(line: str) -> None:
                console.print(line, markup=False)

            batch = BatchRun(requests, results, config, key, advance, say)
            asyncio.run(batch.run())
        kinds = Counter(kind_of(result) for result in results.results.values())
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    sys.stderr.write(f"{len(requests)} requests: {told}; {batch.sent_again} sent again\n")
    return 0 if set(kinds) == {SERVED} else NOT_ALL_SERVED


SERVED = "served"


def kind_of(result: "BatchResult") -> str:
    """What a summary counts a result as: served, or its error."""
    if result.served:
        return SERVED
    if result.error is not None:
        return result.error["code"]
    return f"status {(result.response or {})['status_code']}"


def read_key(path: Path | None) -> str | None:
    """The API key of a file or else of the environment; raises ArtifactError, which never repeats it."""
    if path is None:
        where, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "")
        if not key:
            return None
    else:
        where = f"--key-file: {path}"
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{where} cannot be read") from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ArtifactError(f"{where} must hold one key and nothing else")
    return key
