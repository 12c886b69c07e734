"""The rule that picks tasks, and the plan of the cells."""

from typing import Any

import pytest

from bench.steering.plan.cells import EXPERIMENTS, INFILL, plan
from bench.steering.plan.methods import METHODS
from bench.steering.plan.settings import FULL, QUICK, with_texts
from bench.steering.plan.targets import pairs, singles, triples
from steerserve.steering.attribute import Attribute
from tests import tiny

NAMES = ("topic/b", "topic/a", "sentiment/up", "sentiment/down", "register/old", "register/new", "tone/x", "tone/y")


@pytest.fixture(scope="module")
def attributes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Attribute]:
    folder = tmp_path_factory.mktemp("attributes")
    return {name: tiny.attribute(folder / name, name, cost=name.startswith("topic")) for name in NAMES}


def test_sets_take_one_attribute_of_each_kind_in_turn() -> None:
    assert [one.name for one in singles(NAMES)] == sorted(NAMES)
    assert [one.attributes for one in pairs(NAMES, 4)] == [("topic/a", "sentiment/up"), ("topic/b", "sentiment/down")]
    assert [one.attributes for one in triples(NAMES, 4)] == [
        ("topic/a", "sentiment/down", "register/new"),
        ("topic/b", "sentiment/up", "register/old"),
    ]
    assert pairs(["topic/a"], 4) == triples(["topic/a", "sentiment/up"], 4) == []


def test_a_plan_has_every_method_for_every_task_it_is_for(attributes: dict[str, Attribute]) -> None:
    cells = plan(FULL, attributes, EXPERIMENTS)
    assert cells[0].method == "none"
    for name, method in METHODS.items():
        tasks = {cell.task for cell in cells if cell.method == name}
        if method.push is not None and method.singles:
            assert set(NAMES) <= tasks
        assert any(" + " in task for task in tasks) == method.sets
    assert {cell.factor for cell in cells if cell.task == INFILL} == set(FULL.order_steps)
    only = plan(FULL, attributes, ["orders"])
    assert only == [cell for cell in cells if cell.experiment == "orders"]


def test_schedules_are_compared_at_one_predicted_cost(attributes: dict[str, Attribute]) -> None:
    cells = plan(QUICK, attributes, ["single"])
    norms = {
        (cell.task, cell.request["interventions"][0]["schedule"]["norm"])
        for cell in cells
        if cell.method in ("uniform", "commitment", "early", "ramp down")
    }
    assert norms == {(name, "kl" if name.startswith("topic") else "l2") for name in NAMES}


def test_a_key_changes_with_what_its_rows_depend_on_and_with_nothing_else(attributes: dict[str, Attribute]) -> None:
    cells = plan(QUICK, attributes, EXPERIMENTS)
    hashes = dict.fromkeys(NAMES, "1")
    origin: dict[str, Any] = {"attributes": hashes, "judge": "j"}
    assert len({cell.key(origin) for cell in cells}) == len(cells)
    cell = next(cell for cell in cells if cell.attributes == ("topic/a",))
    assert cell.key(origin) == cell.key(origin | {"attributes": hashes | {"topic/b": "2"}})
    assert cell.key(origin) != cell.key(origin | {"attributes": hashes | {"topic/a": "2"}})
    assert cell.key(origin) != cell.key(origin | {"judge": "k"})


def test_fewer_texts_are_fewer_throughout() -> None:
    half = with_texts(FULL, FULL.texts // 2)
    assert (half.texts, half.side_texts, half.kl_texts, half.order_texts) == (24, 16, 6, 16)
    assert half.factors == FULL.factors
