"""Changes of a generation through a replica that does not run it, over real sockets."""

import hashlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from steerserve.server.fleet.generation_ids import GenerationIds
from steerserve.server.fleet.signatures import HEADER, Signatures
from steerserve.server.telemetry.logs import described
from tests.server.gate import Gate
from tests.server.planned_engine import SECRET, PlannedEngine, entry, keys_file
from tests.server.sockets import PATIENCE, Listening, eventually, listening
from tests.server.text_engine import service_of

STEERED = {"steering": {"interventions": [{"attribute": "topic/sports", "strength": 1.0}]}}
LONG = {"model": "text", "prompt": "a", "seed": 4, "max_tokens": 40, "stream": True}
FLEET = "s" * 32
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@dataclass
class Replica:
    server: Listening
    gate: Gate
    engine: PlannedEngine

    @property
    def port(self) -> int:
        return self.server.port

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(method, path, None if body is None else json.dumps(body), headers or {})
        answer = connection.getresponse()
        raw = answer.read()
        connection.close()
        return answer.status, json.loads(raw), {name.lower(): value for name, value in answer.getheaders()}

    def change(
        self, method: str, name: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        return self.call(method, f"/v1/generations/{name}", body, headers)

    def steered_by(
        self, other: "Replica", name: str, body: Any, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """A PATCH through another replica; this one, which is held, makes a step once it has heard of it."""
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(other.change, "PATCH", name, body, headers)
            eventually(lambda: answer.done() or self.server.app.state.worker._delivery.pending)
            self.gate.let(1)
            return answer.result(PATIENCE)

    @contextmanager
    def stream(self, headers: dict[str, str] | None = None) -> Iterator[tuple[str, http.client.HTTPResponse]]:
        """A generation that runs and is held: its id and its answer, to be read once the gate is open."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("POST", "/v1/completions", json.dumps(LONG), headers or {})
        answer = connection.getresponse()
        assert answer.status == 200
        self.gate.wait_held()
        try:
            yield str(answer.getheader("x-generation-id")), answer
        finally:
            connection.close()

    def forwards(self, outcome: str) -> float | None:
        registry = self.server.app.state.metrics.registry
        value: float | None = registry.get_sample_value("steerserve_forwards_total", {"outcome": outcome})
        return value


@contextmanager
def replica(folder: Path, secret: str = FLEET, port: int | None = None, **settings: Any) -> Iterator[Replica]:
    port = port or free_port()
    path = folder / f"secret-{port}"
    path.write_text(secret)
    config = ServerConfig(replica_address=f"127.0.0.1:{port}", fleet_secret=path, drain_seconds=5, **settings)
    engine = PlannedEngine({})
    gate = Gate(engine, 5)
    with listening(engine, config, port=port) as server:
        try:
            yield Replica(server, gate, engine)
        finally:
            gate.open()


@contextmanager
def fleet(folder: Path, count: int = 2, **settings: Any) -> Iterator[list[Replica]]:
    with ExitStack() as stack:
        yield [stack.enter_context(replica(folder, **settings)) for _ in range(count)]


def test_a_change_reaches_the_replica_that_runs_the_generation(tmp_path: Path) -> None:
    with fleet(tmp_path, 3) as (a, b, c), a.stream() as (name, answer):
        status, told, headers = a.steered_by(b, name, STEERED)
        assert status == 200, told
        assert told["id"] == name
        assert told["rows"][0]["from_step"] in (5, 6)
        assert headers["content-type"] == "application/json"
        assert HEADER not in headers
        a.gate.wait_held()
        assert c.change("DELETE", name)[:2] == (200, {"id": name, "object": "generation.deleted", "deleted": True})
        # As often as one likes, at any of them.
        for one in (a, b, c):
            assert one.change("DELETE", name)[0] == 200
        a.gate.open()
        assert b'"deleted"' in answer.read()
        assert [one.forwards("answered") for one in (a, b, c)] == [0, 2, 2]
        assert not b.engine.added
        assert not c.engine.added


def test_what_is_gone_or_never_was_is_not_found(tmp_path: Path) -> None:
    with fleet(tmp_path) as (a, b):
        a.gate.open()
        _, told, _ = a.call("POST", "/v1/completions", LONG | {"stream": False})
        other = GenerationIds([b"t" * 32], f"127.0.0.1:{a.port}").new("cmpl-")
        for name in (told["id"], other, "cmpl-0123", "x"):
            for method in ("PATCH", "DELETE"):
                status, error, _ = b.change(method, name, STEERED if method == "PATCH" else None)
                assert (status, error["error"]["code"]) == (404, "not_found")
        assert b.forwards("answered") == 2


def test_errors_come_back_as_the_replica_says_them(tmp_path: Path) -> None:
    with fleet(tmp_path) as (a, b), a.stream() as (name, _):
        wrong = {"steering": {"interventions": [{"attribute": "topic/none"}]}}
        status, error, _ = b.change("PATCH", name, wrong)
        assert (status, error["error"]["param"]) == (404, "steering.interventions[0].attribute")
        eventually(lambda: b.server.visits and b.server.visits[-1].reason == "not_found")
        # What is wrong whatever runs is said at once.
        status, error, _ = b.change("PATCH", name, {"steering": {"nonsense": 1}})
        assert (status, error["error"]["param"]) == (400, "steering.nonsense")
        assert b.forwards("answered") == 1


def test_a_replica_that_is_not_there_is_named(tmp_path: Path) -> None:
    with replica(tmp_path) as b:
        name = GenerationIds([FLEET.encode()], f"127.0.0.1:{free_port()}").new("cmpl-")
        status, error, _ = b.change("DELETE", name)
        assert (status, error["error"]["code"]) == (502, "replica_unreachable")
        assert "ConnectError" in error["error"]["message"]
        assert b.forwards("unreachable") == 1


def test_a_replica_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, replica(tmp_path, forward_seconds=0.2) as b:
        name = GenerationIds([FLEET.encode()], f"127.0.0.1:{silent.getsockname()[1]}").new("cmpl-")
        status, error, _ = b.change("DELETE", name)
        assert (status, error["error"]["code"]) == (502, "replica_unreachable")


@contextmanager
def stranger(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[int, list[str]]]:
    """A server of no fleet: its port, and the headers that it has seen."""
    seen: list[str] = []

    class Stranger(BaseHTTPRequestHandler):
        def do_DELETE(self) -> None:
            seen.append(str(self.headers))
            answer(self)

        def log_message(self, *_: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Stranger)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def nothing(handler: BaseHTTPRequestHandler, proof: str | None = None) -> None:
    handler.send_response(200)
    if proof is not None:
        handler.send_header(HEADER, proof)
    handler.send_header("content-length", "2")
    handler.end_headers()
    handler.wfile.write(b"{}")


def test_a_stranger_at_an_old_address_learns_no_key_and_answers_nothing(tmp_path: Path) -> None:
    with stranger(nothing) as (port, seen), replica(tmp_path, keys=keys_file(tmp_path, entry())) as b:
        name = GenerationIds([FLEET.encode()], f"127.0.0.1:{port}").new("cmpl-")
        status, error, _ = b.change("DELETE", name, headers={"authorization": f"Bearer {SECRET}"})
        assert (status, error["error"]["code"]) == (502, "replica_unreachable")
    assert len(seen) == 1
    assert SECRET not in seen[0]
    assert FLEET not in seen[0]


@pytest.mark.parametrize("proof", ["0" * 64, "\xe9"])
def test_a_proof_that_is_none_is_refused(tmp_path: Path, proof: str) -> None:
    with stranger(partial(nothing, proof=proof)) as (port, _), replica(tmp_path) as b:
        name = GenerationIds([FLEET.encode()], f"127.0.0.1:{port}").new("cmpl-")
        status, error, _ = b.change("DELETE", name)
        assert (status, error["error"]["code"]) == (502, "replica_unreachable")
        assert "without its proof" in error["error"]["message"]


def test_nothing_is_read_of_an_answer_without_proof(tmp_path: Path) -> None:
    """However much of it a stranger sends."""
    gone = threading.Event()

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        # More than the two sockets hold: it ends once the other side has closed its own.
        with suppress(OSError):
            for _ in range(1024):
                handler.wfile.write(bytes(1 << 16))
            return
        gone.set()

    with stranger(endless) as (port, _), replica(tmp_path) as b:
        name = GenerationIds([FLEET.encode()], f"127.0.0.1:{port}").new("cmpl-")
        status, error, _ = b.change("DELETE", name)
        assert (status, error["error"]["code"]) == (502, "replica_unreachable")
        assert gone.wait(PATIENCE)


def test_a_trace_state_that_no_header_may_have_is_left_out(tmp_path: Path) -> None:
    given = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "tracestate": "vendor=\xe9"}
    with fleet(tmp_path) as (a, b), a.stream() as (name, _):
        assert b.change("DELETE", name, headers=given)[0] == 200
        eventually(lambda: any(visit.method == "DELETE" for visit in a.server.visits))
        there = next(visit for visit in a.server.visits if visit.method == "DELETE")
        assert (there.trace.trace_id, there.trace.state) == (TRACE, None)


def test_replicas_with_different_secrets_do_not_trust_each_other(tmp_path: Path) -> None:
    with replica(tmp_path) as a, replica(tmp_path, secret="t" * 32 + "\n" + FLEET) as b, a.stream() as (name, _):
        # b reads a's ids, and signs with what a does not know.
        status, error, _ = b.change("DELETE", name)
        assert (status, error["error"]["code"]) == (502, "replica_unreachable")
        eventually(lambda: a.server.visits and a.server.visits[-1].reason == "forward_refused")


def test_what_was_forwarded_is_never_forwarded_again(tmp_path: Path) -> None:
    with fleet(tmp_path) as (a, b), a.stream() as (name, _):
        path = f"/v1/generations/{name}"
        signed = Signatures([FLEET.encode()], "elsewhere:1").sign("DELETE", path, None)
        status, error, headers = b.call("DELETE", path, headers={HEADER: signed})
        assert (status, error["error"]["code"]) == (404, "not_found")
        assert HEADER in headers
        assert b.forwards("answered") == b.forwards("unreachable") == 0
        status, error, _ = b.call("DELETE", path, headers={HEADER: "t=1"})
        assert (status, error["error"]["code"]) == (403, "forward_refused")


def test_the_callers_key_holds_where_it_arrives_and_where_it_runs(tmp_path: Path) -> None:
    other = "sk-steer-another-0123456789abcdef0123456789"
    keys = keys_file(
        tmp_path,
        entry(rate_per_minute=4, denied_attributes=["sentiment/*"], max_strength={"residual": 0.5}),
        entry("other", other),
    )
    mine, theirs = {"authorization": f"Bearer {SECRET}"}, {"authorization": f"Bearer {other}"}
    with fleet(tmp_path, keys=keys) as (a, b), a.stream(mine) as (name, _):
        assert b.change("DELETE", name)[0] == 401
        assert b.forwards("answered") == 0
        # Another key's generation is as good as none.
        assert b.change("DELETE", name, headers=theirs)[0] == 404
        denied = {"steering": {"interventions": [{"attribute": "sentiment/positive", "strength": 0.1}]}}
        status, error, _ = b.change("PATCH", name, denied, mine)
        assert (status, error["error"]["param"]) == (403, "steering.interventions[0].attribute")
        assert b.forwards("answered") == 1
        # A limit on the plan is held where there is a plan.
        status, error, _ = b.change("PATCH", name, STEERED, mine)
        assert (status, error["error"]["param"]) == (403, "steering.interventions[0].strength")
        assert b.forwards("answered") == 2
        weak = {"steering": {"interventions": [{"attribute": "topic/sports", "strength": 0.1}]}}
        assert a.steered_by(b, name, weak, mine)[0] == 200
        # Counted where it arrived: four there, and none where it was forwarded to.
        assert [b.change("PATCH", name, denied, mine)[0] for _ in range(2)] == [403, 429]
        assert a.change("PATCH", name, denied, mine)[0] == 403


def test_a_key_that_the_other_replica_does_not_know_is_refused(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    there, here = keys_file(folders[0], entry("other", "sk-other")), keys_file(folders[1], entry())
    with (
        replica(folders[0], keys=there) as a,
        replica(folders[1], keys=here) as b,
        a.stream({"authorization": "Bearer sk-other"}) as (name, _),
    ):
        status, error, _ = b.change("DELETE", name, headers={"authorization": f"Bearer {SECRET}"})
        assert (status, error["error"]["code"]) == (401, "invalid_api_key")


def test_one_request_id_and_one_trace_from_the_first_replica_to_the_last_line(tmp_path: Path) -> None:
    with fleet(tmp_path) as (a, b), a.stream() as (name, _):
        given = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "tracestate": "vendor=1", "x-request-id": "mine"}
        _, _, headers = b.change("DELETE", name, headers=given)
        assert headers["x-request-id"] == "mine"
        eventually(lambda: b.server.visits and any(visit.method == "DELETE" for visit in a.server.visits))
        there = next(visit for visit in a.server.visits if visit.method == "DELETE")
        [here] = b.server.visits
        assert here.id == there.id == "mine"
        assert here.trace.trace_id == there.trace.trace_id == TRACE
        assert there.trace.parent_id == here.trace.span_id
        assert there.trace.state == "vendor=1"
        assert here.forwarded_to == f"127.0.0.1:{a.port}"
        assert there.forwarded_from == f"127.0.0.1:{b.port}"
        lines = [described(here), described(there)]
        assert {(line["request_id"], line["trace_id"]) for line in lines} == {("mine", TRACE)}


def test_a_server_alone_knows_nothing_of_forwarding() -> None:
    path = "/v1/generations/cmpl-x"
    signed = Signatures([FLEET.encode()], "a:1").sign("DELETE", path, hashlib.sha256(b"x").hexdigest())
    with listening(PlannedEngine({})) as server:
        alone = Replica(server, Gate(PlannedEngine({}), 1), PlannedEngine({}))
        assert alone.call("DELETE", path, headers={HEADER: signed})[0] == 404
        status, told, _ = alone.call("POST", "/v1/completions", LONG | {"stream": False})
        assert (status, len(told["id"])) == (200, len("cmpl-") + 32)


def test_the_flags_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs replica_address"):
        ServerConfig(fleet_secret=tmp_path)
    with pytest.raises(ValueError, match="forward_seconds"):
        ServerConfig(forward_seconds=0)
    secret = tmp_path / "secret"
    secret.write_text(FLEET)
    create_app(service_of(PlannedEngine({})), ServerConfig(replica_address="host", fleet_secret=secret))
