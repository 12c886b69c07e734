"""`steerserve serve`: the HTTP server."""

import argparse
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from steerserve.commands.command import CommandParser, add_artifacts, add_command, check_files, check_folders
from steerserve.commands.flags import FlagGroup
from steerserve.memory import keep_freed_memory

if TYPE_CHECKING:
    from steerserve.server.http.observe import Report

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
    """Load everything, then serve until a signal; 1 if the server could not start, 70 if its engine failed."""
    began = time.perf_counter()
    check_folders(arguments, "model", "sae", "attributes")
    server_config, engine_config = SERVER.build(arguments), ENGINE.build(arguments)
    model_config, sae_config, backend = MODEL.build(arguments), SAES.build(arguments), BACKEND.build(arguments)
    check_files(arguments, tokenizer=model_config.tokenizer)
    from steerserve.server.process import ServerProcess, check_address

    if server_config.keys is not None:
        from steerserve.server.auth.keys import read_keys

        # Before the model is opened, which may take minutes.
        read_keys(server_config.keys)
    if server_config.replica_address is not None:
        from steerserve.server.fleet.address import netloc_of
        from steerserve.server.fleet.secret import read_secrets

        netloc_of(server_config.replica_address, server_config.port)
        read_secrets(server_config.fleet_secret)
    check_address("--port", server_config.host, server_config.port)
    if server_config.metrics_port is not None:
        check_address("--metrics-port", server_config.host, server_config.metrics_port)
    if server_config.agent_port is not None:
        check_address("--agent-port", server_config.host, server_config.agent_port)
    keep_freed_memory()

    from rich.console import Console

    from steerserve.runtime.load import load_runtime
    from steerserve.server.app import create_app
    from steerserve.server.auth.guard import try_mandatory
    from steerserve.server.auth.keys import Keyring
    from steerserve.server.telemetry.logs import LineHandler, Lines, RequestLog, standard
    from steerserve.server.telemetry.tracing import Tracing, exporter_to

    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        # What a person would read is no reason not to serve: the disk behind standard error may be full.
        with suppress(OSError):
            console.print(line, markup=False)

    tracing = Tracing(exporter_to(server_config.otel_endpoint)) if server_config.otel_endpoint is not None else None
    folders = (arguments.model, arguments.sae, arguments.attributes)

    def check_keys(admit: Callable[[Any], Any], max_length: int) -> None:
        if server_config.keys is not None:
            Keyring(server_config.keys, partial(try_mandatory, admit, max_length=max_length))

    runtime = load_runtime(
        *folders, engine_config, model_config, say, sae_config, arguments.vectors, backend, check_keys
    )

    def dropped(lines: int) -> None:
        app.state.metrics.log_lines_dropped.inc(lines)

    def ready(host: str, port: int) -> None:
        service = runtime.service
        for line in ready_lines(host, port, service.model_id, service.attributes, server_config.keys is not None):
            say(line)

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
            say,
            ready,
        ).serve_until_stopped()
    finally:
        if tracing is not None:
            tracing.close()
        requests.close()
        events.close()
        for stream in (sys.stdout, sys.stderr):
            _drop_unwritable(stream)


def _drop_unwritable(stream: TextIO | None) -> None:
    """Send what a stream could not write to the null device: Python would try again at exit, fail, and end with 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


EXAMPLE = "topic/sports"
"""The attribute that the request on the screen pushes, where it is served."""


def ready_lines(host: str, port: int, model: str, attributes: Collection[str], keys: bool) -> list[str]:
    """What is printed once the server listens: its address, a steered request that can be pasted into a shell, and the
    playground's address.

    keys: whether callers need one.
    """
    from steerserve.server.process import address_of

    # An address to listen on, which is none to call.
    address = address_of({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
    body: dict[str, Any] = {"model": model, "prompt": "the", "max_tokens": 48}
    if attributes:
        pushed = EXAMPLE if EXAMPLE in attributes else min(attributes)
        body["steering"] = {"interventions": [{"attribute": pushed}], "baseline": True}
    key = ' -H "Authorization: Bearer $KEY"' if keys else ""
    curl = (
        f"curl -s {address}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )
    return [f"ready at {address_of(host, port)}  try: {curl}", f"playground at {address}/playground"]
