"""The dashboard is one that Grafana can lay out, and every panel asks the data source that is chosen."""

from itertools import combinations

from tests.deploy.files import DEPLOY, Document, dashboard, read_yaml


def overlap(one: Document, other: Document) -> bool:
    """Whether two panels share a place."""
    a, b = one["gridPos"], other["gridPos"]
    return bool(
        a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"] and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]
    )


def test_panels_have_places_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] >= 0 and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert not [(a["title"], b["title"]) for a, b in combinations(panels, 2) if overlap(a, b)]


def test_every_panel_asks_the_chosen_source_something() -> None:
    for panel in dashboard()["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["targets"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_every_query_keeps_to_the_chosen_job_and_replicas() -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            assert expression.count("{") == expression.count('{job="$job", instance=~"$instance"'), panel["title"]


def test_it_shows_what_steering_costs() -> None:
    shown = " ".join(target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ()))
    assert "steerserve_steering_predicted_kl_bucket" in shown
    assert "steerserve_steering_measured_kl_sum" in shown


def test_its_variables_are_defined() -> None:
    defined = {variable["name"] for variable in dashboard()["templating"]["list"]}
    assert defined == {"datasource", "job", "instance"}


def test_it_is_where_grafana_is_told_to_look() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    [provider] = read_yaml(provisioning / "dashboards" / "steerserve.yaml")["providers"]
    [source] = read_yaml(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    volumes = read_yaml(DEPLOY / "compose.yaml")["services"]["grafana"]["volumes"]
    assert f"./grafana/steerserve.json:{provider['options']['path']}/steerserve.json:ro" in volumes
    assert source["type"] == "prometheus"
