"""Every name that a request may use is in one list, which errors, help, capabilities and OpenAPI all tell."""

import argparse
import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from schedulers import NORMS, ORDERS, SCHEDULES, TRANSFERS
from steerserve.commands import generate
from steerserve.config import ServerConfig
from steerserve.engine.admission.interventions.units import LARGEST
from steerserve.engine.api.conditions import KINDS, OVER, READ
from steerserve.engine.api.params import GenerationParams, Intervention, Limits
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.kv_cache import CACHES
from steerserve.errors import RequestError
from steerserve.runtime.cards import capabilities
from steerserve.server.app import create_app
from steerserve.steering.names import (
    COMBINE,
    CONTROLS,
    DIRECTIONS,
    ON_EXCEED,
    OPERATORS,
    SCOPE_NAMES,
    UNITS,
)
from steerserve.steering.operators import CODES
from steerserve.steering.push import SCOPES
from tests import tiny
from tests.server.torch_service import service_of

ROOT = Path(__file__).parents[1]
SPORTS = Intervention(attribute="topic/sports")
PLAIN = GenerationParams(prompt="the king", max_tokens=4, steps=2)
LISTS: dict[str, tuple[str, ...]] = {
    "schedules": SCHEDULES,
    "orders": tuple(ORDERS),
    "transfers": tuple(TRANSFERS),
    "operators": OPERATORS,
    "units": UNITS,
    "scopes": SCOPE_NAMES,
    "controls": CONTROLS,
    "norms": tuple(NORMS),
    "conditions": KINDS,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return tiny.engine(tiny.bert(), tmp_path_factory.mktemp("named"))


@pytest.fixture(scope="module")
def schemas(engine: DiffusionEngine) -> dict[str, Any]:
    service = replace(service_of(engine, "tiny"), capabilities=capabilities(engine))
    with TestClient(create_app(service, ServerConfig())) as client:
        found: dict[str, Any] = client.get("/openapi.json").json()["components"]["schemas"]
    return found


WRONG: dict[str, tuple[GenerationParams, tuple[str, ...]]] = {
    "schedule": (replace(PLAIN, interventions=(replace(SPORTS, schedule="comitment"),)), SCHEDULES),
    "order": (replace(PLAIN, order="confident"), tuple(ORDERS)),
    "transfer": (replace(PLAIN, transfer="liner"), tuple(TRANSFERS)),
    "cache": (replace(PLAIN, cache="prefixed"), tuple(CACHES)),
    "unit": (replace(PLAIN, interventions=(replace(SPORTS, unit="max"),)), UNITS),  # type: ignore[arg-type]
    "scope": (replace(PLAIN, interventions=(replace(SPORTS, scope="mask"),)), SCOPE_NAMES),  # type: ignore[arg-type]
    "control": (replace(PLAIN, control="flip"), CONTROLS),  # type: ignore[arg-type]
    "combine": (replace(PLAIN, combine="jointly"), COMBINE),  # type: ignore[arg-type]
    "on_exceed": (replace(PLAIN, limits=Limits(max_delta=1.0, on_exceed="cut")), ON_EXCEED),  # type: ignore[arg-type]
    "norm": (replace(PLAIN, interventions=(replace(SPORTS, schedule={"type": "uniform", "norm": "l1"}),)), NORMS),
    "condition": (replace(PLAIN, interventions=(replace(SPORTS, when={}),)), KINDS),
}


@pytest.mark.parametrize("field", WRONG)
def test_an_error_lists_every_name_there_is(engine: DiffusionEngine, field: str) -> None:
    params, names = WRONG[field]
    with pytest.raises(RequestError) as error:
        engine.admit(params)
    assert set(names) <= set(re.findall(r"\w+", str(error.value)))


def test_help_lists_every_name() -> None:
    parser = argparse.ArgumentParser()
    generate.add_flags(parser)
    said = {action.dest.split(".")[-1]: action for action in parser._actions}
    for field, names in (("schedule", SCHEDULES), ("order", ORDERS), ("transfer", TRANSFERS)):
        assert set(names) <= set(re.findall(r"\w+", said[field].help or ""))
    for field, names in (("op", OPERATORS), ("unit", UNITS), ("scope", SCOPE_NAMES), ("direction", DIRECTIONS)):
        assert list(said[field].choices or ()) == list(names)


def test_capabilities_list_every_name(engine: DiffusionEngine) -> None:
    told = capabilities(engine)
    for name in ("schedules", "orders", "transfers", "operators", "units", "controls", "norms"):
        assert told[name] == list(LISTS[name])
    assert told["scopes"] == [*SCOPE_NAMES, "positions"]
    assert told["caches"] == list(CACHES)


def test_openapi_lists_every_name(schemas: dict[str, Any]) -> None:
    def options(schema: str, field: str) -> list[dict[str, Any]]:
        """The alternatives of a field, whatever they are nested in."""
        found, waiting = [], [schemas[schema]["properties"][field]]
        while waiting:
            one = waiting.pop()
            found.append(one)
            waiting += [*one.get("anyOf", []), *one.get("oneOf", [])]
        return found

    for schema, field, names in (
        ("Intervention", "schedule", SCHEDULES),
        ("Intervention", "op", OPERATORS),
        ("Intervention", "unit", UNITS),
        ("Intervention", "scope", SCOPE_NAMES),
        ("Intervention", "direction", DIRECTIONS),
        ("Diffusion", "order", ORDERS),
        ("Diffusion", "transfer", TRANSFERS),
        ("Diffusion", "cache", CACHES),
        ("Steering", "control", CONTROLS),
        ("Steering", "combine", COMBINE),
        ("Limits", "on_exceed", ON_EXCEED),
    ):
        assert list(names) in [one.get("enum") for one in options(schema, field)], (schema, field)
    named = [one for one in options("Intervention", "schedule") if one.get("type") == "object"]
    assert named[0]["properties"]["type"]["enum"] == list(SCHEDULES)
    kinds = [one for one in options("Intervention", "when") if one.get("required")]
    assert {one["required"][0] for one in kinds} == set(KINDS)
    [attribute] = [one["properties"] for one in kinds if one["required"] == ["attribute"]]
    assert (attribute["read"]["anyOf"][0]["enum"], attribute["over"]["anyOf"][0]["enum"]) == (list(READ), list(OVER))


def test_tables_by_name_have_every_name_and_no_other() -> None:
    assert tuple(LARGEST) == UNITS
    assert tuple(SCOPES) == SCOPE_NAMES
    assert tuple(CODES) == (*OPERATORS, "read")


def test_no_list_is_written_twice() -> None:
    """A literal of which at least three elements and two thirds of one list are those of the list."""
    found = set()
    for path in sorted((ROOT / "steerserve").rglob("*.py")):
        if path.name == "names.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Tuple | ast.List | ast.Set):
                continue
            said = {one.value for one in node.elts if isinstance(one, ast.Constant) and isinstance(one.value, str)}
            for name, names in LISTS.items():
                own = path.relative_to(ROOT).as_posix()
                if len(said) >= 3 and said <= {*names, "joint"} and 3 * len(said & set(names)) >= 2 * len(names):
                    found.add((own, name))
    assert found == {("steerserve/engine/api/conditions.py", "conditions")}
