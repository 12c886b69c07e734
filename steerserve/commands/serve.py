"""`steerserve serve`: the HTTP server."""

import argparse
import json
import logging
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from steerserve.commands.command import CommandParser, add_artifacts, add_command, check_files, check_folders
from steerserve.commands.flags import FlagGroup
from steerserve.memory import keep_freed_memory

if TYPE_CHECKING:
    from steerserve.server.observe import Report

MODEL = FlagGroup("steerserve.config", "ModelConfig")
SAES = FlagGroup("steerserve.config", "SaeConfig")
SERVER = FlagGroup("steerserve.config", "ServerConfig")
ENGINE = FlagGroup("steerserve.config", "EngineConfig")
BACKEND = FlagGroup("steerserve.config", "BackendConfig")


def add_to(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    """Add the command."""
    add_command(
        commands,
        "serve",
        add_flags,
        "Serve text generation over HTTP. The interface is OpenAI's completions interface, with two more objects in "
        "a request: `diffusion` (steps, order, transfer) and `steering` (what to push, how hard, when). Ctrl-C or "
        "SIGTERM lets running generations finish, then stops.",
        """
        steerserve serve --port 8000
        curl http://127.0.0.1:8000/v1/attributes
        """,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.set_defaults(run=run)
    add_artifacts(parser)
    MODEL.add_to(parser, "model")
    SAES.add_to(parser, "SAEs")
    SERVER.add_to(parser, "server")
    ENGINE.add_to(parser, "engine")
    BACKEND.add_to(parser, "what makes the forward passes")


def run(arguments: argparse.Namespace) -> int:
    """Load everything, then serve until a signal; 1 if the server could not start (a port in use, say), 70 if its
    engine failed."""
    began = time.perf_counter()
    check_folders(arguments, "model", "sae", "attributes")
    server_config, engine_config = SERVER.build(arguments), ENGINE.build(arguments)
    model_config, sae_config, backend = MODEL.build(arguments), SAES.build(arguments), BACKEND.build(arguments)
    check_files(arguments, tokenizer=model_config.tokenizer)
    if server_config.keys is not None:
        from steerserve.server.keys import read_keys

        # Before the model is loaded, which may take minutes.
        read_keys(server_config.keys)
    keep_freed_memory()

    from rich.console import Console

    from steerserve.runtime import load_runtime
    from steerserve.server.app import create_app
    from steerserve.server.logs import LineHandler, Lines, RequestLog, standard
    from steerserve.server.process import ServerProcess, address_of
    from steerserve.server.tracing import Tracing, exporter_to

    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def said(line: str) -> None:
        # What a person would read is no reason not to serve: the disk behind standard error may be full.
        with suppress(OSError):
            console.print(line, markup=False)

    tracing = Tracing(exporter_to(server_config.otel_endpoint)) if server_config.otel_endpoint is not None else None
    folders = (arguments.model, arguments.sae, arguments.attributes)
    runtime = load_runtime(*folders, engine_config, model_config, said, sae_config, arguments.vectors, backend)

    def dropped(lines: int) -> None:
        app.state.metrics.log_lines_dropped.inc(lines)

    requests, events = Lines(standard(sys.stdout, 1), dropped), Lines(standard(sys.stderr, 2), dropped)
    log = [RequestLog(requests, server_config.log_prompts)] if server_config.log_requests else []
    reports: list[Report] = [*log, *([tracing] if tracing is not None else [])]
    app = create_app(runtime.service, server_config, reports, restart_seconds=time.perf_counter() - began)
    logging.basicConfig(handlers=[LineHandler(events)], level=logging.WARNING, force=True)
    logging.getLogger("steerserve").setLevel(logging.INFO)
    try:
        return ServerProcess(
            app,
            server_config,
            said,
            lambda host, port: said(ready_line(address_of(host, port), runtime.service.model_id)),
        ).serve_until_stopped()
    finally:
        if tracing is not None:
            tracing.close()
        requests.close()
        events.close()


def ready_line(address: str, model: str) -> str:
    """What is printed once the server listens: its address, and a request that can be pasted into a shell."""
    body = json.dumps({"model": model, "prompt": "The", "max_tokens": 48})
    return f"ready at {address}  try: curl -s {address}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
