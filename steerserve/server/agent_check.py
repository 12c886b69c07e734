"""HAProxy's agent check: who connects is told in a line how much work to send here, and the connection is closed.

The line is `up ready N%`, N from 1 to 100: a weight beside the other servers' own. While the server drains it is
`drain`, and `down` once its engine is gone. Protocol: HAProxy's configuration manual, `agent-check`.
"""

import asyncio
from contextlib import suppress

from steerserve.errors import QueueFullError
from steerserve.server.errors import EngineDownError, ShuttingDownError
from steerserve.server.worker.worker import EngineWorker


def agent_line(worker: EngineWorker) -> str:
    """What the worker's load comes to: 100 % where nothing waits, half of it where a second's work does.

    A full queue is 1 %: what comes is refused before any work, and may go elsewhere.
    """
    try:
        worker.check_room()
    except ShuttingDownError:
        return "drain"
    except EngineDownError:
        return "down"
    except QueueFullError:
        return "up ready 1%"
    return f"up ready {max(1, round(100 / (1 + worker.load.waiting_seconds)))}%"


class AgentCheck:
    """The listener; it lives on the server's event loop."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Listen; where, since port 0 is one that the system picks. Raises OSError."""
        self._server = await asyncio.start_server(self._answer, host, port)
        address = self._server.sockets[0].getsockname()
        return str(address[0]), int(address[1])

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # One that has gone away needs no answer.
        with suppress(ConnectionError):
            writer.write(f"{agent_line(self._worker)}\n".encode())
            await writer.drain()
        writer.close()
