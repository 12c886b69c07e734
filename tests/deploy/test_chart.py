"""The chart, rendered by helm for its default values and three more sets."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import steerserve
from steerserve.cli import build_parser
from steerserve.server.process import ANSWER_SECONDS
from tests.deploy.files import (
    CHART,
    DEPLOY,
    VALUE_SETS,
    Document,
    alert_rules,
    dashboard,
    documents,
    helm,
    of_kind,
    read_yaml,
    rendered,
    values_file,
)

# Kinds of operators, which Kubernetes' own schemas do not know.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
EVERY_CHECK = pytest.mark.parametrize("values", VALUE_SETS)


def merged(base: Any, over: Any) -> Any:
    """Values as helm lays one file over another."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return base | {key: merged(base.get(key), value) for key, value in over.items()}


def pod(values: str) -> Document:
    """The pod of the Deployment."""
    [deployment] = of_kind(rendered(values), "Deployment")
    template: Document = deployment["spec"]["template"]
    return template


def container(values: str) -> Document:
    """Its one container."""
    [server] = pod(values)["spec"]["containers"]
    found: Document = server
    return found


def flags(values: str) -> dict[str, Any]:
    """The container's arguments as the server reads them."""
    return vars(build_parser().parse_args(container(values)["args"]))


@EVERY_CHECK
def test_values_satisfy_their_schema(values: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(merged(read_yaml(values_file("default")), read_yaml(values_file(values))), schema)


def test_the_schema_knows_every_value_and_no_other() -> None:
    def names(properties: Document, values: Document, path: str) -> None:
        assert set(properties) - {"global"} == set(values), path
        for name, value in values.items():
            inner = properties[name].get("properties")
            if isinstance(value, dict) and inner and properties[name].get("additionalProperties") is False:
                names({key: entry for key, entry in inner.items() if key in value}, value, f"{path}.{name}")

    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    names(schema["properties"], read_yaml(values_file("default")), "values")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("replicas=2", "replicas"),
        ("autoscaling.mode=both", "autoscaling.mode"),
        ("autoscaling.minReplicas=0", "autoscaling.minReplicas"),
        ("server.flags.port=1", "flags"),
        ("server.flags.keys=/tmp/keys", "flags"),
        ("server.port=80", "server.port"),
        ("model.path=../etc", "model.path"),
        ("model.path=/etc", "model.path"),
        ("ingress.enabled=true", "host"),
        ("image.digest=latest", "image.digest"),
        ("model.path=llada", "weights.enabled"),
        ("limits.store=redis://valkey:6379/0", "keys.existingSecret"),
        ("limits.store=http://valkey", "limits.store"),
        ("limits.failure=maybe", "limits.failure"),
        ("server.flags.replica-address=host", "flags"),
    ],
)
def test_wrong_values_are_refused_by_name(setting: str, named: str) -> None:
    done = helm("template", "steerserve", str(CHART), "--set", setting)
    assert done.returncode != 0
    assert named in done.stderr


@EVERY_CHECK
def test_what_it_makes_is_what_kubernetes_takes(values: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in rendered(values):
        if document["kind"] not in CUSTOM:
            for version in ("1.30", validate.latest_version()):
                validate.validate(document, version, strict=True)


def test_the_check_by_schema_refuses_what_is_wrong() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    [deployment] = of_kind(rendered("default"), "Deployment")
    wrong = deployment | {"spec": deployment["spec"] | {"replicas": "one"}}
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, "1.30", strict=True)


@EVERY_CHECK
def test_pods_meet_the_restricted_standard(values: str) -> None:
    found = [pod(values)["spec"], *(one["spec"] for one in of_kind(rendered(values), "Pod"))]
    for spec in found:
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in spec["containers"]:
            security = one["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert one["resources"]["limits"]["memory"]
        assert not any("hostPath" in volume for volume in spec.get("volumes", ()))
        assert not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
    for account in of_kind(rendered(values), "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@EVERY_CHECK
def test_the_server_takes_its_flags_and_they_are_those_of_the_values(values: str) -> None:
    asked = merged(read_yaml(values_file("default")), read_yaml(values_file(values)))
    parsed = flags(values)
    assert parsed["ServerConfig.port"] == asked["server"]["port"]
    assert parsed["ServerConfig.metrics_port"] == asked["server"]["metricsPort"]
    assert parsed["ServerConfig.drain_seconds"] == asked["server"]["drainSeconds"]
    by_name = {name.split(".")[-1]: value for name, value in parsed.items()}
    for name, value in asked["server"]["flags"].items():
        assert by_name[name.replace("-", "_")] == value, name
    mounts = {mount["mountPath"] for mount in container(values)["volumeMounts"]}
    for folder in ("model", "sae", "attributes"):
        if asked["model"]["path" if folder == "model" else folder]:
            # Attributes may be several folders; the chart mounts one.
            [place] = parsed[folder] if folder == "attributes" else [parsed[folder]]
            assert Path(place).parent == Path(asked["weights"]["mountPath"])
            assert asked["weights"]["mountPath"] in mounts
    if asked["keys"]["existingSecret"]:
        assert str(by_name["keys"].parent) in mounts


def test_large_numbers_are_written_out() -> None:
    assert "--max-body-bytes=4194304" in container("cpu-small")["args"]


@EVERY_CHECK
def test_a_pod_has_time_to_drain(values: str) -> None:
    before = int(container(values)["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = before + flags(values)["ServerConfig.drain_seconds"] + ANSWER_SECONDS
    assert pod(values)["spec"]["terminationGracePeriodSeconds"] >= needed + 5


@EVERY_CHECK
def test_liveness_and_readiness_ask_different_questions(values: str) -> None:
    server = container(values)
    paths = {probe: server[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


@EVERY_CHECK
def test_everything_selects_the_pods_and_names_their_ports(values: str) -> None:
    found = rendered(values)
    labels, ports = pod(values)["metadata"]["labels"], {port["name"] for port in container(values)["ports"]}
    service, *replicas = sorted(of_kind(found, "Service"), key=lambda one: one["spec"].get("clusterIP") == "None")
    selectors = [one["spec"]["selector"] for one in (service, *replicas)]
    selectors += [one["spec"]["selector"]["matchLabels"] for one in of_kind(found, "Deployment")]
    selectors += [one["spec"]["selector"]["matchLabels"] for one in of_kind(found, "PodDisruptionBudget")]
    selectors += [one["spec"]["podSelector"]["matchLabels"] for one in of_kind(found, "NetworkPolicy")]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert selector["app.kubernetes.io/component"] == "server"
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports == {"http", "metrics"}
    for monitor in of_kind(found, "ServiceMonitor"):
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert monitor["spec"]["endpoints"][0]["port"] == "metrics"
        # The alerts expect this job.
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "steerserve"


@EVERY_CHECK
def test_one_thing_alone_sets_the_number_of_replicas(values: str) -> None:
    found = rendered(values)
    [deployment] = of_kind(found, "Deployment")
    scalers = of_kind(found, "HorizontalPodAutoscaler") + of_kind(found, "ScaledObject")
    assert len(scalers) + ("replicas" in deployment["spec"]) == 1
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_callers_and_scrapers_reach_a_port_each_and_the_server_reaches_nobody() -> None:
    [policy] = of_kind(rendered("default"), "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert policy["spec"]["egress"] == []
    assert [rule["ports"][0]["port"] for rule in policy["spec"]["ingress"]] == ["http", "metrics"]
    assert all(rule["from"] for rule in policy["spec"]["ingress"])
    closed = rendered(
        "default", "--set-json", "networkPolicy.allowFrom=[]", "--set-json", "networkPolicy.metricsFrom=[]"
    )
    [policy] = of_kind(closed, "NetworkPolicy")
    assert policy["spec"]["ingress"] == []


def test_replicas_of_a_fleet_reach_each_other_and_share_what_they_must() -> None:
    found = rendered("production")
    asked = flags("production")
    assert str(asked["ServerConfig.fleet_secret"]) == "/etc/steerserve/fleet/secret"
    assert asked["ServerConfig.replica_address"] == "$(POD_IP)"
    assert asked["ServerConfig.limits_store"] == "$(LIMITS_STORE)"
    assert asked["ServerConfig.limits_store_failure"] == "closed"
    given = {one["name"]: one["valueFrom"] for one in container("production")["env"]}
    assert given["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert given["LIMITS_STORE"] == {"secretKeyRef": {"name": "steerserve-limits", "key": "url"}}
    assert "/etc/steerserve/fleet" in {mount["mountPath"] for mount in container("production")["volumeMounts"]}
    [policy] = of_kind(found, "NetworkPolicy")
    labels = pod("production")["metadata"]["labels"]
    for rules, peers in ((policy["spec"]["ingress"], "from"), (policy["spec"]["egress"], "to")):
        own = [
            rule
            for rule in rules
            if any(one.get("podSelector", {}).get("matchLabels", {}).items() & labels.items() for one in rule[peers])
        ]
        assert [rule["ports"] for rule in own] == [[{"port": "http", "protocol": "TCP"}]]
    [headless] = [one for one in of_kind(found, "Service") if one["spec"].get("clusterIP") == "None"]
    assert headless["spec"]["publishNotReadyAddresses"] is True
    assert headless["metadata"]["name"].endswith("-replicas")
    # It is not scraped: a ServiceMonitor goes by labels.
    for monitor in of_kind(found, "ServiceMonitor"):
        assert not monitor["spec"]["selector"]["matchLabels"].items() <= headless["metadata"]["labels"].items()


def test_one_server_is_no_fleet() -> None:
    assert len(of_kind(rendered("default"), "Service")) == 1
    assert "env" not in container("default")
    assert flags("default").get("ServerConfig.replica_address") is None


def test_a_gpu_is_asked_for_and_no_second_one_during_an_update() -> None:
    assert container("gpu")["resources"]["limits"]["nvidia.com/gpu"] == 1
    [deployment] = of_kind(rendered("gpu"), "Deployment")
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert "nvidia.com/gpu" not in json.dumps(container("default"))


def test_keys_come_from_a_secret_that_only_the_server_reads() -> None:
    [volume] = [one for one in pod("production")["spec"]["volumes"] if one["name"] == "keys"]
    assert volume["secret"]["defaultMode"] == 0o440
    # A volume that is mounted by subPath is never changed, and keys could not be revoked.
    assert not any("subPath" in mount for mount in container("production")["volumeMounts"])
    assert not of_kind(rendered("production"), "Secret")


def test_the_budget_lets_nodes_be_drained() -> None:
    [default] = of_kind(rendered("default"), "PodDisruptionBudget")
    assert default["spec"].get("maxUnavailable") == 1
    [production] = of_kind(rendered("production"), "PodDisruptionBudget")
    [scaler] = of_kind(rendered("production"), "ScaledObject")
    assert 0 < production["spec"]["minAvailable"] < scaler["spec"]["minReplicaCount"]


def test_the_chart_ships_the_alerts_and_the_dashboard_as_they_are() -> None:
    [rule] = of_kind(rendered("production"), "PrometheusRule")
    [group] = rule["spec"]["groups"]
    for shipped, own in zip(group["rules"], alert_rules(), strict=True):
        url = f"https://runbooks.example.com/steerserve/{own['alert']}.md"
        assert shipped == own | {"annotations": own["annotations"] | {"runbook_url": url}}
    boards = [one for one in of_kind(rendered("production"), "ConfigMap") if "steerserve.json" in one["data"]]
    assert [json.loads(board["data"]["steerserve.json"]) for board in boards] == [dashboard()]


def test_its_version_is_the_server_s() -> None:
    assert read_yaml(CHART / "Chart.yaml")["appVersion"] == steerserve.__version__


@EVERY_CHECK
def test_helm_s_linter_has_nothing_to_say(values: str) -> None:
    done = helm("lint", str(CHART), "--strict", "-f", str(values_file(values)))
    assert done.returncode == 0, done.stdout
    assert not re.search(r"\[(WARNING|ERROR)\]", done.stdout)


def test_the_plain_manifests_are_the_chart_s() -> None:
    done = helm("template", "steerserve", str(CHART), "--namespace", "steerserve", "--skip-tests")
    dropped = re.sub(r"^ *(helm\.sh/chart|app\.kubernetes\.io/managed-by):.*\n", "", done.stdout, flags=re.MULTILINE)
    plain = (DEPLOY / "kubernetes" / "steerserve.yaml").read_text(encoding="utf-8")
    assert documents(plain) == documents(dropped), "run deploy/kubernetes/render.sh"


def test_the_namespace_of_the_plain_manifests_enforces_the_restricted_standard() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    namespace = read_yaml(DEPLOY / "kubernetes" / "namespace.yaml")
    validate.validate(namespace, "1.30", strict=True)
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    kustomization = read_yaml(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert all((DEPLOY / "kubernetes" / name).is_file() for name in kustomization["resources"])
