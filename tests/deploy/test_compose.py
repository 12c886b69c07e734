"""The services of compose.yaml fit together, and the server in it is confined."""

import re
from typing import Any

from steerserve.cli import build_parser
from tests.deploy.files import DEPLOY, read_yaml


def services() -> dict[str, Any]:
    """The services by name."""
    found: dict[str, Any] = read_yaml(DEPLOY / "compose.yaml")["services"]
    return found


def seconds(text: str) -> float:
    """A duration such as 45s."""
    found = re.fullmatch(r"(\d+)s", text)
    assert found is not None, text
    return float(found[1])


def test_the_server_takes_its_flags() -> None:
    arguments = vars(build_parser().parse_args(services()["steerserve"]["command"]))
    assert arguments["ServerConfig.host"] == "0.0.0.0"
    assert seconds(services()["steerserve"]["stop_grace_period"]) >= arguments["ServerConfig.drain_seconds"] + 10


def test_the_server_is_confined() -> None:
    server = services()["steerserve"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in server["security_opt"]
    assert any(entry.startswith("/tmp") for entry in server["tmpfs"])
    assert server["user"].split(":")[0] != "0"


def test_prometheus_scrapes_the_server_where_it_tells() -> None:
    [scrape] = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    arguments = vars(build_parser().parse_args(services()["steerserve"]["command"]))
    assert scrape["job_name"] == "steerserve"
    assert scrape["static_configs"] == [{"targets": [f"steerserve:{arguments['ServerConfig.metrics_port']}"]}]
    datasource = read_yaml(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"][0]
    assert datasource["url"] == "http://prometheus:9090"


def test_what_is_mounted_exists_and_nothing_listens_to_the_world() -> None:
    for name, service in services().items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), (name, source)
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name


def test_images_are_pinned() -> None:
    for name, service in services().items():
        assert re.search(r":(v?\d+\.\d+\.\d+|cpu)$", service["image"]), name


def test_prometheus_loads_the_rules_that_are_mounted() -> None:
    [rules] = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["rule_files"]
    assert f"./prometheus/alerts.yaml:{rules}:ro" in services()["prometheus"]["volumes"]
