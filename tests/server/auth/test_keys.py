import hmac
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.errors import ArtifactError, RequestError
from steerserve.server.app import create_app
from steerserve.server.auth.keys import KeyEntry, Keyring
from steerserve.server.auth.policy import Policy
from steerserve.steering.names import UNITS
from tests.server.planned_engine import SECRET, entry, keys_file
from tests.server.text_engine import TextEngine, service_of


def read(path: Path, check: Callable[[Policy], None] = lambda _: None) -> Keyring:
    return Keyring(path, check)


def test_json_and_toml_say_the_same(tmp_path: Path) -> None:
    made = entry(rate_per_minute=60, max_strength={"residual": 1.5}, denied_attributes=["topic/*"])
    toml = tmp_path / "keys.toml"
    toml.write_text(
        f'[[keys]]\nname = "team"\nsha256 = "{made["sha256"]}"\nrate_per_minute = 60\n'
        'denied_attributes = ["topic/*"]\nmax_strength = {residual = 1.5}\n'
    )
    bare = tmp_path / "list.json"
    bare.write_text(json.dumps([made]))
    alone, alone_toml = tmp_path / "entry.json", tmp_path / "entry.toml"
    alone.write_text(json.dumps(made, indent=2))
    alone_toml.write_text(toml.read_text().replace("[[keys]]", ""))
    paths = (keys_file(tmp_path, made), toml, bare, alone, alone_toml)
    found = [read(path).find(SECRET) for path in paths]
    assert found[0] is not None
    assert found == [found[0]] * len(paths)
    assert found[0].policy.max_strength == {"residual": 1.5}


def test_a_key_that_denies_attributes_takes_no_directions_unless_told_to(tmp_path: Path) -> None:
    keyring = read(
        keys_file(
            tmp_path,
            entry("plain", "a" * 32),
            entry("denies", "b" * 32, denied_attributes=["x"]),
            entry("trusts", "c" * 32, denied_attributes=["x"], vectors=True, features=True),
        )
    )
    found = [keyring.find(secret * 32) for secret in "abc"]
    assert [key and (key.policy.vectors, key.policy.features) for key in found] == [
        (True, True),
        (False, False),
        (True, True),
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "a b"}, "name"),
        ({"sha256": "abc"}, "64 hexadecimal digits"),
        ({"key": "x"}, "is not a known field"),
        ({"rate_per_minute": 0}, "rate_per_minute"),
        ({"max_concurrent": True}, "max_concurrent"),
        ({"max_strength": {"volts": 1}}, "max_strength"),
        ({"max_strength": {"residual": -1}}, "max_strength"),
        ({"operators": ["push"]}, "operators"),
        ({"max_overlap": 2}, "max_overlap"),
        ({"mandatory": [{"attribute": "x", "schedule": "commitment"}]}, "uniform"),
        ({"mandatory": [{"strength": 1}]}, "exactly one of"),
        ({"mandatory": [{"attribute": "x", "when": {"progress": {"above": 0}}}]}, "has no condition"),
    ],
)
def test_a_broken_entry_is_named(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError, match=said) as error:
        read(keys_file(tmp_path, entry() | fields))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "3", '"x"', '{"keys": []}', "[" * 100_000, "\x00", "{} {}", "[[]]", "{}{"])
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ArtifactError):
        read(path)
    with pytest.raises(ArtifactError):
        read(tmp_path / "missing.toml")


def test_a_comma_between_entries_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(f"{json.dumps(entry('a'))},\n{json.dumps(entry('b'))}\n")
    with pytest.raises(ArtifactError, match="no comma stands between entries, except in a list: line 1 column"):
        read(file)
    file.write_text(f"{json.dumps(entry('a'))}\n\n {json.dumps(entry('b'))[:-1]}\n")
    with pytest.raises(ArtifactError, match="line 3 column"):
        read(file)


def test_keys_and_names_are_there_once(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="name 'a'"):
        read(keys_file(tmp_path, entry("a"), entry("a", "other")))
    with pytest.raises(ArtifactError, match="same key"):
        read(keys_file(tmp_path, entry("a"), entry("b")))


def test_a_key_in_the_place_of_its_hash_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as error:
        read(keys_file(tmp_path, entry() | {"sha256": SECRET}))
    assert SECRET not in str(error.value)


def test_a_mandatory_intervention_that_does_not_hold_is_refused(tmp_path: Path) -> None:
    def refuse(_: Policy) -> None:
        raise RequestError("no attribute 'x'")

    with pytest.raises(ArtifactError, match=r"keys\[0\]\.mandatory: no attribute 'x'"):
        read(keys_file(tmp_path, entry(mandatory=[{"attribute": "x"}])), refuse)


def test_every_key_is_compared_whichever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    real = hmac.compare_digest

    def counting(a: str, b: str) -> bool:
        compared.append(a)
        return real(a, b)

    keyring = read(keys_file(tmp_path, *(entry(f"k{i}", f"secret-{i}") for i in range(5))))
    monkeypatch.setattr(hmac, "compare_digest", counting)
    for secret, name in (("secret-0", "k0"), ("secret-4", "k4"), ("wrong", None), ("", None)):
        compared.clear()
        found = keyring.find(secret)
        assert (found.name if found else None) == name
        assert len(compared) == 5


def test_reading_again_takes_the_new_file_or_keeps_the_old_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = keys_file(tmp_path, entry("old", "old-secret"))
    keyring = read(path)
    path.write_text("{ broken")
    with caplog.at_level(logging.INFO):
        assert not keyring.reload()
    assert "the old ones stay" in caplog.text
    assert keyring.find("old-secret") is not None
    keys_file(tmp_path, entry("new", "new-secret"))
    assert keyring.reload()
    assert keyring.find("old-secret") is None
    assert keyring.find("new-secret") is not None


def test_an_entry_has_every_field_of_a_policy(tmp_path: Path) -> None:
    assert {one.name for one in fields(Policy)} <= KeyEntry.model_fields.keys()
    written: dict[str, Any] = {
        "max_strength": {unit: 1.5 for unit in (*UNITS, "factor")},
        "max_kl": 0.25,
        "max_predicted_kl": 0.5,
        "denied_attributes": ["topic/*", "x"],
        "operators": ["add", "cap"],
        "vectors": True,
        "features": True,
        "max_overlap": 0.125,
        "max_loudness": 0.75,
    }
    key = read(keys_file(tmp_path, entry(**written))).find(SECRET)
    assert key is not None
    found = asdict(key.policy)
    assert found.pop("mandatory") == ()
    assert found == written | {"denied_attributes": ("topic/*", "x"), "operators": ("add", "cap")}
    key = read(keys_file(tmp_path, entry())).find(SECRET)
    assert key is not None and key.policy == Policy()


def test_a_pattern_that_matches_nothing_loaded_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = keys_file(tmp_path, entry("a", "a" * 32, denied_attributes=["topic/*", "sentiment/postive", "zzzz*"]))
    keyring = Keyring(path, lambda _: None, ("topic/sports", "sentiment/positive"))
    keyring.warn_of_unmatched()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "key 'a': denied_attributes 'sentiment/postive' matches no attribute that is loaded; nearest: "
        "sentiment/positive, topic/sports",
        "key 'a': denied_attributes 'zzzz*' matches no attribute that is loaded; nearest: none",
    ]
    caplog.clear()
    keys_file(tmp_path, entry("a", "a" * 32, denied_attributes=["topc/*", "sentiment/*"]))
    assert keyring.reload()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "key 'a': denied_attributes 'topc/*' matches no attribute that is loaded; nearest: topic/sports"
    ]


def test_a_server_that_starts_warns_of_patterns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = keys_file(tmp_path, entry(denied_attributes=["topic/*", "tpic/*"]))
    with TestClient(create_app(service_of(TextEngine()), ServerConfig(keys=path))):
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "key 'team': denied_attributes 'tpic/*' matches no attribute that is loaded; nearest: topic/sports"
    ]
