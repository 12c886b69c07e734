"""Keys and attributes that are read again while a server runs, by hand, by a signal and by a watch."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import EngineConfig, ServerConfig
from steerserve.runtime.load import load_runtime
from steerserve.server.app import create_app
from steerserve.server.watch import Watch, seen
from tests.runtime.test_steering import SHIPS, SPORTS, as_files, write
from tests.server.planned_engine import SECRET, entry
from tests.server.sockets import eventually
from tests.server.test_process import ROOT
from tests.steering.test_mounted import mounted

HEADERS = {"Authorization": f"Bearer {SECRET}"}


def keys(path: Path, mandatory: str) -> Path:
    pushed = {"attribute": mandatory, "strength": 0.4}
    path.write_text(json.dumps(entry(mandatory=[pushed], max_strength={"residual": 0.01})))
    return path


@pytest.fixture
def client(tiny_model: Path, tmp_path: Path) -> Iterator[TestClient]:
    """A server whose one key pushes topic/sports always."""
    write(tiny_model, tmp_path / "all" / "sports")
    service = load_runtime(tiny_model, None, [tmp_path / "all"], EngineConfig()).service
    app = create_app(service, ServerConfig(keys=keys(tmp_path / "keys.json", SPORTS), drain_seconds=5))
    with TestClient(app, headers=HEADERS) as found:
        yield found


def reloads(client: TestClient) -> dict[str, int]:
    text = client.get("/metrics").text
    found = re.findall(r'steerserve_(key|steering)_reloads_total\{outcome="(ok|failed)"\} (\d+)', text)
    return {f"{what} {outcome}": int(count) for what, outcome, count in found}


def test_keys_and_attributes_that_need_each_other_come_in_any_order(
    client: TestClient, tiny_model: Path, tmp_path: Path
) -> None:
    reload: Any = client.app.state.reload  # type: ignore[attr-defined]
    before = client.get("/v1/attributes").json()
    assert [one["name"] for one in before["data"]] == [SPORTS]
    # The key of old pushes what is to go.
    write(tiny_model, tmp_path / "all" / "sports", SHIPS)
    reload.steering()
    assert client.get("/v1/attributes").json() == before
    assert reloads(client) == {"key ok": 0, "key failed": 0, "steering ok": 0, "steering failed": 1}
    keys(tmp_path / "keys.json", SHIPS)
    reload.keys()
    assert client.get("/v1/attributes").json() == before, "nor is the new key taken before what it pushes is there"
    assert reloads(client) == {"key ok": 0, "key failed": 1, "steering ok": 0, "steering failed": 1}


def test_both_change_at_once_where_the_old_is_kept_beside_the_new(
    client: TestClient, tiny_model: Path, tmp_path: Path
) -> None:
    reload: Any = client.app.state.reload  # type: ignore[attr-defined]
    keys(tmp_path / "keys.json", SHIPS)
    reload.keys()
    write(tiny_model, tmp_path / "all" / "ships", SHIPS)
    reload.steering()
    assert reloads(client) == {"key ok": 1, "key failed": 1, "steering ok": 1, "steering failed": 0}
    answer = client.post("/v1/completions", json={"model": "model", "prompt": "the", "max_tokens": 4, "seed": 1})
    told = answer.json()["choices"][0]["steering"]
    assert [one["name"] for one in told["interventions"]] == [SHIPS]
    listed = client.get("/v1/attributes").json()
    assert told["revision"] == listed["revision"]
    assert f'steerserve_revision_info{{revision="{told["revision"]}"}} 1.0' in client.get("/metrics").text
    schema = client.get("/openapi.json").json()["components"]["schemas"]["Intervention"]["properties"]["attribute"]
    assert SHIPS in json.dumps(schema)
    # Now that no key pushes it, the old one may go; and what is counted by name goes on.
    (tmp_path / "all" / "sports" / "attribute.json").unlink()
    reload.all()
    assert [one["name"] for one in client.get("/v1/attributes").json()["data"]] == [SHIPS]
    assert f'steerserve_attribute_requests_total{{attribute="{SHIPS}"}} 1.0' in client.get("/metrics").text


def test_an_intervention_may_name_the_revision_of_its_attribute(
    client: TestClient, tiny_model: Path, tmp_path: Path
) -> None:
    reload: Any = client.app.state.reload  # type: ignore[attr-defined]
    write(tiny_model, tmp_path / "all" / "ships", SHIPS)
    (tmp_path / "keys.json").write_text(json.dumps(entry(denied_attributes=[SPORTS])))
    reload.all()

    def asked(name: str) -> Any:
        pushed = {"interventions": [{"attribute": name, "strength": 0.5}]}
        body = {"model": "model", "prompt": "the", "max_tokens": 4, "seed": 1, "steering": pushed}
        return client.post("/v1/completions", json=body)

    sha = {one["name"]: one["sha256"] for one in client.get("/v1/attributes").json()["data"]}
    told = asked(f"{SHIPS}@{sha[SHIPS][:8]}").json()["choices"][0]["steering"]
    assert told["interventions"][0]["name"] == SHIPS
    other = asked(f"{SHIPS}@{'0' * 12}")
    assert (other.status_code, other.json()["error"]["code"]) == (404, "revision_not_served")
    assert other.json()["error"]["param"] == "steering.interventions[0].attribute"
    assert asked(f"{SPORTS}@{sha[SPORTS][:8]}").status_code == 403, "what a key denies has no other name"
    write(tiny_model, tmp_path / "all" / "ships", SHIPS, seed=7)
    reload.all()
    assert asked(f"{SHIPS}@{sha[SHIPS]}").status_code == 404
    assert asked(SHIPS).status_code == 200


def test_a_server_reads_its_mounts_again_when_they_change_and_at_a_signal(tiny_model: Path, tmp_path: Path) -> None:
    made = write(tiny_model, tmp_path / "sports")
    mount = mounted(tmp_path / "mount", "1", as_files(made))
    flags = ["--model", str(tiny_model), "--attributes", str(mount), "--reload-seconds", "0.05", "--port", "0"]
    flags += [
        "--keys",
        str(mounted(tmp_path / "secret", "1", {"keys.json": json.dumps(entry()).encode()}) / "keys.json"),
    ]
    command = [sys.executable, "-m", "steerserve.cli", "serve", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    try:
        said = next(line for line in process.stderr if "ready at" in line)
        address = said.split()[2]

        def get(path: str, secret: str = SECRET) -> Any:
            headers = {"Authorization": f"Bearer {secret}"}
            with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers), timeout=60) as answer:
                return answer.read().decode()

        def revision() -> str:
            return str(json.loads(get("/v1/attributes"))["revision"])

        def counted(outcome: str) -> int:
            found = re.search(rf'steerserve_steering_reloads_total{{outcome="{outcome}"}} (\d+)', get("/metrics"))
            assert found is not None
            return int(found[1])

        first = revision()
        mounted(mount, "2", as_files(write(tiny_model, tmp_path / "sports", seed=7)))
        eventually(lambda: revision() != first)
        second = revision()
        broken = as_files(write(tiny_model, tmp_path / "sports", unit="bogus"))
        mounted(mount, "3", broken)
        eventually(lambda: counted("failed") == 1)
        assert (revision(), counted("ok")) == (second, 1)
        process.send_signal(signal.SIGHUP)
        eventually(lambda: counted("failed") == 2)
        mounted(mount, "4", as_files(write(tiny_model, tmp_path / "sports")))
        eventually(lambda: revision() == first)
        mounted(tmp_path / "secret", "2", {"keys.json": json.dumps(entry(secret="another")).encode()})
        eventually(lambda: _is_known(get, "another"))
        process.terminate()
        lines = [json.loads(line) for line in process.stderr if line.startswith("{")]
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    refused = [line["event"] for line in lines if "were not read again" in line["event"]]
    assert len(refused) == 2 and all(f"revision {second} stays" in line and "bogus" in line for line in refused)


def _is_known(get: Any, secret: str) -> bool:
    try:
        get("/v1/models", secret)
    except urllib.error.HTTPError as error:
        assert error.code == 401
        return False
    return True


def test_a_watch_waits_until_what_is_written_has_come_to_rest(tmp_path: Path) -> None:
    file, calls = tmp_path / "file", []
    file.write_text("1")
    (tmp_path / "back").symlink_to(tmp_path)

    def changed() -> None:
        calls.append(file.read_text())
        if len(calls) == 1:
            raise OSError("the first time it cannot be read")

    watch = Watch((tmp_path, tmp_path / "gone"), 0.01, changed)
    watch.start()
    file.write_text("12")
    eventually(lambda: calls == ["12"])
    (tmp_path / "gone").write_text("x")
    eventually(lambda: len(calls) == 2)
    watch.stop()
    file.write_text("123")
    time.sleep(0.05)
    assert calls == ["12", "12"]
    before = seen((tmp_path,))
    os.utime(file, ns=(1, 1))
    assert seen((tmp_path,)) != before
