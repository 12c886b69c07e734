from typing import Any

import pytest

from steerserve.config import EngineConfig, ModelConfig, SaeConfig, ServerConfig


def test_defaults_are_valid() -> None:
    assert EngineConfig().max_rows == 32
    assert ServerConfig().max_body_bytes == 1024 * 1024


@pytest.mark.parametrize(
    "name",
    ["max_rows", "max_batch_tokens", "max_batch_bytes", "max_queue", "max_steps", "max_interventions", "threads"],
)
def test_engine_bounds_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EngineConfig(**dict[str, Any]({name: 0}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000),
        ("max_body_bytes", 0),
        ("max_rows_per_request", 0),
        ("keep_alive_seconds", float("nan")),
        ("drain_seconds", -1.0),
    ],
)
def test_server_bounds_are_held(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        ServerConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "origin", ["", "example.org", "https://example.org/", "https://Example.org", "https://", "http://a b"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="cors_origin must be"):
        ServerConfig(cors_origin=("https://example.org", origin))
    ServerConfig(cors_origin=("*", "http://127.0.0.1:3000", "https://example.org", "chrome-extension://abc"))


@pytest.mark.parametrize("name", ["revision", "served_name"])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be empty"):
        ModelConfig(**{name: ""})  # type: ignore[arg-type]


@pytest.mark.parametrize("sha256", ["", "abc", "0" * 63, "g" * 64, "0" * 65, "0" * 64 + "\n"])
def test_a_pin_is_a_whole_digest(sha256: str) -> None:
    with pytest.raises(ValueError, match="sha256 must be 64 hexadecimal digits"):
        ModelConfig(sha256=sha256)
    assert ModelConfig(sha256="0aF" + "1" * 61).device == "auto"


def test_saes_are_chosen_by_what_can_be() -> None:
    assert SaeConfig(sae_layers=(0, 3), sae_k=50).sae_k == 50
    for changes in ({"sae_layers": (0, -1)}, {"sae_k": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            SaeConfig(**changes)
