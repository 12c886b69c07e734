import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from steerserve.server.telemetry.logs import LineHandler, Lines, RequestLog, standard
from tests.server.planned_engine import SECRET, PlannedEngine, entry, keys_file
from tests.server.sockets import eventually
from tests.server.text_engine import service_of

STEERED = {"interventions": [{"attribute": "topic/sports", "strength": 0.5}]}
PRIVATE = "the secret of the\nsea\u2028 is \x1b[31mred é"


def logged(folder: Path, prompts: bool, *requests: dict[str, Any], **extra: Any) -> list[dict[str, Any]]:
    """The lines that these requests leave."""
    path = folder / "log.jsonl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    lines = Lines(descriptor, lambda _: None)
    config = ServerConfig(drain_seconds=5, keys=keys_file(folder, entry(rate_per_minute=100)))
    with TestClient(create_app(service_of(PlannedEngine({})), config, [RequestLog(lines, prompts)])) as client:
        for fields in requests:
            headers = {"authorization": f"Bearer {SECRET}"} | extra.get("headers", {})
            client.post("/v1/completions", json={"model": "text", "max_tokens": 12} | fields, headers=headers)
    lines.close()
    os.close(descriptor)
    raw = path.read_bytes()
    assert raw.isascii()
    assert raw.count(b"\n") == len(requests)
    return [json.loads(line) for line in raw.splitlines()]


def test_a_line_says_what_a_request_cost_and_not_what_it_said(tmp_path: Path) -> None:
    body = {"prompt": PRIVATE, "steering": STEERED, "n": 2}
    plain, stream, steered, refused = logged(
        tmp_path, False, {"prompt": PRIVATE}, body | {"stream": True}, body, {"prompt": PRIVATE, "n": 0}
    )
    for line in (plain, stream, steered):
        assert (line["event"], line["level"], line["key"], line["route"]) == (
            "request",
            "info",
            "team",
            "/v1/completions",
        )
        assert (line["status"], line["outcome"]) == (200, "ok")
        assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
        assert line["timestamp"].endswith("Z")
    assert (plain["rows"], plain["denoising_steps"], plain["steering_sha256"]) == (1, 12, None)
    assert (steered["rows"], steered["denoising_steps"], steered["attributes"]) == (2, 24, ["topic/sports"])
    assert steered["steering_sha256"] == stream["steering_sha256"]
    assert len(steered["steering_sha256"]) == 64
    assert (refused["status"], refused["outcome"], refused["reason"]) == (400, "invalid", "invalid_value")
    raw = (tmp_path / "log.jsonl").read_text()
    assert "secret" not in raw
    assert SECRET not in raw


def test_prompts_are_logged_where_that_was_asked_for(tmp_path: Path) -> None:
    one, two = logged(tmp_path, True, {"prompt": PRIVATE, "n": 3}, {"prompt": ["a", "b" * 5000]})
    assert one["prompts"] == [PRIVATE]
    assert two["prompts"] == ["a", "b" * 4096]


@pytest.mark.parametrize("given", ['x"}\n{"event": "forged', "a b", "\x1b[31m", "x" * 200, "../../etc/passwd"])
def test_what_a_client_sends_cannot_forge_a_line(tmp_path: Path, given: str) -> None:
    encoded = given.replace("\n", " ")
    headers = {"x-request-id": encoded, "traceparent": encoded, "user-agent": encoded}
    [line] = logged(tmp_path, True, {"prompt": given, "user": given, "model": given}, headers=headers)
    assert line["event"] == "request"
    assert line["request_id"].startswith("req-")


def test_a_sane_request_id_is_kept(tmp_path: Path) -> None:
    [line] = logged(tmp_path, False, {}, headers={"x-request-id": "mine-1"})
    assert line["request_id"] == "mine-1"


def test_a_full_disk_drops_lines_and_nothing_else() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    descriptor = os.open("/dev/full", os.O_WRONLY)
    dropped: list[int] = []
    lines = Lines(descriptor, dropped.append)
    with TestClient(create_app(service_of(PlannedEngine({})), ServerConfig(), [RequestLog(lines)])) as client:
        for _ in range(5):
            assert client.post("/v1/completions", json={"model": "text"}).status_code == 200
    lines.close()
    os.close(descriptor)
    assert sum(dropped) == 5


def test_a_closed_descriptor_drops_lines_and_nothing_else() -> None:
    dropped: list[int] = []
    reader, writer = os.pipe()
    lines = Lines(writer, dropped.append)
    lines.write("one")
    assert os.read(reader, 100) == b"one\n"
    os.close(reader)
    lines.write("two")
    eventually(lambda: sum(dropped) == 1)
    lines.close()
    os.close(writer)


def test_a_pipe_that_nobody_reads_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerserve.server.telemetry.logs.WAITING_LINES", 100)
    monkeypatch.setattr("steerserve.server.telemetry.logs.CLOSING_SECONDS", 0.05)
    reader, writer = os.pipe()
    dropped: list[int] = []
    lines = Lines(writer, dropped.append)
    for _ in range(300):
        lines.write("x" * 1000)
    assert sum(dropped) >= 300 - 100 - 70
    lines.close()
    # The thread may go on once it is read.
    read = 0
    while read < 65536:
        read += len(os.read(reader, 65536))
    os.close(reader)
    eventually(lambda: not any(thread.name == "log" for thread in threading.enumerate()) or lines._lines.empty())
    lines.close()


def test_the_line_after_a_torn_one_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    written = b""
    real = os.write

    def short_of_space(_: int, data: bytes) -> int:
        nonlocal written
        if len(written) == 5:
            written += b"|"
            raise OSError(28, "No space left on device")
        piece = data[: 5 if not written else len(data)]
        written += piece
        return len(piece)

    monkeypatch.setattr(os, "write", short_of_space)
    lines = Lines(-1, lambda _: None)
    lines.write("first line")
    lines.write("second line")
    lines.close()
    monkeypatch.setattr(os, "write", real)
    assert written == b"first|\nsecond line\n"


def test_library_records_become_lines_with_their_traceback_in_one_field() -> None:
    reader, writer = os.pipe()
    lines = Lines(writer, lambda _: None)
    logger = logging.getLogger("tests.of.lines")
    logger.addHandler(handler := LineHandler(lines))
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("it %s", "failed\n{")
    finally:
        logger.removeHandler(handler)
    lines.close()
    line = json.loads(os.read(reader, 65536))
    os.close(reader)
    os.close(writer)
    assert (line["event"], line["level"], line["logger"]) == ("it failed\n{", "error", "tests.of.lines")
    assert line["exception"].endswith("ValueError: two\nlines")


def test_a_missing_stream_is_the_null_device() -> None:
    with open(os.devnull) as stream:
        assert standard(stream, 7) == 7
    descriptor = standard(None, 1)
    assert descriptor != 1
    os.close(descriptor)
