"""Routers before several replicas: their configurations are taken, and one that is here is run."""

import asyncio
import http.client
import json
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from steerserve.batch.results import BatchResult, ResultFile
from steerserve.batch.run import BatchConfig, BatchRun
from steerserve.server.telemetry.vllm_names import NAMES
from tests.batch.test_run import requests
from tests.server.sockets import PATIENCE, eventually, request
from tests.server.test_process import LONG, Served, served

ROUTERS = Path(__file__).parents[2] / "deploy" / "routers"
CHART = ROUTERS.parent / "kubernetes" / "steerserve.yaml"
HAPROXY = shutil.which("haproxy")


def documents(path: Path) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def of_kind(path: Path, kind: str) -> dict[str, Any]:
    [found] = [one for one in documents(path) if one["kind"] == kind]
    return found


@pytest.mark.parametrize("file", ["production-stack.yaml", "inference-pool.yaml"])
def test_manifests_are_kubernetes_own_or_of_the_gateway_api(file: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for one in documents(ROUTERS / file):
        if "gateway" not in one["apiVersion"] and "inference" not in one["apiVersion"]:
            validate(one, "1.30", strict=True)


def test_routers_find_the_pods_of_the_chart() -> None:
    pod = of_kind(CHART, "Deployment")["spec"]["template"]
    labels = pod["metadata"]["labels"]
    ports = {one["name"]: one["containerPort"] for one in pod["spec"]["containers"][0]["ports"]}
    pool = of_kind(ROUTERS / "inference-pool.yaml", "InferencePool")
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert pool["spec"]["targetPorts"] == [{"number": ports["http"]}]
    route = of_kind(ROUTERS / "inference-pool.yaml", "HTTPRoute")
    [backend] = route["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
    router = of_kind(ROUTERS / "production-stack.yaml", "Deployment")["spec"]["template"]["spec"]["containers"][0]
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in router["args"])
    name, value = flags["k8s-label-selector"].split("=")
    assert labels[name] == value and flags["k8s-port"] == str(ports["http"])
    # What its router reads (src/vllm_router/stats/engine_stats.py), and what the endpoint picker reads by default.
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} == set(NAMES)


@contextmanager
def haproxy(folder: Path, servers: list[Served], agents: tuple[int, ...] = ()) -> Iterator[str]:
    """HAProxy with the configuration of `deploy`, before these servers; agents: the ports of their agent checks. It
    takes commands at `folder / "control"`."""
    assert HAPROXY is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = (ROUTERS / "haproxy.cfg").read_text().replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    for index, name in enumerate("abc"):
        line = f"    server {name} 127.0.0.1:{8001 + index}\n"
        assert line in text
        check = f" weight 100 agent-check agent-port {agents[index]} agent-inter 100ms" if index < len(agents) else ""
        mine = f"    server {name} 127.0.0.1:{servers[index].port}{check}\n" if index < len(servers) else ""
        text = text.replace(line, mine)
    text = text.replace("global\n", f"global\n    stats socket {folder}/control level operator\n", 1)
    (folder / "haproxy.cfg").write_text(text)
    process = subprocess.Popen([HAPROXY, "-f", str(folder / "haproxy.cfg"), "-db"], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: status(port) == 200)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def weight(folder: Path, name: str) -> int:
    """How much HAProxy sends to a server, of 1 to 256."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "control"))
        client.sendall(f"get weight replicas/{name}\n".encode())
        return int(client.recv(100).split()[0])


def status(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


@pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")
def test_a_replica_that_is_told_to_go_behind_haproxy_loses_no_request(tmp_path: Path) -> None:
    done: list[BatchResult] = []
    with (
        served(delay=0.005, drain_seconds=2) as first,
        served(delay=0.005) as second,
        haproxy(tmp_path, [first, second]) as address,
    ):

        def stop(result: BatchResult) -> None:
            done.append(result)
            if len(done) == 30:
                first.process.terminate()

        asked = requests(120)
        with ResultFile(tmp_path / "out.jsonl", [one.custom_id for one in asked]) as results:
            # No attempt more than the first: what the proxy does not save is an error.
            config = BatchConfig(url=(address,), concurrency=8, retries=0)
            batch = BatchRun(asked, results, config, on_result=stop)
            asyncio.run(batch.run())
        assert first.ended() == 0
    assert all(result.served for result in done) and len(done) == 120


@pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")
def test_haproxy_sends_less_where_work_waits() -> None:
    # A path of its own: one of a socket may have 107 bytes.
    with (
        tempfile.TemporaryDirectory() as name,
        served(agent_port=0, max_rows=1, delay=0.02, drain_seconds=0) as first,
        served(agent_port=0) as second,
    ):
        folder = Path(name)
        ports = [int(re.findall(r"agent check at 127.0.0.1:(\d+)", "".join(each.said))[0]) for each in (first, second)]
        with haproxy(folder, [first, second], tuple(ports)):
            eventually(lambda: weight(folder, "a") == weight(folder, "b") == 100)
            clients = [socket.create_connection(("127.0.0.1", first.port), timeout=PATIENCE) for _ in range(2)]
            for client in clients:
                client.sendall(request(json.dumps(LONG).encode()))
            eventually(lambda: weight(folder, "a") < 30)
            assert weight(folder, "b") == 100
            for client in clients:
                client.close()


@pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")
def test_haproxy_takes_its_configuration_as_it_stands() -> None:
    assert HAPROXY is not None
    done = subprocess.run([HAPROXY, "-c", "-f", str(ROUTERS / "haproxy.cfg")], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_takes_its_configuration_as_it_stands(tmp_path: Path) -> None:
    command = ["nginx", "-t", "-c", str(ROUTERS / "nginx.conf"), "-g", f"pid {tmp_path}/pid; error_log stderr;"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
