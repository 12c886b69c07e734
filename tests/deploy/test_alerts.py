"""Every alert can be acted on; promtool's tests of the rules hold where there is a promtool."""

import shutil
import subprocess

import pytest

from tests.deploy.files import DEPLOY, ROOT, alert_rules


def test_alerts_have_different_names() -> None:
    names = [rule["alert"] for rule in alert_rules()]
    assert len(names) == len(set(names)) >= 10


def test_every_alert_says_what_it_is_and_has_a_runbook() -> None:
    for rule in alert_rules():
        name, annotations = rule["alert"], rule["annotations"]
        assert name.startswith("Steerserve")
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert annotations["summary"] and annotations["description"]
        runbook = ROOT / annotations["runbook"]
        assert runbook.name == f"{name}.md"
        text = runbook.read_text(encoding="utf-8")
        assert text.startswith(f"# {name}\n")
        assert "\n## Find out\n" in text and "\n## Do\n" in text


def test_every_runbook_belongs_to_an_alert() -> None:
    runbooks = {path.stem for path in (DEPLOY / "runbooks").glob("*.md")}
    assert runbooks == {rule["alert"] for rule in alert_rules()}


def test_every_alert_expects_the_job_that_is_scraped() -> None:
    for rule in alert_rules():
        assert rule["expr"].count("{") == rule["expr"].count('{job="steerserve"'), rule["alert"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_the_rules_fire_when_they_should() -> None:
    tests = DEPLOY / "prometheus" / "alerts.test.yaml"
    done = subprocess.run(["promtool", "test", "rules", str(tests)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
