"""The server as a process: signals, its exit code, its log, and the end of its engine."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from steerserve.cli import main
from steerserve.errors import SteerserveError
from steerserve.server.process import check_address, is_loopback
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.sockets import PATIENCE, eventually, read_all, request

ROOT = Path(__file__).parents[2]
LONG = {"model": "text", "max_tokens": 400, "seed": 1, "diffusion": {"stream_mode": "events"}, "stream": True}


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    said: list[str]
    port: int

    def stream(self, body: dict[str, Any]) -> socket.socket:
        """A connection on which the first bytes of the answer have come."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        client.sendall(request(json.dumps(body).encode()))
        assert client.recv(1, socket.MSG_PEEK)
        return client

    def get(self, path: str, port: int | None = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=PATIENCE)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def ended(self) -> int:
        return self.process.wait(PATIENCE)


@contextmanager
def served(stdout: Any = subprocess.DEVNULL, **settings: Any) -> Iterator[Served]:
    command = [sys.executable, "-m", "tests.server.served", json.dumps(settings)]
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stderr is not None
    said: list[str] = []
    try:
        while not (found := re.search(r"ready at http://[0-9.]+:(\d+)", said[-1] if said else "")):
            line = process.stderr.readline().decode()
            assert line, said
            said.append(line)
        yield Served(process, said, int(found[1]))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_stream_that_runs_at_sigterm_ends_properly_and_new_work_is_refused(tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.touch()
    with served(held=str(held)) as server, server.stream(LONG) as client:
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.get("/ready")[0] == 503)
        status, text = server.get("/health")
        assert status == 200, text
        with server.stream(LONG) as late:
            refused = read_all(late)
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"shutting_down" in refused
        assert b"retry-after: " in refused
        held.unlink()
        streamed = read_all(client)
        assert b"data: [DONE]\n\n" in streamed
        assert streamed.count(b'"type":"done"') == 1
        assert server.ended() == 0


def test_rows_that_outlast_the_drain_end_in_an_error_event() -> None:
    with served(delay=0.05, drain_seconds=0.1) as server, server.stream(LONG) as client:
        server.process.send_signal(signal.SIGTERM)
        streamed = read_all(client)
        assert b"[DONE]" not in streamed
        assert streamed.count(b'"code":"shutting_down"') == 1
        assert server.ended() == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_drain_at_once(second: signal.Signals) -> None:
    with served(delay=0.05, drain_seconds=600) as server, server.stream(LONG) as client:
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.get("/ready")[0] == 503)
        server.process.send_signal(second)
        assert b'"code":"shutting_down"' in read_all(client)
        assert server.ended() == 0


def test_an_idle_server_stops_at_once_on_either_signal() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with served() as server:
            server.process.send_signal(number)
            assert server.ended() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_answers_everybody_and_ends_the_process(stream: bool) -> None:
    body = LONG if stream else {"model": "text", "max_tokens": 400}
    with served(delay=0.05, fail_rows=5, max_rows=1) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) for _ in range(5)]
        for client in clients:
            client.sendall(request(json.dumps(body).encode()))
        answers = [read_all(client) for client in clients]
        for client, answer in zip(clients, answers, strict=True):
            client.close()
            assert answer.count(b'"code":"generation_failed"') == 1, answer
            assert b"secret" not in answer
        assert server.ended() == 70


def test_a_killed_server_leaves_nothing_that_keeps_the_next_from_serving() -> None:
    with served(delay=0.05) as server, server.stream(LONG) as client:
        server.process.kill()
        assert b"[DONE]" not in read_all(client)
    with served() as server, server.stream(LONG) as client:
        assert b"[DONE]" in read_all(client)


def test_keys_are_read_again_on_sighup_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    path = keys_file(tmp_path, entry("old", "old-secret"))
    with served(keys=str(path)) as server:

        def status(secret: str) -> int:
            return server.get("/v1/models", Authorization=f"Bearer {secret}")[0]

        def reloads(outcome: str) -> bool:
            text = "".join(server.get("/metrics", Authorization=f"Bearer {s}")[1] for s in ("old-secret", SECRET))
            return f'steerserve_key_reloads_total{{outcome="{outcome}"}} 1.0' in text

        assert (status("old-secret"), status(SECRET)) == (200, 401)
        path.write_text("{ broken")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: reloads("failed"))
        assert (status("old-secret"), status(SECRET)) == (200, 401)
        keys_file(tmp_path, entry("new"))
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: reloads("ok"))
        assert (status("old-secret"), status(SECRET)) == (401, 200)


def test_metrics_may_have_a_port_of_their_own(tmp_path: Path) -> None:
    with served(metrics_port=0, keys=str(keys_file(tmp_path, entry()))) as server:
        [port] = re.findall(r"metrics at http://127.0.0.1:(\d+)/metrics", "".join(server.said))
        status, text = server.get("/metrics", port=int(port))
        assert status == 200
        assert "steerserve_ready 1.0" in text
        assert server.get("/metrics")[0] == 401
        assert server.get("/v1/models", port=int(port))[0] != 200 or "steerserve_ready" in text
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0


def test_an_agent_check_is_told_how_much_waits_and_that_it_drains() -> None:
    with served(agent_port=0, max_rows=1, max_queue_steps=700, delay=0.02, drain_seconds=1) as server:
        [port] = re.findall(r"agent check at 127.0.0.1:(\d+)", "".join(server.said))

        def told() -> bytes:
            with socket.create_connection(("127.0.0.1", int(port)), timeout=PATIENCE) as client:
                return read_all(client)

        assert told() == b"up ready 100%\n"
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) for _ in range(3)]
        for client in clients[:2]:
            client.sendall(request(json.dumps(LONG).encode()))
        # One runs; eight seconds of work wait.
        eventually(lambda: 5 < int(told().split()[-1].rstrip(b"%")) < 30)
        clients[2].sendall(request(json.dumps(LONG).encode()))
        assert read_all(clients[2]).startswith(b"HTTP/1.1 503")
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: told() == b"drain\n")
        assert all(b"shutting_down" in read_all(client) for client in clients[:2])
        for client in clients:
            client.close()
        assert server.ended() == 0


@pytest.mark.parametrize("name", ["metrics_port", "agent_port"])
def test_a_port_in_use_is_said_and_is_no_success(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "tests.server.served", json.dumps({name: taken.getsockname()[1]})]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode != 0
    assert f"--{name.replace('_', '-')}".encode() in done.stderr


def test_each_request_is_a_line_of_json_on_standard_output(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as log, served(stdout=log) as server:
        for _ in range(3):
            with server.stream(LONG) as client:
                read_all(client)
        server.get("/nope")
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["route"], line["status"]) for line in lines] == [("/v1/completions", 200)] * 3 + [("other", 404)]
    assert len({line["request_id"] for line in lines}) == 4


def dropped_lines(server: Served) -> float:
    """As counted; each look at the metrics is a request with a line of its own."""
    [count] = re.findall(r"^steerserve_log_lines_dropped_total (\S+)$", server.get("/metrics")[1], re.MULTILINE)
    return float(count)


@pytest.mark.parametrize("how", ["full disk", "closed pipe", "unread pipe"])
def test_a_log_that_cannot_be_written_does_not_take_the_server_down(how: str) -> None:
    if how == "full disk" and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    reader, writer = os.pipe()
    target = os.open("/dev/full", os.O_WRONLY) if how == "full disk" else writer
    if how == "closed pipe":
        os.close(reader)
    try:
        with served(stdout=target) as server:
            assert server.process.stderr is not None
            if how == "closed pipe":
                server.process.stderr.close()
            for _ in range(20):
                with server.stream(LONG | {"max_tokens": 4}) as client:
                    assert b"[DONE]" in read_all(client)
                server.get("/nope" + "x" * 1000)
            if how != "unread pipe":
                eventually(lambda: dropped_lines(server) >= 40)
            server.process.send_signal(signal.SIGTERM)
            assert server.ended() == 0
    finally:
        os.close(writer)
        if how == "full disk":
            os.close(target)
        if how != "closed pipe":
            os.close(reader)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("example", False)],
)
def test_loopback_addresses_are_known(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_a_server_that_anybody_reaches_says_so() -> None:
    with served(host="0.0.0.0") as server:
        assert "whoever reaches 0.0.0.0 is served" in "".join(server.said)


def test_an_address_that_cannot_be_listened_on_is_refused_by_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SteerserveError, match=f"--metrics-port {port}: Address already in use"):
            check_address("--metrics-port", "127.0.0.1", port)
    check_address("--port", "127.0.0.1", port)
    check_address("--port", "localhost", 0)
    for nowhere in ("999.1.1.1", "192.0.2.1"):
        with pytest.raises(SteerserveError, match=f"--host {nowhere}: "):
            check_address("--port", nowhere, 8000)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", str(tiny_model), "--port", port]) == 2
    assert capsys.readouterr().err == f"steerserve: --port {port}: Address already in use\n"
