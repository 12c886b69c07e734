"""Faults on the wire, against a real socket: each leaves the server serving, and nothing behind."""

import json
import socket
import threading
from typing import Any

import pytest

from steerserve.config import ServerConfig
from tests.server.gate import Gate
from tests.server.sockets import Listening, eventually, listening, open_files, read_all, request
from tests.server.text_engine import TextEngine

BODY: dict[str, Any] = {"model": "text", "max_tokens": 20, "seed": 1}
RAW = json.dumps(BODY).encode()


def still_serves(server: Listening) -> None:
    answer = server.exchange(request(RAW))
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert b'"choices"' in answer


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\r\n",
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1e9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\nabc",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX: a\r\n b\x00\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_or_closed(raw: bytes) -> None:
    with listening(TextEngine()) as server:
        with server.connect() as client:
            client.sendall(raw)
            client.shutdown(socket.SHUT_WR)
            answer = read_all(client)
        assert not answer.startswith(b"HTTP/1.1 5")
        assert not answer.startswith(b"HTTP/1.1 2")
        still_serves(server)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["X-Long: " + "x" * 100_000], b"HTTP/1.1 4"),
        ([f"X-{i}: {'x' * 100}" for i in range(2000)], b"HTTP/1.1 4"),
        (["Authorization: Bearer " + "k" * 70_000], b"HTTP/1.1 4"),
        (["X-Long: " + "x" * 1_000_000], b"HTTP/1.1 4"),
        (["Authorization: Bearer " + "k" * 10_000], b"HTTP/1.1 200"),
    ],
)
def test_huge_headers_are_refused(headers: list[str], status: bytes) -> None:
    with listening(TextEngine()) as server:
        assert server.exchange(request(RAW, *headers)).startswith(status)
        assert server.exchange(request(RAW, path="/" + "x" * 100_000)).startswith(b"HTTP/1.1 4")
        still_serves(server)


@pytest.mark.parametrize("kept", range(0, len(RAW) + 1, 7))
def test_a_truncated_body_ends_its_request_and_no_row_runs(kept: int) -> None:
    engine = TextEngine()
    with listening(engine) as server:
        with server.connect() as client:
            client.sendall(request(RAW[:kept], length=len(RAW) + 1))
        eventually(lambda: len(server.visits) == 1)
        assert (server.visits[0].outcome, server.visits[0].code) == ("disconnected", 499)
        assert engine.steps == 0
        still_serves(server)


def test_a_body_that_does_not_come_is_a_408() -> None:
    with listening(TextEngine(), ServerConfig(drain_seconds=5, body_timeout=0.05)) as server:
        with server.connect() as client:
            client.sendall(request(b'{"model"', length=500))
            answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body_timeout" in answer
        eventually(lambda: len(server.visits) == 1)
        assert server.visits[0].reason == "body_timeout"
        still_serves(server)


STAGES = ["connected", "request line", "headers", "body", "queued", "first step", "streaming"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("abrupt", [False, True])
def test_a_client_may_leave_at_any_stage(stage: str, abrupt: bool) -> None:
    engine = TextEngine(max_rows=2)
    gate = Gate(engine, {"queued": 0, "first step": 1}.get(stage, 3))
    stream = {"stream": True, "diffusion": {"stream_mode": "events"}} if stage == "streaming" else {}
    whole = request(json.dumps(BODY | {"n": 3, "max_tokens": 100} | stream).encode())
    head = whole.index(b"\r\n\r\n")
    sent = {"connected": 0, "request line": 9, "headers": head - 5, "body": head + 20}.get(stage, len(whole))
    with listening(engine) as server:
        files = open_files()
        client = server.connect()
        client.sendall(whole[:sent])
        if stage in STAGES[4:]:
            gate.wait_held()
        if stage == "streaming":
            assert client.recv(65536)
        if abrupt:
            # A reset instead of an orderly end.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        client.close()
        if stage in STAGES[3:]:
            eventually(lambda: len(server.visits) == 1)
            assert server.visits[0].outcome == "disconnected"
        gate.open()
        still_serves(server)
        eventually(lambda: not engine.running and not engine.waiting)
        assert len(engine.finished) == 1
        assert len(engine.aborted) == (3 if stage in STAGES[4:] else 0)
        assert not server.app.state.worker.load.rows
        assert server.app.state.worker.load.waiting_steps == 0
        eventually(lambda: open_files() <= files)


def test_a_client_that_does_not_read_holds_nobody_up_and_is_let_go() -> None:
    engine = TextEngine(max_rows=32)
    body = BODY | {"n": 32, "max_tokens": 500, "stream": True, "diffusion": {"stream_mode": "events"}}
    with listening(engine, ServerConfig(drain_seconds=5, request_timeout=600)) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        with client:
            client.sendall(request(json.dumps(body).encode()))
            eventually(lambda: engine.steps > 50)
            still_serves(server)
            server.skip(600)
            eventually(lambda: any(visit.outcome == "timeout" for visit in server.visits))
            eventually(lambda: not engine.running)
        still_serves(server)


def test_hundreds_of_connections_get_one_answer_each() -> None:
    engine = TextEngine(max_rows=16, max_queue=100)
    answers: list[bytes] = []
    threads = threading.active_count()
    with listening(engine) as server:
        files = open_files()
        clients = [server.connect() for _ in range(300)]
        for index, client in enumerate(clients):
            client.sendall(request(json.dumps(BODY | {"stream": index % 3 == 0, "seed": index}).encode()))
        for client in clients:
            with client:
                answers.append(read_all(client))
        eventually(lambda: len(server.visits) == 300)
        served = sum(answer.startswith(b"HTTP/1.1 200") for answer in answers)
        for answer in answers:
            status = answer[9:12]
            assert status in (b"200", b"503"), answer
            if status == b"503":
                assert b"retry-after: " in answer
            elif b"text/event-stream" in answer:
                assert answer.count(b"[DONE]") == 1
                assert answer.count(b'"finish_reason":"') == 1
            else:
                assert answer.count(b'"finish_reason"') == 1
        assert served == len(engine.finished) >= 100
        eventually(lambda: open_files() <= files)
    eventually(lambda: threading.active_count() <= threads)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"prompt": "x" * 900_000}, b"HTTP/1.1 200"),
        ({"prompt": "x" * 1_100_000}, b"HTTP/1.1 413"),
        ({"prompt": [1] * 300_000}, b"HTTP/1.1 200"),
        ({"prompt": ["x"] * 1025}, b"HTTP/1.1 400"),
        ({"n": 65}, b"HTTP/1.1 400"),
        ({"max_tokens": 10**9}, b"HTTP/1.1 400"),
        ({"stop": ["x" * 257]}, b"HTTP/1.1 400"),
        ({"user": "x" * 513}, b"HTTP/1.1 400"),
        ({"model": "x" * 1000}, b"HTTP/1.1 400"),
        ({"steering": {"interventions": [{"attribute": "x"}] * 257}}, b"HTTP/1.1 400"),
        ({"diffusion": {"order": {"type": "x", **{str(i): i for i in range(50)}}}}, b"HTTP/1.1 400"),
        ({"seed": 10**400}, b"HTTP/1.1 400"),
    ],
)
def test_what_is_too_large_is_refused_and_what_is_not_is_served(fields: dict[str, Any], status: bytes) -> None:
    body = json.dumps(BODY | fields).encode()
    # What is refused for its length is refused unread; the rest of it would only meet a closed connection.
    sent = body[:1000] if b"413" in status else body
    with listening(TextEngine()) as server:
        answer = server.exchange(request(sent, length=len(body)))
        assert answer.startswith(status), answer[:300]
        still_serves(server)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"\xef\xbb\xbf{}", b"NaN", b"{}{}"])
def test_a_body_that_is_no_json_is_a_400(body: bytes) -> None:
    with listening(TextEngine()) as server:
        assert server.exchange(request(body)).startswith(b"HTTP/1.1 400")
        still_serves(server)
