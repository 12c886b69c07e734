"""What HTTP asks of a server: answers that reach whoever is still sending, every form of a target, every method."""

import http.client
import json
import shutil
import socket
import struct
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.server.http import connection
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.sockets import Listening, eventually, listening, read_all, request
from tests.server.text_engine import TextEngine, serving

SIZE = 12 << 20
LARGE = b'{"model": "text", "prompt": "' + b"x" * SIZE + b'"}'
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Listening]:
    with listening(TextEngine()) as made:
        yield made


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    keys = keys_file(tmp_path_factory.mktemp("keys"), entry())
    with listening(TextEngine(), ServerConfig(keys=keys, drain_seconds=5)) as made:
        yield made


def by_http_client(url: str) -> int:
    host = url.removeprefix("http://")
    with closing(http.client.HTTPConnection(host, timeout=60)) as client:
        client.request("POST", PATH, LARGE)
        return client.getresponse().status


def by_urllib(url: str) -> int:
    try:
        urllib.request.urlopen(urllib.request.Request(url + PATH, LARGE), timeout=60)
    except urllib.error.HTTPError as error:
        with error:
            assert error.read()
            return error.code
    return 200


def by_requests(url: str) -> int:
    requests = pytest.importorskip("requests")
    return int(requests.post(url + PATH, data=LARGE, timeout=60).status_code)


def by_httpx(url: str) -> int:
    return httpx2.post(url + PATH, content=LARGE, timeout=60).status_code


def in_chunks(url: str) -> int:
    return httpx2.post(
        url + PATH, content=(LARGE[i : i + 65536] for i in range(0, SIZE, 65536)), timeout=60
    ).status_code


def by_curl(url: str) -> int:
    """Which asks first whether to send (`Expect: 100-continue`)."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("no curl here")
    command = [program, "-s", "-o", "/dev/null", "-w", "%{http_code}", "--data-binary", "@-", url + PATH]
    return int(subprocess.run(command, input=LARGE, capture_output=True, check=True).stdout)


CLIENTS = [by_http_client, by_urllib, by_requests, by_httpx, in_chunks, by_curl]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_that_sends_too_much_at_once_reads_why(server: Listening, client: Any) -> None:
    assert client(f"http://127.0.0.1:{server.port}") == 413


@pytest.mark.parametrize("client", [by_http_client, by_urllib, by_requests, by_curl])
def test_so_does_one_that_is_refused_for_its_key(keyed: Listening, client: Any) -> None:
    assert client(f"http://127.0.0.1:{keyed.port}") == 401


def test_what_is_read_and_dropped_is_bounded(server: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "DROPPED_BYTES", 1 << 20)
    sent = 0
    with server.connect() as client:
        client.sendall(request(b"", length=1 << 40))
        assert client.recv(65536).startswith(b"HTTP/1.1 413")
        with pytest.raises(ConnectionError):
            while sent < 1 << 30:
                sent += client.send(b"x" * 65536)
    assert sent < 1 << 28


def test_nor_does_a_client_that_falls_silent_hold_its_connection(server: Listening) -> None:
    with server.connect() as client:
        client.sendall(request(b"x", length=SIZE))
        # The end of the answer is told at once, and is not waited for.
        assert read_all(client).startswith(b"HTTP/1.1 413")


def test_one_that_is_gone_before_its_answer_fails_nothing(server: Listening) -> None:
    count = len(server.visits)
    for _ in range(20):
        client = server.connect()
        client.sendall(request(b"x" * 1000, length=SIZE))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    # One that is reset before its head has been read is never seen; those that are, end, and the next one is served.
    assert server.exchange(b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )
    eventually(lambda: any(visit.outcome == "ok" for visit in server.visits[count:]))
    assert {visit.outcome for visit in server.visits[count:]} <= {"ok", "invalid", "disconnected"}


def test_a_head_that_cannot_be_read_is_answered_while_it_is_sent(server: Listening) -> None:
    raw = b"GET /health HTTP/1.1\r\nHost: test\r\n" + b"x" * (4 << 20)
    assert server.exchange(raw).startswith(b"HTTP/1.1 400")


def test_whoever_asks_first_is_told_to_go_on_or_why_not(server: Listening) -> None:
    body = json.dumps({"model": "text", "max_tokens": 4}).encode()
    with server.connect() as client:
        head, _, rest = request(body, "Expect: 100-continue").partition(b"\r\n\r\n")
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 100")
        client.sendall(rest)
        assert read_all(client).startswith(b"HTTP/1.1 200")
    with server.connect() as client:
        client.sendall(request(b"", "Expect: 100-continue", length=SIZE))
        answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 413") and b"100 Continue" not in answer


def asked(server: Listening, line: str, *headers: str) -> tuple[bytes, bytes]:
    """Head and body of the answer to a request without a body."""
    raw = "\r\n".join([line, "Host: test", "Connection: close", *headers, "", ""]).encode()
    head, _, body = server.exchange(raw).partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("base", ["http://test", "HTTP://test:8000", "https://u@[::1]:1", "http://other.example"])
def test_a_target_may_name_the_server(keyed: Listening, method: str, base: str) -> None:
    """The path alone decides, of what is served and of whether a key is needed."""
    bearer = f"Authorization: Bearer {SECRET}"
    for path, headers, status in (
        ("/health", [], b"200"),
        ("/v1/models", [], b"401"),
        ("/v1/models", [bearer], b"200"),
        ("/v1/features?limit=3", [bearer], b"404"),
        ("/http://test/health", [], b"401"),
        ("/http://test/health", [bearer], b"404"),
        ("", [], b"307"),
        ("?x=/health", [], b"307"),
    ):
        head, _ = asked(keyed, f"{method} {base}{path} HTTP/1.1", *headers)
        assert head.startswith(b"HTTP/1.1 " + status), (path, head)
        assert head == asked(keyed, f"{method} {path if path[:1] == '/' else '/' + path} HTTP/1.1", *headers)[0] or (
            b"date" in head or b"x-request-id" in head
        )
    head, _ = asked(keyed, f"{method} ftp://test/health HTTP/1.1", bearer)
    assert head.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))


def test_a_post_may_name_the_server_too(server: Listening) -> None:
    raw = request(json.dumps({"model": "text", "max_tokens": 4}).encode(), path=f"http://test{PATH}")
    assert server.exchange(raw).startswith(b"HTTP/1.1 200")


def test_head_is_get_without_the_body(client: TestClient) -> None:
    told = client.get("/openapi.json").json()["paths"]
    found = 0
    for path, methods in told.items():
        where = path.format(name="text", id="x", sae="none", index=0)
        answer = client.request("HEAD", where, follow_redirects=False)
        assert answer.content == b""
        if "get" not in methods:
            assert answer.status_code == 405
            continue
        found += 1
        whole = client.get(where, follow_redirects=False)
        assert answer.status_code == whole.status_code
        # Of what is measured anew each time the length may differ.
        if path != "/metrics":
            assert answer.headers["content-length"] == whole.headers["content-length"] == str(len(whole.content))
    assert found >= 12


def test_a_method_that_is_not_taken_is_told_all_that_are(client: TestClient) -> None:
    told = client.get("/openapi.json").json()["paths"]
    for path, methods in told.items():
        taken = {name.upper() for name in methods} - {"PARAMETERS"}
        taken |= {"HEAD"} if "GET" in taken else set()
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - taken:
            answer = client.request(method, path.format(name="text", id="x", sae="none", index=0))
            assert answer.status_code == 405, (method, path)
            assert answer.headers["allow"] == ", ".join(sorted(taken))
            if method != "HEAD":
                message = answer.json()["error"]["message"]
                assert message.startswith(f"{method} is not allowed") and message.endswith(answer.headers["allow"])


def test_the_root_leads_to_the_playground_and_says_what_is_where(tmp_path: Path) -> None:
    with serving(TextEngine(), ServerConfig(keys=keys_file(tmp_path, entry()), drain_seconds=5)) as client:
        answer = client.get("/", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (307, "playground")
        for name in ("playground", "docs", "openapi"):
            assert client.get(answer.json()[name]).status_code == (401 if name == "openapi" else 200)
        assert client.get("/").text == client.get("/playground").text
        page = client.get("/docs")
        assert page.headers["content-type"] == "text/html; charset=utf-8" and "<script" not in page.text
        assert "default-src 'self'" in page.headers["content-security-policy"]
        document = client.get("/openapi.json", headers={"authorization": f"Bearer {SECRET}"}).json()
        for path in document["paths"]:
            assert path == "/" or f"<td>{path}</td>" in page.text
        # Nothing that one server alone has is told without a key.
        assert "topic/sports" not in page.text + answer.text
