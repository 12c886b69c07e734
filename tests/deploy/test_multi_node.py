"""The example of one model over several nodes: Kubernetes takes its parts, and they fit each other and the server."""

import re
import shlex
from typing import Any

import pytest

from steerserve.cli import build_parser
from tests.deploy.files import DEPLOY, ROOT, Document, documents

FILE = DEPLOY / "kubernetes" / "multi-node" / "steerserve.yaml"
GPU = "nvidia.com/gpu"
GROUP_KEYS = {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
"""Fields of LeaderWorkerSet's template that the example uses; its schema is not among Kubernetes' own."""


@pytest.fixture(scope="module")
def parts() -> dict[str, Document]:
    return {one["kind"]: one for one in documents(FILE.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def group(parts: dict[str, Document]) -> Document:
    found: Document = parts["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return found


def pods(group: Document) -> list[Document]:
    return [group["leaderTemplate"], group["workerTemplate"]]


def command(template: Document) -> str:
    [container] = template["spec"]["containers"]
    assert container["command"] == ["sh", "-c"]
    [line] = container["args"]
    return str(line)


def test_kubernetes_takes_its_pods_service_and_policy(parts: dict[str, Document], group: Document) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    own: list[Document] = [parts["Service"], parts["NetworkPolicy"]]
    for name, template in zip(("leader", "worker"), pods(group), strict=True):
        metadata = template["metadata"] | {"name": name}
        own.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
    for document in own:
        for version in ("1.30", validate.latest_version()):
            validate.validate(document, version, strict=True)


def test_the_group_is_a_leader_worker_set_that_starts_anew_as_one(parts: dict[str, Document], group: Document) -> None:
    assert parts["LeaderWorkerSet"]["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(group) == GROUP_KEYS
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_there_are_as_many_ranks_as_gpus_in_the_group(group: Document) -> None:
    each = {int(one["spec"]["containers"][0]["resources"]["limits"][GPU]) for one in pods(group)}
    assert len(each) == 1
    [ranks] = re.findall(r"--tensor-parallel-size (\d+)", command(group["leaderTemplate"]))
    assert int(ranks) == group["size"] * each.pop()


def test_the_server_takes_its_flags_and_vllm_its_option(group: Document) -> None:
    line = command(group["leaderTemplate"])
    words = shlex.split(line[line.index("steerserve serve") :])
    parsed: Any = build_parser().parse_args(words[1:])
    assert vars(parsed)["BackendConfig.engine"] == "vllm"
    assert vars(parsed)["BackendConfig.vllm_arg"] == ["distributed_executor_backend=ray"]


def test_the_worker_joins_the_leader_on_the_port_that_it_opens(group: Document) -> None:
    [opened] = re.findall(r"--port=(\d+)", command(group["leaderTemplate"]))
    assert f"--address=$(LWS_LEADER_ADDRESS):{opened}" in command(group["workerTemplate"])


def test_only_the_leader_is_served_and_nothing_runs_as_root(parts: dict[str, Document], group: Document) -> None:
    selector = parts["Service"]["spec"]["selector"]
    served = [set(selector.items()) <= set(one["metadata"]["labels"].items()) for one in pods(group)]
    assert served == [True, False]
    for one in pods(group):
        assert one["spec"]["securityContext"]["runAsNonRoot"] is True
        assert one["spec"]["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_every_pod_has_the_weights_at_one_place(group: Document) -> None:
    places = [
        {mount["name"]: mount["mountPath"] for mount in one["spec"]["containers"][0]["volumeMounts"]}
        for one in pods(group)
    ]
    assert places[0] == places[1]
    assert f"--model {places[0]['weights']}/" in command(group["leaderTemplate"])


def test_the_image_is_of_the_vllm_that_is_pinned() -> None:
    pins = (ROOT / "constraints-vllm.txt").read_text(encoding="utf-8")
    [version] = re.findall(r"^vllm==(.*)$", pins, flags=re.MULTILINE)
    assert f"vllm-openai:v{version}" in (DEPLOY / "vllm.Dockerfile").read_text(encoding="utf-8")
