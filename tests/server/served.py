"""A server process over the text engine, for tests that send signals: `python -m tests.server.served '{...}'`.

The argument holds fields of ServerConfig, and `delay` (seconds of a step), `fail_at` (a step that fails), `max_rows`.
"""

import json
import logging
import sys
import time
from pathlib import Path

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from steerserve.server.logs import LineHandler, Lines, RequestLog, standard
from steerserve.server.process import ServerProcess, address_of
from tests.server.text_engine import TextEngine, service_of


def main() -> int:
    """Serve until a signal."""
    settings = json.loads(sys.argv[1])
    delay, fail_at = settings.pop("delay", 0.0), settings.pop("fail_at", None)
    engine = TextEngine(max_rows=settings.pop("max_rows", 8))

    def before_step() -> None:
        time.sleep(delay)
        if engine.steps == fail_at:
            raise RuntimeError("secret detail")

    engine.before_step = before_step
    if "keys" in settings:
        settings["keys"] = Path(settings["keys"])
    config = ServerConfig(port=0, **settings)

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
