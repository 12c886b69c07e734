"""A server process over the text engine, for tests that send signals: `python -m tests.server.served '{...}'`.

The argument holds fields of ServerConfig, and `delay` (seconds of a step), `fail_rows` (how many rows make a step
fail), `max_rows`, `held` (a file: as long as it is there, the engine makes no more than a few steps).
"""

import json
import logging
import sys
import time
from pathlib import Path

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from steerserve.server.process import ServerProcess, address_of
from steerserve.server.telemetry.logs import LineHandler, Lines, RequestLog, standard
from tests.server.text_engine import TextEngine, service_of


def main() -> int:
    """Serve until a signal."""
    settings = json.loads(sys.argv[1])
    delay, fail_rows = settings.pop("delay", 0.0), settings.pop("fail_rows", None)
    held = Path(settings.pop("held", "/nowhere"))
    engine = TextEngine(max_rows=settings.pop("max_rows", 8))

    def before_step() -> None:
        time.sleep(delay)
        while engine.steps >= 5 and held.exists():
            time.sleep(0.005)
        if len(engine.running) + len(engine.waiting) == fail_rows:
            raise RuntimeError("secret detail")

    engine.before_step = before_step
    if "keys" in settings:
        settings["keys"] = Path(settings["keys"])
    config = ServerConfig(**{"port": 0} | settings)

    def dropped(lines: int) -> None:
        app.state.metrics.log_lines_dropped.inc(lines)

    requests, events = Lines(standard(sys.stdout, 1), dropped), Lines(standard(sys.stderr, 2), dropped)
    app = create_app(service_of(engine), config, [RequestLog(requests, config.log_prompts)])
    logging.basicConfig(handlers=[LineHandler(events)], level=logging.INFO, force=True)

    def said(line: str) -> None:
        events.write(line)

    process = ServerProcess(app, config, said, lambda host, port: said(f"ready at {address_of(host, port)}"))
    code = process.serve_until_stopped()
    requests.close()
    events.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
