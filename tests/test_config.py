import pytest

from steerserve.config import EngineConfig, ServerConfig


def test_defaults_are_valid() -> None:
    assert EngineConfig().max_rows == 32
    assert ServerConfig().max_body_bytes == 1024 * 1024


@pytest.mark.parametrize("name", ["max_rows", "max_queue", "max_steps", "max_interventions", "threads"])
def test_engine_bounds_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EngineConfig(**{name: 0})


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
