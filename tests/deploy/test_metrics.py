"""What dashboard, alerts and autoscalers ask Prometheus for is what the server tells it."""

import re
import sys
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from steerserve.config import ServerConfig
from tests.deploy.files import alert_rules, dashboard, of_kind, rendered
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.text_engine import TextEngine, serving

# Not the server's: `up` is Prometheus' own, the labels are given by whoever scrapes.
SCRAPED = {"up"}
GIVEN_LABELS = {"job", "instance", "namespace", "service"}

NAME = re.compile(r"\b(?:steerserve|process)_[a-zA-Z0-9_:]+|\bup\b")
SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}")
MATCHER = re.compile(r"([a-zA-Z_]+)\s*(?:=~|!~|!=|=)")
BY = re.compile(r"\bby\s*\(([^)]*)\)")
PARTS = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def expressions() -> Iterator[tuple[str, str]]:
    """Where each expression is, and the expression with Grafana's variables filled in."""
    for rule in alert_rules():
        yield rule["alert"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], re.sub(r"\$job|\$instance", "x", target["expr"].replace("$__rate_interval", "5m"))
    for scaled in of_kind(rendered("production"), "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            yield trigger["name"], trigger["metadata"]["query"]


def series(exposition: str) -> dict[str, set[str] | None]:
    """The labels of each series by its name; None where a family has no series yet."""
    found: dict[str, set[str] | None] = {}
    for family in text_string_to_metric_families(exposition):
        names = {sample.name for sample in family.samples}
        for part in PARTS.get(family.type, ()):
            labels = [set(sample.labels) for sample in family.samples if sample.name == family.name + part]
            found[family.name + part] = labels[0] if labels else None
        for name in names - set(found):
            found[name] = next(set(sample.labels) for sample in family.samples if sample.name == name)
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str] | None]:
    """What a server tells that has answered a request and refused one, and one whose limits are counted elsewhere."""
    keys = keys_file(tmp_path_factory.mktemp("keys"), entry())
    config = ServerConfig(keys=keys, limits_store="redis://127.0.0.1:9")
    with serving(TextEngine(), config) as client:
        counted = series(client.get("/metrics", headers={"Authorization": f"Bearer {SECRET}"}).text)
    with serving(TextEngine()) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        assert client.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 4}).status_code == 200
        assert client.post("/v1/completions", json={"no": "model"}).status_code == 400
        return counted | series(client.get("/metrics").text)


def test_every_metric_that_is_asked_for_exists(told: dict[str, set[str] | None]) -> None:
    asked = {(name, where) for where, expression in expressions() for name in NAME.findall(expression)}
    assert len(asked) > 40
    # Facts of the process are read from Linux' /proc.
    linux = sys.platform.startswith("linux")
    missing = {
        (name, where)
        for name, where in asked
        if name not in SCRAPED and name not in told and (linux or not name.startswith("process_"))
    }
    assert not missing, sorted(missing)


def test_every_label_that_is_asked_for_exists(told: dict[str, set[str] | None]) -> None:
    for where, expression in expressions():
        for name, matchers in SELECTOR.findall(expression):
            labels = told.get(name)
            if labels is not None:
                assert set(MATCHER.findall(matchers)) <= labels | GIVEN_LABELS, (where, name)
        grouped = {label.strip() for labels in BY.findall(expression) for label in labels.split(",")}
        known = [told.get(name) for name in NAME.findall(expression)]
        if all(labels is not None for labels in known):
            assert grouped <= GIVEN_LABELS.union(*(labels or () for labels in known)), where


def test_the_autoscaler_of_kubernetes_asks_for_gauges(told: dict[str, set[str] | None]) -> None:
    [scaler] = of_kind(rendered("gpu"), "HorizontalPodAutoscaler")
    names = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert names == {"steerserve_queue_steps", "steerserve_running_rows"}
    assert names <= set(told)


def test_every_expression_is_promql() -> None:
    promql = pytest.importorskip("promql_parser")
    for where, expression in expressions():
        try:
            promql.parse(expression)
        except ValueError as error:
            pytest.fail(f"{where}: {expression}: {error}")
