"""A connection is held for somebody who speaks, and for nobody else."""

import json
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from steerserve.server.auth.keys import Keyring
from steerserve.server.http import connection
from tests.server.gate import Gate
from tests.server.planned_engine import entry, keys_file
from tests.server.sockets import PATIENCE, Listening, eventually, listening, open_files, read_all, request
from tests.server.text_engine import TextEngine

BODY = json.dumps({"model": "text", "prompt": "a", "max_tokens": 12, "seed": 1}).encode()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)


def kept_open(body: bytes = BODY) -> bytes:
    return request(body).replace(b"Connection: close\r\n", b"")


def answer(client: socket.socket) -> bytes:
    """One answer of a connection that stays open."""
    received = b""
    while b"\r\n\r\n" not in received:
        byte = client.recv(1)
        assert byte, received
        received += byte
    length = int(received.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while length:
        piece = client.recv(length)
        assert piece, received
        received, length = received + piece, length - len(piece)
    return received


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("sent", [b"", b"P", request(BODY)[:60]])
def test_a_head_that_does_not_come_is_not_waited_for(sent: bytes) -> None:
    with listening(TextEngine()) as server:
        files = open_files()
        assert server.exchange(sent) == b""
        eventually(lambda: open_files() <= files)


@pytest.mark.usefixtures("impatient")
def test_nor_is_one_that_comes_byte_by_byte() -> None:
    stop = threading.Event()
    with listening(TextEngine()) as server, server.connect() as client:

        def trickle() -> None:
            for byte in request(BODY, "X-Slow: " + "x" * 10_000):
                try:
                    client.sendall(bytes([byte]))
                except OSError:
                    return
                if stop.wait(0.01):
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        received = read_all(client)
        stop.set()
        thread.join()
        assert received == b""


def test_nor_is_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(TextEngine()) as server, server.connect() as client:
        client.sendall(kept_open())
        assert answer(client).startswith(b"HTTP/1.1 200")
        # By now the wait for the next head has begun, and is long enough for it.
        eventually(lambda: len(server.visits) == 1)
        monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
        client.sendall(kept_open())
        assert answer(client).startswith(b"HTTP/1.1 200")
        with suppress(ConnectionError):
            client.sendall(kept_open()[:30])
        assert read_all(client) == b""


def test_an_answer_may_take_its_time() -> None:
    engine = TextEngine()
    gate = Gate(engine, 3)
    with listening(engine) as server, server.connect() as client:
        client.sendall(kept_open())
        gate.wait_held()
        server.skip(2 * connection.HEAD_SECONDS)
        gate.open()
        assert answer(client).startswith(b"HTTP/1.1 200")


def twice(server: Listening, *headers: bytes) -> int:
    """Answers to a body of no bytes, with another request behind it."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\n" + b"".join(one + b"\r\n" for one in headers)
    return server.exchange(head + b"\r\n0\r\n\r\n" + request(BODY)).count(b"HTTP/1.1 ")


def test_behind_a_length_told_in_two_ways_nothing_is_taken_for_a_request() -> None:
    with listening(TextEngine()) as server:
        assert twice(server, b"Transfer-Encoding: chunked") == 2
        assert twice(server, b"Content-Length: 5", b"Transfer-Encoding: chunked") == 1
        assert twice(server, b"transfer-encoding: chunked", b"CONTENT-LENGTH: 0") == 1


def test_keys_that_are_read_again_twice_at_once_are_those_read_last(tmp_path: Path) -> None:
    reached, opened = threading.Event(), threading.Event()
    armed = False

    def check(_: object) -> None:
        if armed and not reached.is_set():
            reached.set()
            assert opened.wait(PATIENCE)

    bound = {"mandatory": [{"attribute": "topic/sports", "strength": 0.5}]}
    ring = Keyring(keys_file(tmp_path, entry("team", "old", **bound)), check)
    armed = True
    first = threading.Thread(target=ring.reload)
    first.start()
    assert reached.wait(PATIENCE)
    keys_file(tmp_path, entry("team", "new", **bound))
    second = threading.Thread(target=ring.reload)
    second.start()
    # Were they not one after the other, the second would be done before the first goes on.
    second.join(0.3)
    opened.set()
    first.join()
    second.join()
    assert ring.find("new") is not None
    assert ring.find("old") is None
