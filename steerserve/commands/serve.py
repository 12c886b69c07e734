"""`steerserve serve`: the HTTP server."""

import argparse
import asyncio
import json
from socket import socket
from typing import TYPE_CHECKING

from steerserve.commands.command import CommandParser, add_artifacts, add_command, check_folders
from steerserve.commands.flags import FlagGroup
from steerserve.memory import keep_freed_memory

if TYPE_CHECKING:
    from fastapi import FastAPI

SERVER = FlagGroup("steerserve.config", "ServerConfig")
ENGINE = FlagGroup("steerserve.config", "EngineConfig")

DID_NOT_START = 1
ANSWER_SECONDS = 5
"""How long the last answers may take to be sent once every row has ended."""


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
    SERVER.add_to(parser, "server")
    ENGINE.add_to(parser, "engine")


def run(arguments: argparse.Namespace) -> int:
    """Load everything, then serve until a signal; 1 if the server could not start (a port in use, say)."""
    check_folders(arguments, "model", "sae", "attributes")
    server_config, engine_config = SERVER.build(arguments), ENGINE.build(arguments)
    keep_freed_memory()

    from rich.console import Console
    from uvicorn import Config, Server

    from steerserve.runtime import load_runtime
    from steerserve.server.app import create_app

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    runtime = load_runtime(arguments.model, arguments.sae, arguments.attributes, engine_config)
    app = create_app(runtime.service, server_config)

    class DrainingServer(Server):
        """Says where it listens once it does (port 0 is one that the system picks), and lets rows finish at the end."""

        async def startup(self, sockets: list[socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                console.print(ready_line(host, port, runtime.service.model_id))

        async def shutdown(self, sockets: list[socket] | None = None) -> None:
            # Before uvicorn's own: it cancels what still runs after its time-out, and a cancelled answer is cut off,
            # where the worker ends each row with a proper one.
            await asyncio.to_thread(stop_worker, app, server_config.drain_seconds)
            await super().shutdown(sockets)

    server = DrainingServer(
        Config(
            app,
            host=server_config.host,
            port=server_config.port,
            log_level="warning",
            timeout_graceful_shutdown=ANSWER_SECONDS,
        )
    )
    server.run()
    return 0 if server.started else DID_NOT_START


def stop_worker(app: "FastAPI", drain_seconds: float) -> None:
    """Refuse new work, let running rows finish for a while, then end the rest with an answer."""
    app.state.worker.drain(drain_seconds)
    app.state.worker.close()


def ready_line(host: str, port: int, model: str) -> str:
    """What is printed once the server listens: its address, and a request that can be pasted into a shell."""
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    body = json.dumps({"model": model, "prompt": "The", "max_tokens": 48})
    return f"ready at {address}  try: curl -s {address}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
