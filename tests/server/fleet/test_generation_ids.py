import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.errors import SteerserveError
from steerserve.server.fleet.generation_ids import GenerationIds

OLD, NEW = b"o" * 32, b"n" * 32
HERE, THERE = GenerationIds([NEW], "10.0.0.1:8000"), GenerationIds([NEW], "10.0.0.2:8000")


def test_every_replica_reads_where_an_id_is_from() -> None:
    name = HERE.new("cmpl-")
    assert name.startswith("cmpl-")
    assert HERE.address_in(name) == THERE.address_in(name) == "10.0.0.1:8000"
    assert THERE.address_in(THERE.new("chatcmpl-")) == "10.0.0.2:8000"


def test_ids_differ_and_tell_nothing_to_others() -> None:
    names = {HERE.new("cmpl-") for _ in range(1000)}
    assert len(names) == 1000
    assert all("10.0" not in name and name.replace("-", "").replace("_", "").isalnum() for name in names)
    assert GenerationIds([OLD], "10.0.0.1:8000").address_in(names.pop()) is None


@given(st.data())
def test_a_changed_id_is_none(data: st.DataObject) -> None:
    name = HERE.new("cmpl-")
    place = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.characters(codec="utf-8").filter(lambda one: one != name[place]))
    assert THERE.address_in(name[:place] + letter + name[place + 1 :]) is None


@given(st.text(max_size=80) | st.text(alphabet="abcXYZ019-_=", max_size=80))
def test_any_other_text_is_none(name: str) -> None:
    assert HERE.address_in(name) is None
    assert HERE.address_in(f"cmpl-{name}") is None


def test_an_id_is_written_in_one_way() -> None:
    for name in (HERE.new("cmpl-") for _ in range(50)):
        plus = "cmpl-" + name.removeprefix("cmpl-").replace("-", "+").replace("_", "/")
        assert (THERE.address_in(plus) is None) == (plus != name)
        assert THERE.address_in(name + "=") is None


def test_kinds_cannot_be_exchanged_and_length_is_bounded() -> None:
    name = HERE.new("cmpl-")
    assert HERE.address_in("chat" + name) is None
    assert HERE.address_in("cmpl-" + "A" * 10_000) is None


def test_a_secret_can_be_changed_while_the_fleet_runs() -> None:
    before, between = GenerationIds([OLD], "a:1"), GenerationIds([NEW, OLD], "b:1")
    assert between.address_in(before.new("cmpl-")) == "a:1"
    assert GenerationIds([NEW], "c:1").address_in(between.new("cmpl-")) == "b:1"
    assert before.address_in(between.new("cmpl-")) is None


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(SteerserveError, match="--replica-address needs cryptography.exceptions: .*fleet"):
        GenerationIds([NEW], "a:1")
