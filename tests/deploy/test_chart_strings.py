"""Every string that a user gives the chart is a string in what it renders, whatever it looks like in YAML."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.files import CHART, Document, helm, of_kind

NAMES = ("1234567", "1e3", "0x10", "null", "no", "true", "2024-01-02", "1.5", "0o17", "plain-name")
"""Values that a Kubernetes name, a release's name included, may have, and that are no strings in plain YAML."""
TEXTS = ("NO", "1e3", "null", "0x10", "2024-01-02", "~", "{a: b}", "a: b # c", "- x", '"', "\\", "=", "\n", "12:30:45")
"""The same of values that may be any text."""


def documents(text: str) -> list[Document]:
    """The documents of a text, with the numbers that Go's YAML reads and Python's leaves as text."""
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """Reads more plain scalars as numbers."""

    number = re.compile(r"^[-+]?(0o[0-7]+|[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(_plain(loader.construct_scalar(node))))
    return [one for one in yaml.load_all(text, Loader) if one]


def _plain(number: str) -> str:
    return str(int(number, 8)) if "o" in number else number


def rendered(name: str, texts: tuple[str, ...], path: Path, mode: str = "none") -> list[Document]:
    """What the chart makes of a name wherever it takes one, and of texts wherever it takes any."""
    labels = {f"key-{i}": name for i in range(2)} | {name: name}
    text = texts[0]
    values: dict[str, Any] = {
        "fullnameOverride": name,
        "nameOverride": name,
        "image": {"repository": text, "tag": name, "pullSecrets": [{"name": name}]},
        "server": {"host": "::", "flags": {"cors-origin": list(texts), "otel-endpoint": text, "threads": 1000000}},
        "model": {"path": name, "sae": name, "attributes": name},
        "weights": {
            "enabled": True,
            "existingClaim": name if mode == "none" else "",
            "storageClassName": name,
            "size": "1000000",
            "mountPath": "/1e3",
        },
        "keys": {"existingSecret": name, "item": name},
        "fleet": {"existingSecret": name, "item": name},
        "limits": {"existingSecret": name, "item": name},
        "environment": {"NO": text, "null": text, "Y": "off", "_1": "1"}
        | {f"_{i}": one for i, one in enumerate(texts)},
        "gpu": {"enabled": True, "runtimeClassName": name},
        "autoscaling": {"mode": mode, "maxReplicas": 1000000, "prometheusAddress": f"http://{text}"},
        "tmp": {"sizeLimit": "1000000"},
        "preStopSeconds": 1000000,
        "replicaCount": 1000000,
        "service": {"annotations": {name: text}},
        "ingress": {
            "enabled": True,
            "className": name,
            "annotations": {name: text},
            "host": name,
            "path": f"/{text}",
            "tlsSecret": name,
        },
        "serviceAccount": {"name": name, "annotations": {name: text}},
        "podDisruptionBudget": {"maxUnavailable": "50%"},
        "serviceMonitor": {"enabled": True, "labels": labels},
        "prometheusRule": {"enabled": True, "labels": labels},
        "grafanaDashboard": {"enabled": True, "labels": labels},
        "podLabels": labels,
        "podAnnotations": {name: text},
        "nodeSelector": labels,
        "tolerations": [{"key": name, "value": name}],
        "priorityClassName": name,
    }
    file = path / "values.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    done = helm("template", name, str(CHART), "-n", name, "-f", str(file))
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def differing(found: Any, expected: Any, path: str = "") -> list[str]:
    """Where two documents differ, types included; `expected` has the marks of plain values."""
    if type(found) is not type(expected):
        return [f"{path}: {found!r}, not {expected!r}"]
    if isinstance(found, dict):
        lost = [f"{path}: keys {list(found)}, not {list(expected)}"] if set(found) != set(expected) else []
        return lost or [line for key in found for line in differing(found[key], expected[key], f"{path}.{key}")]
    if isinstance(found, list) and len(found) == len(expected):
        return [line for i in range(len(found)) for line in differing(found[i], expected[i], f"{path}[{i}]")]
    return [] if found == expected else [f"{path}: {found!r}, not {expected!r}"]


def with_values(one: Any, marks: dict[str, str]) -> Any:
    """A document with its marks replaced, in keys and in values."""
    if isinstance(one, dict):
        return {with_values(key, marks): with_values(value, marks) for key, value in one.items()}
    if isinstance(one, list):
        return [with_values(value, marks) for value in one]
    if not isinstance(one, str):
        return one
    for mark, value in marks.items():
        one = one.replace(mark, value)
    return one


def comparable(found: list[Document]) -> list[Document]:
    """The documents in an order of their own, without what comes from files and without the environment's checksum."""
    for one in found:
        one.get("spec", {}).get("template", {}).get("metadata", {}).get("annotations", {}).pop(
            "checksum/environment", 0
        )
        if one["kind"] == "PrometheusRule":
            del one["spec"]
        if "steerserve.json" in one.get("data", {}):
            one["data"] = {}
    return sorted(found, key=lambda one: (one["kind"], not one.get("data")))


@pytest.mark.parametrize(("mode", "names"), [("none", NAMES[::2]), ("hpa", NAMES[1::4]), ("keda", NAMES[3::4])])
def test_what_looks_like_another_type_stays_the_string_it_was(
    mode: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    """The rendered documents are those of harmless values, with the harmless values replaced."""
    placeholders = tuple(f"mark{chr(97 + i) * 3}x" for i in range(len(TEXTS)))
    harmless = comparable(rendered("namemark", placeholders, tmp_path, mode))
    for name in names:
        turn = NAMES.index(name)
        texts = TEXTS[turn:] + TEXTS[:turn]
        found = comparable(rendered(name, texts, tmp_path, mode))
        service = service_name(name)
        expected = with_values(harmless, {"namemark": name} | dict(zip(placeholders, texts, strict=True)))
        for one in expected:
            if one["kind"] == "Service":
                one["metadata"]["name"] = service + "-replicas" * (one["spec"].get("clusterIP") == "None")
            if one["kind"] == "Ingress":
                one["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["name"] = service
            if one["kind"] == "ScaledObject":
                for trigger in one["spec"]["triggers"]:
                    query = trigger["metadata"]["query"]
                    trigger["metadata"]["query"] = query.replace(f'service="{name}"', f'service="{service}"')
            if one["kind"] == "Pod":
                script = one["spec"]["containers"][0]["args"]
                script[0] = script[0].replace(f"http://{name}:", f"http://{service}:")
        assert differing(found, expected) == [], name


def service_name(name: str) -> str:
    """A Service's name begins with a letter and has no dots."""
    plain = name.replace(".", "-")
    return plain if plain[0].isalpha() else f"s-{plain}"


def test_the_service_has_a_name_that_kubernetes_takes_where_the_release_s_is_none(tmp_path: Path) -> None:
    """A Service's name begins with a letter and has no dots; whatever names the Service names that one."""
    found = tuple(rendered("1.5", TEXTS, tmp_path))
    services, [ingress] = of_kind(found, "Service"), of_kind(found, "Ingress")
    assert {one["metadata"]["name"] for one in services} == {"s-1-5", "s-1-5-replicas"}
    [path] = ingress["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"]["name"] == "s-1-5"
