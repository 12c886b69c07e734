"""Batches against server processes on this machine: every request gets its line, whatever the servers do."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from steerserve.batch.attempts import RefusedKeyError
from steerserve.batch.requests import BatchRequest
from steerserve.batch.results import BatchResult, ResultFile
from steerserve.batch.run import BatchConfig, BatchRun, NoServerError
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.test_process import Served, served


def requests(count: int, **fields: Any) -> list[BatchRequest]:
    body = {"model": "text", "max_tokens": 8, "prompt": "the"} | fields
    return [
        BatchRequest(custom_id=f"r{number}", method="POST", url="/v1/completions", body=body | {"seed": number})
        for number in range(count)
    ]


def run(
    asked: list[BatchRequest],
    path: Path,
    *urls: str,
    key: str | None = None,
    on_result: Callable[[BatchResult], None] = lambda _: None,
    **settings: Any,
) -> tuple[dict[str, BatchResult], BatchRun, list[str]]:
    """The results by name, as they stand in the file; what was done; and what was said."""
    said: list[str] = []
    with ResultFile(path, [one.custom_id for one in asked]) as results:
        batch = BatchRun(asked, results, BatchConfig(url=urls, **settings), key, on_result, said.append)
        asyncio.run(batch.run())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(one.custom_id for one in asked)
    return {line["custom_id"]: BatchResult(**line) for line in lines}, batch, said


def url(server: Served) -> str:
    return f"http://127.0.0.1:{server.port}"


def count(server: Served, code: int) -> int:
    """How many requests the server answered with this status."""
    lines = server.get("/metrics", Authorization=f"Bearer {SECRET}")[1].splitlines()
    found = [line for line in lines if line.startswith(f'steerserve_requests_total{{code="{code}",')]
    return sum(int(float(line.split()[-1])) for line in found)


def test_each_request_has_the_line_of_its_own_answer_and_every_server_its_share(tmp_path: Path) -> None:
    asked = requests(60)
    with served() as first, served() as second:
        results, batch, said = run(asked, tmp_path / "out.jsonl", url(first), f"{url(second)}/v1/", concurrency=4)
        alone, _, _ = run(asked, tmp_path / "alone.jsonl", url(first), concurrency=1)
        shares = (count(first, 200) - 60, count(second, 200))
    assert sum(shares) == 60 and min(shares) > 0
    assert all(one.served for one in results.values()) and not batch.sent_again and not said
    texts = [
        {name: (one.response or {})["body"]["choices"][0]["text"] for name, one in found.items()}
        for found in (results, alone)
    ]
    assert texts[0] == texts[1] and len(set(texts[0].values())) > 30
    assert len({one.id for one in results.values()}) == 60
    assert all((one.response or {})["request_id"] == one.id for one in results.values())


def test_a_request_that_is_wrong_has_its_error_as_a_line_and_is_asked_once(tmp_path: Path) -> None:
    asked = [*requests(3), *(one.model_copy(update={"custom_id": "wrong"}) for one in requests(1, max_tokens=-1))]
    with served() as server:
        results, batch, _ = run(asked, tmp_path / "out.jsonl", url(server))
        assert count(server, 400) == 1
    wrong = results["wrong"].response
    assert wrong is not None and results["wrong"].error is None and not results["wrong"].served
    assert (wrong["status_code"], wrong["body"]["error"]["param"]) == (400, "max_tokens")
    assert not batch.sent_again


def test_what_is_turned_away_is_sent_until_it_is_taken(tmp_path: Path) -> None:
    """By a key's concurrency, and by a queue of steps that is full: more often than an error may be tried again."""
    keys = keys_file(tmp_path, entry(max_concurrent=2))
    with served(keys=str(keys), max_rows=2, delay=0.005) as limited, served(max_queue_steps=16, max_rows=1) as full:
        urls = (url(limited), url(full))
        results, batch, _ = run(requests(24), tmp_path / "out.jsonl", *urls, key=SECRET, concurrency=16, retries=0)
        assert count(limited, 429) > 0
        assert batch.sent_again == count(limited, 429) + count(full, 503)
    assert all(one.served for one in results.values())


def test_a_server_that_is_killed_leaves_its_requests_to_the_other(tmp_path: Path) -> None:
    with served(delay=0.005) as first, served(delay=0.005) as second:
        done: list[str] = []

        def kill(result: BatchResult) -> None:
            done.append(result.custom_id)
            if len(done) == 20:
                first.process.kill()

        urls = (url(first), url(second))
        results, batch, said = run(requests(80), tmp_path / "out.jsonl", *urls, on_result=kill, concurrency=8)
    assert all(one.served for one in results.values())
    assert batch.sent_again > 0 and len(said) == 1 and said[0].startswith(url(first))


def test_a_server_that_drains_and_comes_back_is_waited_for(tmp_path: Path) -> None:
    """A rolling update of one replica: what runs is answered, what is new is turned away, then refused, then taken."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done: list[str] = []
    with served(port=port, delay=0.005, drain_seconds=2) as old:

        def stop(result: BatchResult) -> None:
            done.append(result.custom_id)
            if len(done) == 20:
                old.process.terminate()
                threading.Thread(target=restart).start()

        found: list[int] = []
        over = threading.Event()

        def restart() -> None:
            found.append(old.ended())
            with served(port=port):
                over.wait(60)

        try:
            results, _, said = run(requests(60), tmp_path / "out.jsonl", url(old), on_result=stop, concurrency=8)
        finally:
            over.set()
    assert found == [0]
    assert all(one.served for one in results.values())
    assert not said or said[-1].endswith("answers again")


def test_a_request_that_no_server_survives_ends_in_an_error_and_the_others_do_not(tmp_path: Path) -> None:
    """A server that closes the connection on one of the requests, each time."""
    with served() as server, socket.create_server(("127.0.0.1", 0)) as listener:

        def forward(client: socket.socket) -> None:
            """Hand one request on, unless it is the bad one."""
            with client, socket.create_connection(("127.0.0.1", server.port)) as behind, suppress(OSError):
                data = b""
                while b"\r\n\r\n" not in data or not data.rstrip().endswith(b"}"):
                    data += client.recv(65536)
                if b'"the bad one"' in data:
                    return
                behind.sendall(data.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
                while piece := behind.recv(65536):
                    client.sendall(piece)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=forward, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        bad = [one.model_copy(update={"custom_id": "bad"}) for one in requests(1, prompt="the bad one")]
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        results, batch, _ = run([*requests(10), *bad], tmp_path / "out.jsonl", address, retries=2)
        listener.shutdown(socket.SHUT_RDWR)
    assert results["bad"].response is None and results["bad"].error is not None
    assert results["bad"].error["code"] == "connection_lost"
    assert sum(one.served for one in results.values()) == 10
    assert batch.sent_again >= 2


def test_a_key_that_is_refused_ends_the_run_with_no_line(tmp_path: Path) -> None:
    keys, path = keys_file(tmp_path, entry()), tmp_path / "out.jsonl"
    with served(keys=str(keys)) as server:
        for key in (None, "another"):
            with pytest.raises(RefusedKeyError, match="refuses the key"):
                run(requests(5), path, url(server), key=key)
        assert path.read_bytes() == b""
        results, _, _ = run(requests(5), path, url(server), key=SECRET)
    assert all(one.served for one in results.values())


def test_where_nobody_answers_the_run_ends_and_can_be_gone_on_with(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path / "out.jsonl"
    with pytest.raises(NoServerError, match="5 requests are left"):
        run(requests(5), path, f"http://127.0.0.1:{port}", patience=0)
    with served(port=port) as server:
        results, _, _ = run(requests(5), path, url(server))
    assert all(one.served for one in results.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": ("127.0.0.1:8000",)},
        {"url": ("http://",)},
        {"url": ("http://a:1", "http://a:1/v1/")},
        {"concurrency": 0},
        {"retries": -1},
        {"timeout": 0.0},
        {"patience": float("nan")},
    ],
)
def test_a_wrong_setting_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must"):
        BatchConfig(**wrong)
