"""A started server over the text engine, and its client."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from tests.server.text_engine import TextEngine, serving


@pytest.fixture
def engine() -> TextEngine:
    return TextEngine()


@pytest.fixture
def client(engine: TextEngine) -> Iterator[TestClient]:
    with serving(engine) as client:
        yield client
